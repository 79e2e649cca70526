"""Speculative decoding inside an engine (docs/speculative.md): rows, grades and statistics on the toy pair."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.compose import compose_generate
from specreason_batch.chat import load_chat_format
from specreason_batch.clock import WallClock
from specreason_batch.config import ChatConfig, EngineConfig, GenerateConfig, SpeculativeConfig
from specreason_batch.engine import Engine, Speculating, SpeculationStats
from specreason_batch.judge import Judge
from specreason_batch.plan import make_plan
from specreason_batch.probe import probe_cache, probe_grade
from specreason_batch.store.manifest import fingerprint_fields
from specreason_batch.summary import summarise
from specreason_batch.types import Completion, FinishReason, InvalidInput, Role, Sampling
from specreason_batch.vllm_engine import VllmEngine, check_platform, llm_arguments
from specreason_batch.vllm_speculation import speculative_config
from tests.conftest import TOY, toy_engine_config
from tests.support.configs import make_config
from tests.support.near import same
from tests.test_toy import read, run
from tests.test_vllm_contract import GREEDY, HOT, QUESTION, ask, complete

METHODS: Mapping[str, dict[str, Any]] = {
    "draft_model": {"method": "draft_model", "model": str(TOY / "draft"), "num_speculative_tokens": 3},
    "ngram": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2, "prompt_lookup_max": 4},
}
CHAINS = 24


@pytest.fixture(scope="module")
def openings() -> list[list[int]]:
    chat = load_chat_format(Role.base, str(TOY / "base"), ChatConfig().options())
    prompts = pl.read_parquet(TOY / "prompts" / "heldout.parquet")["prompt"].to_list()
    return [chat.opening(prompt) for prompt in prompts[:CHAINS]]


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def base(method: str, toy_clock: WallClock) -> Iterator[VllmEngine]:
    """The toy base, speculating."""
    engine = VllmEngine(speculating(Role.base, **METHODS[method]), clock=toy_clock)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def greedy_texts(toy_engines: dict[Role, Engine], openings: list[list[int]]) -> dict[str, tuple[int, ...]]:
    """Of the toy base without speculation."""
    return texts(toy_engines[Role.base], openings, GREEDY)


@pytest.fixture(scope="module")
def engines(base: VllmEngine, toy_engines: dict[Role, Engine]) -> dict[Role, Engine]:
    return {Role.base: base, Role.draft: toy_engines[Role.draft]}


def speculating(role: Role, **choices: Any) -> EngineConfig:
    return toy_engine_config(role, speculative=SpeculativeConfig(**choices))


def texts(engine: Engine, openings: list[list[int]], sampling: Sampling) -> dict[str, tuple[int, ...]]:
    """96 tokens after each opening, with a seed each."""
    asked = [ask(opening, str(n), 96, sampling, seed=n) for n, opening in enumerate(openings)]
    return {id: completion.token_ids for id, completion in complete(engine, *asked).items()}


def num_equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    return sum(one[id] == other[id] for id in one)


# --- the engine ---


def test_greedy_completions_are_those_without_speculation(
    base: VllmEngine, greedy_texts: dict[str, tuple[int, ...]], openings: list[list[int]]
) -> None:
    assert num_equal(texts(base, openings, GREEDY), greedy_texts) == CHAINS


@pytest.mark.parametrize("method", ["ngram"], indirect=True)
def test_numba_leaves_torch_its_threads(base: VllmEngine, openings: list[list[int]]) -> None:
    """In OpenMP's it would set their number for both (docs/speculative.md)."""
    complete(base, ask(openings[0], max_tokens=8))
    from numba import threading_layer  # imported before the first engine it would keep all from starting

    assert threading_layer() == "workqueue"


def test_seeded_completions_are_reproducible_in_any_batch(base: VllmEngine, openings: list[list[int]]) -> None:
    together = texts(base, openings, HOT)
    assert texts(base, openings, HOT) == together
    alone = complete(base, ask(openings[5], "5", 96, HOT, seed=5))["5"].token_ids
    assert alone == together["5"]
    assert len({text[-8:] for text in together.values()}) > 1


SAMPLINGS = (Sampling(temperature=1.5), Sampling(temperature=2.0, top_p=0.8), Sampling(temperature=2.0, top_k=2))


@pytest.fixture(scope="module")
def usual_shares(toy_engines: dict[Role, Engine], openings: list[list[int]]) -> dict[Sampling, dict[int, float]]:
    """Of the toy base without speculation."""
    return {sampling: shares(toy_engines[Role.base], openings[0], sampling) for sampling in SAMPLINGS}


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_sampled_tokens_have_the_distribution_that_they_have_without_speculation(
    sampling: Sampling, base: VllmEngine, usual_shares: dict[Sampling, dict[int, float]], openings: list[list[int]]
) -> None:
    """Temperature, top_p and top_k must reach the tokens that are guessed: they once did not (docs/speculative.md)."""
    assert distance(shares(base, openings[0], sampling), usual_shares[sampling]) < 0.06


def shares(engine: Engine, prompt: list[int], sampling: Sampling) -> dict[int, float]:
    """How often each token comes fourth."""
    asked = [ask(prompt, str(n), 4, sampling, seed=n) for n in range(400)]
    tokens = [completion.token_ids[-1] for completion in complete(engine, *asked).values()]
    return {token: tokens.count(token) / len(tokens) for token in set(tokens)}


def distance(one: dict[int, float], other: dict[int, float]) -> float:
    """Total variation, 0-1."""
    return sum(abs(one.get(token, 0.0) - other.get(token, 0.0)) for token in one.keys() | other.keys()) / 2


def test_stops_windows_and_single_tokens_are_kept(
    base: VllmEngine, toy_engines: dict[Role, Engine], openings: list[list[int]]
) -> None:
    plain = toy_engines[Role.base]
    text = complete(plain, ask(openings[0], max_tokens=40))["a"].token_ids
    stopping = Sampling(temperature=0.0, stop_token_ids=(text[11],))
    whole = (openings[0] * 40)[: base.info.max_model_len - 12]
    asked = [
        ask(openings[0], "stop", 40, stopping, seed=3),
        ask(openings[0], "one", 1),
        ask(openings[0], "five", 5, HOT, seed=4),
        ask(whole, "window", 12),
    ]
    found, wanted = complete(base, *asked), complete(plain, *asked)
    assert found["stop"].token_ids == wanted["stop"].token_ids == text[: text.index(text[11]) + 1]
    assert found["stop"].finish_reason is FinishReason.stop
    assert {id: len(completion.token_ids) for id, completion in found.items()} == {
        "stop": len(wanted["stop"].token_ids),
        "one": 1,
        "five": 5,
        "window": 12,
    }


def test_aborted_requests_leave_the_others_as_they_were(base: VllmEngine, openings: list[list[int]]) -> None:
    alone = complete(base, ask(openings[1], "kept", 64))["kept"].token_ids
    base.submit([ask(opening, f"gone {n}", 200) for n, opening in enumerate(openings)])
    base.submit([ask(openings[1], "kept", 64)])
    done = [completion for _ in range(4) for completion in base.poll(0.1)]
    base.abort([f"gone {n}" for n in range(CHAINS)])
    while base.num_outstanding:
        done += base.poll(0.1)
    assert [(completion.request_id, completion.token_ids) for completion in done] == [("kept", alone)]


# --- grades ---


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(QUESTION, load_chat_format(Role.base, str(TOY / "base"), ChatConfig().options()))


def test_grades_are_those_without_speculation(
    base: VllmEngine, toy_engines: dict[Role, Engine], judge: Judge, openings: list[list[int]]
) -> None:
    """Beside requests that decode. What is known of a digit is right; one that is not among the 20 likeliest is 0."""
    labels = Sampling(temperature=0.0, logprob_token_ids=judge.label_ids)
    asked = [ask([*opening, *judge.turn], f"grade {n}", 1, labels) for n, opening in enumerate(openings)]
    asked += [ask(opening, f"text {n}", 24) for n, opening in enumerate(openings)]
    found, wanted = complete(base, *asked), complete(toy_engines[Role.base], *asked)
    for n in range(CHAINS):
        grades = [judge.read(done[f"grade {n}"].logprobs, done[f"grade {n}"].token_ids[0]) for done in (found, wanted)]
        assert grades[0].mass <= grades[1].mass + 1e-4
        known = [(one, other) for one, other in zip(grades[0].probs, grades[1].probs, strict=True) if one]
        assert known
        assert all(abs(one - other) < 1e-3 for one, other in known)


def test_the_probes_pass(base: VllmEngine, judge: Judge, openings: list[list[int]]) -> None:
    assert probe_grade(base, judge, openings[0]).mass > 0
    assert probe_cache(base, openings[0]).hits


def test_an_engine_whose_grades_suffer_from_decoding_beside_them_is_refused(
    base: VllmEngine, judge: Judge, openings: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the start-up probe is for: the grade beside a decoding request is another one."""
    read, decoding = base._completion, []

    def disturbed(output: Any) -> Completion:
        completion = read(output)
        decoding.append(output.request_id == "probe-decoding")
        if not (any(decoding) or len(decoding) > 1) or not completion.logprobs:
            return completion
        return replace(completion, logprobs={id: value - 1.0 for id, value in completion.logprobs.items()})

    monkeypatch.setattr(base, "_completion", disturbed)
    with pytest.raises(InvalidInput, match="its grades cannot be trusted"):
        probe_grade(base, judge, openings[0])


# --- statistics ---


def test_an_engine_counts_what_it_guessed(
    base: VllmEngine, toy_engines: dict[Role, Engine], method: str, openings: list[list[int]]
) -> None:
    before = base.speculation
    done = complete(base, *(ask(opening, str(n), 96) for n, opening in enumerate(openings)))
    after = base.speculation
    assert before is not None
    assert after is not None
    num_tokens = sum(len(completion.token_ids) for completion in done.values())
    num_accepted = after.num_accepted_tokens - before.num_accepted_tokens
    num_drafts = after.num_drafts - before.num_drafts
    assert 0 < num_accepted < num_tokens
    assert num_accepted <= after.num_drafted_tokens - before.num_drafted_tokens <= 3 * num_drafts
    if method == "draft_model":  # each pass but the first of a request guesses: it adds a token to what is accepted
        assert num_tokens - CHAINS <= num_accepted + num_drafts <= num_tokens + 3 * CHAINS
    plain = toy_engines[Role.base]
    assert isinstance(plain, Speculating)
    assert plain.speculation is None


def test_statistics_add_up_and_read_as_a_line() -> None:
    one = SpeculationStats(num_drafts=10, num_drafted_tokens=30, num_accepted_tokens=15)
    assert one + SpeculationStats() == one
    assert str(one + one) == "50.0% of 60 guessed tokens accepted, 2.50 tokens a pass"
    assert str(SpeculationStats()) == "nothing was guessed"


# --- runs ---

POLICIES = {
    "specreason": [],
    "base_only": [],
    "base_direct": [],
    "random": ["policy.accept_rate=0.7"],
    "draft_only": [],
}


def greedy(policy: str) -> list[str]:
    return ["limit=24", "sampling=greedy", f"policy={policy}", *POLICIES[policy]]


@pytest.fixture(scope="module")
def usual_runs(toy_engines: dict[Role, Engine], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A greedy run of each policy without speculation."""
    place = tmp_path_factory.mktemp("usual")
    return {policy: run(toy_engines, place / policy, *greedy(policy)) for policy in POLICIES}


@pytest.mark.parametrize("policy", ["specreason", "base_only", "base_direct", "random"])
def test_greedy_rows_are_those_without_speculation(
    policy: str, engines: dict[Role, Engine], usual_runs: dict[str, Path], tmp_path: Path
) -> None:
    """Every text, token, score and decision."""
    found = run(engines, tmp_path, *greedy(policy))
    for kind in ("chains", "steps"):
        assert same(read(found, kind), read(usual_runs[policy], kind))


def test_speculation_in_the_draft_engine_changes_no_greedy_row(
    usual_runs: dict[str, Path], toy_clock: WallClock, tmp_path: Path
) -> None:
    engine = VllmEngine(speculating(Role.draft, **METHODS["ngram"]), clock=toy_clock)
    try:
        found = run({Role.draft: engine}, tmp_path, *greedy("draft_only"))
        assert engine.speculation is not None
        assert engine.speculation.num_drafts > 0
    finally:
        engine.close()
    wanted = usual_runs["draft_only"]
    assert all(same(read(found, kind), read(wanted, kind)) for kind in ("chains", "steps"))


SAMPLED = ["limit=100", "sampling=paper", "policy=specreason"]


@pytest.fixture(scope="module")
def usual_accuracy(toy_engines: dict[Role, Engine], tmp_path_factory: pytest.TempPathFactory) -> float:
    return accuracy(run(toy_engines, tmp_path_factory.mktemp("sampled"), *SAMPLED))


def test_sampled_chains_are_as_good_as_without_speculation(
    engines: dict[Role, Engine], usual_accuracy: float, tmp_path: Path
) -> None:
    """Other random numbers are drawn, from the same distribution: two runs of 100 chains, within 3 standard errors."""
    found = accuracy(run(engines, tmp_path, *SAMPLED))
    error = (usual_accuracy * (1 - usual_accuracy) * 2 / 100) ** 0.5
    assert abs(found - usual_accuracy) < 3 * error
    assert usual_accuracy > 0.5


def accuracy(output: Path) -> float:
    summary = summarise(output)
    assert summary is not None
    assert summary.accuracy is not None
    return summary.accuracy


# --- heads that are trained for it ---


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An EAGLE head for the toy base, of random weights: it guesses badly, which must not be seen in any row."""
    folder = tmp_path_factory.mktemp("eagle")
    settings = json.loads((TOY / "base" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 1}))
    weights = load_file(TOY / "base" / "model.safetensors")
    layer = {
        name.removeprefix("model."): value
        for name, value in weights.items()
        if name.startswith("model.layers.0.") and not name.endswith(("input_layernorm.weight", ".bias"))
    }
    torch.manual_seed(0)
    fc = torch.randn(settings["hidden_size"], 2 * settings["hidden_size"]) * 0.05
    save_file({**layer, "fc.weight": fc.to(next(iter(layer.values())).dtype)}, folder / "model.safetensors")
    return folder


def test_an_untrained_eagle_head_changes_no_greedy_row(
    head: Path, greedy_texts: dict[str, tuple[int, ...]], judge: Judge, openings: list[list[int]]
) -> None:
    engine = VllmEngine(speculating(Role.base, method="eagle", model=str(head), num_speculative_tokens=2))
    try:
        assert num_equal(texts(engine, openings, GREEDY), greedy_texts) == CHAINS
        assert probe_grade(engine, judge, openings[0]).mass > 0
        assert engine.speculation is not None
        assert engine.speculation.num_drafts > 0
    finally:
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["draft_model"], indirect=True)
def test_an_engine_in_processes_of_its_own_speculates_too(
    openings: list[list[int]], base: VllmEngine, method: str
) -> None:
    engine = VllmEngine(replace(speculating(Role.base, **METHODS[method]), in_process=False))
    try:
        assert texts(engine, openings, HOT) == texts(base, openings, HOT)
        assert engine.speculation is not None
        assert engine.speculation.num_drafts > 0
    finally:
        engine.close()


# --- what it takes from memory ---


def test_a_guessing_model_takes_its_part_of_the_cache(
    base: VllmEngine, method: str, toy_engines: dict[Role, Engine]
) -> None:
    """Keys and values of both models lie in one pool: 10 layers of 96 for the base's, 2 of 64 for the guesser's."""
    whole = toy_engines[Role.base].info.kv_capacity_tokens
    expected = whole * (10 * 96) / (10 * 96 + 2 * 64) if method == "draft_model" else whole
    assert base.info.kv_capacity_tokens == pytest.approx(expected, rel=0.01)


def test_a_whole_cache_holds_a_prompt_of_its_capacity_beside_a_guessing_model(openings: list[list[int]]) -> None:
    """As without one (tests/test_vllm_contract.py), but for the room of the 3 tokens that are guessed ahead.

    After a prompt as long as the cache nothing earlier is left; after one that leaves a block, that block.
    """
    config = replace(speculating(Role.base, **METHODS["draft_model"]), vllm_args={"num_gpu_blocks_override": 33})
    engine = VllmEngine(config)
    try:
        capacity = engine.info.kv_capacity_tokens
        left = []
        for length in (capacity, capacity - 32 - 3):
            complete(engine, ask([7] * 65, "early", 1))
            complete(engine, ask((openings[0] * 40)[: length - 1], "long", 1))
            left.append(complete(engine, ask([7] * 65, "again", 1))["again"].num_cached_tokens)
        assert left == [0, 32]
    finally:
        engine.close()


# --- configuration ---

SPECULATION = "speculative@base.speculative"


def test_the_paper_s_method_is_one_word() -> None:
    """SpecReason+Decode: the draft writes tokens ahead inside the base."""
    config = compose_generate([f"{SPECULATION}=draft_model"])
    assert llm_arguments(config.base)["speculative_config"] == METHODS["draft_model"] | {"model": config.draft.model}
    assert "speculative_config" not in llm_arguments(config.draft)


def test_vllm_gets_what_it_has_names_for() -> None:
    choices = SpeculativeConfig(method="eagle3", model="head", num_speculative_tokens=5, args={"quantization": "fp8"})
    assert speculative_config(toy_engine_config(Role.base, speculative=choices)) == {
        "method": "eagle3",
        "model": "head",
        "num_speculative_tokens": 5,
        "quantization": "fp8",
    }
    found = compose_generate([f"{SPECULATION}=ngram", "speculative@draft.speculative=ngram"])
    assert speculative_config(found.base) == speculative_config(found.draft) == METHODS["ngram"]


REFUSED = [
    (["base.speculative.method=crystal_ball"], "base.speculative.method: 'crystal_ball' is unknown; allowed: none, "),
    ([f"{SPECULATION}=ngram", "base.speculative.num_speculative_tokens=0"], "allowed: at least 1"),
    ([f"{SPECULATION}=ngram", "base.speculative.num_speculative_tokens=null"], "not set; ngram needs at least 1"),
    ([f"{SPECULATION}=ngram", "base.speculative.prompt_lookup_max=1"], "prompt_lookup_max: 1 is out of range"),
    ([f"{SPECULATION}=ngram", "base.speculative.prompt_lookup_min=0"], "prompt_lookup_min: 0 is out of range"),
    ([f"{SPECULATION}=ngram", "base.speculative.model=x"], "model: x does nothing with method ngram; allowed: null"),
    (["base.speculative.num_speculative_tokens=3"], "num_speculative_tokens: 3 does nothing with method none"),
    ([f"{SPECULATION}=draft_model", "base.speculative.prompt_lookup_min=2"], "does nothing with method draft_model"),
    ([f"{SPECULATION}=eagle"], "base.speculative.model: None is no folder; eagle needs a model that guesses"),
    (
        [f"{SPECULATION}=ngram", "+base.speculative.args.model=x"],
        "base.speculative.args: model have fields of their own",
    ),
    (
        [f"{SPECULATION}=ngram", "+base.vllm_args.speculative_config.method=ngram"],
        "base.vllm_args.speculative_config: given beside base.speculative.method; allowed: one of them",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_what_makes_no_sense_is_refused_by_name(overrides: list[str], message: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        compose_generate(overrides)
    assert message in str(raised.value)


def test_a_worker_class_of_the_user_s_is_refused_where_a_cpu_needs_ours() -> None:
    config = speculating(Role.base, **METHODS["ngram"])
    with pytest.raises(InvalidInput, match=r"worker_extension_cls: 'mine.Worker' stands where"):
        check_platform(replace(config, vllm_args={"worker_extension_cls": "mine.Worker"}))


# --- before a model loads ---


def with_speculation(place: Path, **choices: Any) -> GenerateConfig:
    config = make_config(place)
    config.base = replace(config.base, speculative=SpeculativeConfig(**choices))
    return config


def write_guesser(folder: Path, place: Path, **settings: Any) -> str:
    shutil.copytree(place / "models" / "draft", folder)
    if settings:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return str(folder)


def test_a_guessing_model_of_another_vocabulary_is_refused_before_models_load(place: Path) -> None:
    model = write_guesser(place / "other", place, vocab_size=999)
    with pytest.raises(InvalidInput, match=r"base.speculative.model: .* has a vocabulary of 999, .* one of None"):
        make_plan(with_speculation(place, method="draft_model", model=model, num_speculative_tokens=3))
    args = {"use_heterogeneous_vocab": True}
    make_plan(with_speculation(place, method="draft_model", model=model, num_speculative_tokens=3, args=args))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_guessing_model_without_its_files_is_refused_before_models_load(place: Path, file: str) -> None:
    model = write_guesser(place / "torn", place)
    (Path(model) / file).unlink()
    with pytest.raises(InvalidInput, match=r"base.speculative.model: .* (no readable config.json|holds no weights)"):
        make_plan(with_speculation(place, method="draft_model", model=model, num_speculative_tokens=3))


def fields(config: GenerateConfig) -> dict[str, Any]:
    return fingerprint_fields(config, frozenset(Role))


def test_without_speculation_the_fingerprint_is_what_it_was(place: Path) -> None:
    assert not [name for name in fields(make_config(place)) if "speculative" in name]


def test_a_run_s_fingerprint_knows_how_tokens_were_guessed_and_by_what(place: Path) -> None:
    choices = {"method": "draft_model", "model": write_guesser(place / "guesser", place), "num_speculative_tokens": 3}
    before = fields(with_speculation(place, **choices))
    assert before["base.speculative.method"] == "draft_model"
    assert before["base.speculative.model.config.json"] == before["draft.model.config.json"]
    assert fields(with_speculation(place, **choices | {"num_speculative_tokens": 4})) != before
    moved = shutil.copytree(place / "guesser", place / "moved")
    assert fields(with_speculation(place, **choices | {"model": str(moved)})) == before
    (moved / "config.json").write_text("{}")
    assert fields(with_speculation(place, **choices | {"model": str(moved)})) != before
