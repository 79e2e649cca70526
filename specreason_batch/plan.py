"""Everything that can be known before a model loads: input, output, formats, what is still to do.

Owns: turning a valid configuration into a `Plan`, or refusing it. Does not know: engines.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from specreason_batch.chain import Chain, Policy
from specreason_batch.chat import (
    ChatFormat,
    VocabularyCase,
    check_round_trip,
    compare_vocabularies,
    is_known_architecture,
    load_chat_format,
)
from specreason_batch.config import DecodingConfig, EngineConfig, GenerateConfig, PolicyConfig
from specreason_batch.judge import Judge, Question
from specreason_batch.policies import POLICIES, PolicySpec, Rules
from specreason_batch.store.manifest import claim_output, file_identity, fingerprint_fields
from specreason_batch.store.parts import ChainKey, ShardPaths, check_source
from specreason_batch.store.prompts import PromptShard, Reject, list_shards
from specreason_batch.store.reading import acceptance_rate, rejected_rows
from specreason_batch.translator import Decoding, Translator, Voice
from specreason_batch.types import InvalidInput, Prompt, Role

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


@dataclass(slots=True)
class ShardPlan:
    """One shard's part of the work."""

    shard: PromptShard
    paths: ShardPaths
    source: str  # identity of the input file
    done: set[ChainKey]
    num_chains: int  # to be made in all; falls as rows turn out unusable

    @property
    def num_done(self) -> int:
        return len(self.done)


@dataclass(slots=True)
class Plan:
    """A run that is known to be good as far as that can be known without models."""

    config: GenerateConfig
    policy_spec: PolicySpec
    policy: Policy
    formats: dict[Role, ChatFormat]
    vocabulary_case: VocabularyCase | None  # None: one model only
    judge: Judge | None
    translator: Translator
    fingerprint: str
    pending: list[ShardPlan]
    finished: list[ShardPlan]

    @property
    def num_chains(self) -> int:
        return sum(shard.num_chains for shard in [*self.pending, *self.finished])

    @property
    def num_done(self) -> int:
        return sum(shard.num_done for shard in [*self.pending, *self.finished])

    def first_prompt(self) -> Prompt | None:
        """The first usable prompt, for a person to look at."""
        for shard in [*self.pending, *self.finished]:
            found = next((item for item in shard.shard.prompts() if isinstance(item, Prompt)), None)
            if found:
                return found
        return None


def make_plan(config: GenerateConfig) -> Plan:
    """Check everything and claim the output folder. Raises InvalidInput naming what cannot be used."""
    shards = [PromptShard.open(path) for path in _selected(list_shards(config.input.path), config.input.shards)]
    spec = POLICIES[config.policy.name]
    rules = _rules(config.policy)
    config.policy.accept_rate = rules.accept_rate if config.policy.name == "random" else None
    for role in sorted(spec.roles):
        _check_model(role, config.engine(role))
        _check_speculation(f"{role}.speculative", config.engine(role))
    formats = {role: _load_format(config, role) for role in Role if role in spec.roles}
    case = _vocabulary_case(formats)
    judge = Judge(_question(config), formats[Role.base]) if spec.grades else None
    translator = _translator(config, formats, judge, case)
    output_dir = Path(config.output_dir)
    fingerprint = claim_output(output_dir, fingerprint_fields(config, spec.roles), config)
    plans = [_shard_plan(shard, output_dir, config) for shard in shards]
    pending = [plan for plan in plans if has_work(plan, config)]
    finished = [plan for plan in plans if plan not in pending]
    policy = partial(spec.coroutine, rules=rules)
    return Plan(config, spec, policy, formats, case, judge, translator, fingerprint, pending, finished)


def open_chains(
    plan: Plan, shard: ShardPlan, rejects: list[Reject], begun: Collection[ChainKey] = ()
) -> Iterator[Chain]:
    """The shard's chains that are neither done nor begun, in order; unusable rows are appended to `rejects`."""
    for item in shard.shard.prompts(plan.config.limit):
        if isinstance(item, Reject):
            _reject(plan, shard, rejects, item)
            continue
        for sample_index in range(plan.config.samples_per_prompt):
            key = item.prompt_id, sample_index
            if key in shard.done or key in begun:
                continue
            try:
                yield plan.translator.open(item, sample_index)
            except InvalidInput as error:
                _reject(plan, shard, rejects, _prompt_reject(item, shard, str(error)))
                break


def prompts_of(plan: Plan, shard: ShardPlan, prompt_ids: Collection[str]) -> dict[str, Prompt]:
    """These prompts of the shard, as far as the limit goes."""
    found: dict[str, Prompt] = {}
    for item in shard.shard.prompts(plan.config.limit):
        if len(found) == len(prompt_ids):
            break
        if isinstance(item, Prompt) and item.prompt_id in prompt_ids:
            found[item.prompt_id] = item
    return found


def _reject(plan: Plan, shard: ShardPlan, rejects: list[Reject], reject: Reject) -> None:
    rejects.append(reject)
    shard.num_chains -= plan.config.samples_per_prompt


def _prompt_reject(prompt: Prompt, shard: ShardPlan, reason: str) -> Reject:
    return Reject(
        prompt_id=prompt.prompt_id, sample_index=None, file=shard.shard.path.name, row=prompt.row, reason=reason
    )


def _selected(shards: Sequence[Path], indices: list[int] | None) -> list[Path]:
    if indices is None:
        return list(shards)
    if beyond := [index for index in indices if index >= len(shards)]:
        raise InvalidInput(f"input.shards: {beyond} are out of range; allowed: 0 to {len(shards) - 1}")
    return [shards[index] for index in sorted(set(indices))]


def _rules(policy: PolicyConfig) -> Rules:
    rate = policy.accept_rate
    if policy.name == "random" and rate is None:
        assert policy.match_run is not None
        rate = acceptance_rate(Path(policy.match_run))
    return Rules(
        threshold=policy.threshold,
        first_n_base_steps=policy.first_n_base_steps,
        accept_rate=0.0 if rate is None else rate,
        answer_role=policy.answer_role,
    )


def _check_model(role: Role, engine: EngineConfig) -> None:
    """What a model's folder must hold, so that nothing is missed only after minutes of loading. Raises InvalidInput.

    Of a name that is no folder, the hub's cache knows.
    """
    folder = Path(engine.model)
    if not folder.is_dir():
        return
    settings = _model_settings(f"{role}.model", folder)
    try:
        has_own_code = "auto_map" in settings and not is_known_architecture(engine.model)
    except TypeError as error:
        raise InvalidInput(f"{role}.model: {folder} has no readable config.json: {error}") from error
    if has_own_code and not engine.trust_remote_code:
        raise InvalidInput(
            f"{role}.model: {folder} brings code of its own (auto_map in config.json), which would run here; "
            f"allowed: with {role}.trust_remote_code=true, if you trust it"
        )
    if not any((folder / name).is_file() for name in TOKENIZERS):  # transformers would make up an empty one
        raise InvalidInput(f"{role}.model: {folder} holds no tokenizer; allowed: a file named {', '.join(TOKENIZERS)}")
    _check_weights(f"{role}.model", folder, engine)


def _check_speculation(path: str, engine: EngineConfig) -> None:
    """The same of the model that guesses tokens, and that it has as many as the model that checks them.

    Raises InvalidInput. It needs no tokenizer of its own.
    """
    speculative = engine.speculative
    folder = Path(speculative.model or "")
    if speculative.model is None or not folder.is_dir():
        return
    settings = _model_settings(f"{path}.model", folder)
    _check_weights(f"{path}.model", folder, engine)
    target = Path(engine.model)
    if speculative.method != "draft_model" or speculative.args.get("use_heterogeneous_vocab") or not target.is_dir():
        return
    guessed, checked = _vocabulary_size(settings), _vocabulary_size(_model_settings(path, target))
    if guessed != checked:
        raise InvalidInput(
            f"{path}.model: {folder} has a vocabulary of {guessed}, {target} one of {checked}; allowed: the same size, "
            f"or {path}.args={{use_heterogeneous_vocab: true}}"
        )


def _model_settings(path: str, folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path}: {folder} has no readable config.json: {error}") from error
    if not isinstance(settings, dict):
        raise InvalidInput(f"{path}: {folder} has no readable config.json: it holds no object")
    return settings


def _vocabulary_size(settings: dict[str, Any]) -> Any:
    """Of the text model, where there are others."""
    text = settings.get("text_config")
    return (text if isinstance(text, dict) else settings).get("vocab_size")


def _check_weights(path: str, folder: Path, engine: EngineConfig) -> None:
    has_weights = any(next(folder.glob(pattern), None) for pattern in WEIGHTS)
    if not has_weights and engine.vllm_args.get("load_format") != "dummy":
        raise InvalidInput(f"{path}: {folder} holds no weights; allowed: files named {', '.join(WEIGHTS)}")


def _load_format(config: GenerateConfig, role: Role) -> ChatFormat:
    engine = config.engine(role)
    return load_chat_format(role, engine.model, engine.chat.options(), engine.trust_remote_code)


def _vocabulary_case(formats: dict[Role, ChatFormat]) -> VocabularyCase | None:
    if len(formats) < 2:
        return None
    case = compare_vocabularies(formats[Role.draft], formats[Role.base])
    if case is VocabularyCase.different:
        for chat in formats.values():
            check_round_trip(chat)
    return case


def _question(config: GenerateConfig) -> Question:
    judge = config.judge
    return Question(
        question=judge.question,
        reply_opening=judge.reply_opening,
        reading=judge.reading,
        mass_floor=judge.mass_floor,
        labels=tuple(judge.labels),
    )


def _translator(
    config: GenerateConfig, formats: dict[Role, ChatFormat], judge: Judge | None, case: VocabularyCase | None
) -> Translator:
    voices = {
        role: Voice(
            format=chat,
            window=config.engine(role).max_model_len,
            steps=_decoding(config.sampling.draft if role is Role.draft else config.sampling.base),
            answers=_decoding(config.sampling.answer),
        )
        for role, chat in formats.items()
    }
    return Translator(
        voices, judge, config.budgets.limits(), config.budgets.max_answer_tokens, config.seed, config.seeded, case
    )


def _decoding(config: DecodingConfig) -> Decoding:
    return Decoding(temperature=config.temperature, top_p=config.top_p, top_k=config.top_k)


def _shard_plan(shard: PromptShard, output_dir: Path, config: GenerateConfig) -> ShardPlan:
    paths = ShardPaths(output_dir / shard.name)
    source = file_identity(shard.path)
    check_source(paths, source)
    rows = min(shard.num_rows, config.limit or shard.num_rows)
    return ShardPlan(shard, paths, source, paths.done_keys(), rows * config.samples_per_prompt)


def has_work(plan: ShardPlan, config: GenerateConfig) -> bool:
    """Whether any chain is neither done nor known to be impossible, or an unusable row is not written down yet."""
    unusable = rejected_rows(plan.paths)
    return any(
        isinstance(item, Reject) or (item.prompt_id, sample_index) not in plan.done
        for item in plan.shard.prompts(config.limit)
        if item.row not in unusable
        for sample_index in range(config.samples_per_prompt)
    )
