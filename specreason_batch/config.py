"""The configuration's schema: every choice a user makes, typed, with its allowed range.

Owns: fields, defaults, ranges. Values live in conf/*.yaml; `jobs/` composes them and converts once, with
`OmegaConf.to_object`, which validates. Does not know: Hydra, what the values do.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import MISSING

from specreason_batch.chain import Limits
from specreason_batch.chat import ChatOptions
from specreason_batch.judge import DIGITS, Reading
from specreason_batch.types import InvalidInput, Role

POLICY_NAMES = ("specreason", "base_only", "base_direct", "draft_only", "random")
SCHEDULE_NAMES = ("lockstep", "overlapped", "continuous", "waves")
SPECULATION_METHODS = ("none", "draft_model", "ngram", "eagle", "eagle3")  # others: docs/speculative.md

# Fields that cannot change rows: a run may be continued with other values. Everything else is part of the fingerprint.
SECTIONS = (
    *("input", "draft", "base", "sampling", "policy", "judge", "budgets", "schedule", "parts"),
    *("checkpoint", "lease", "recovery", "log"),
)

NOT_IN_FINGERPRINT = (
    "name",
    "output_dir",
    "limit",
    "input.shards",
    "schedule",
    "parts",
    "checkpoint",
    "lease",
    "recovery",
    "log",
    *(
        f"{role}.{name}"
        for role in Role
        for name in (
            "tensor_parallel_size",
            "device_ids",
            "kv_cache_gib",
            "gpu_memory_utilization",
            "kv_offload_gib",
            "cpu_cores",
            "in_process",
            "engine_timeout_seconds",
        )
    ),
)


@dataclass(kw_only=True)
class ChatConfig:
    """A role's chat format, where its tokenizer does not say it."""

    think_open: str = "<think>"
    think_close: str = "</think>"
    template: str | None = None  # a Jinja chat template in place of the tokenizer's own
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # passed to the template
    system_prompt: str | None = None

    def problems(self, path: str) -> Iterator[str]:
        yield from _nonempty(f"{path}.think_open", self.think_open)
        yield from _nonempty(f"{path}.think_close", self.think_close)

    def options(self) -> ChatOptions:
        return ChatOptions(**asdict(self))


@dataclass(kw_only=True)
class SpeculativeConfig:
    """Speculative decoding inside an engine: several tokens are guessed cheaply and checked by its model in one pass.

    docs/speculative.md.
    """

    method: str = "none"  # one of SPECULATION_METHODS
    model: str | None = None  # the guessing model's folder; none and ngram have none
    num_speculative_tokens: int | None = None  # guessed at a time
    prompt_lookup_min: int | None = None  # ngram: the shortest run of tokens that is looked up; None: vLLM's default
    prompt_lookup_max: int | None = None  # ngram: the longest; None: vLLM's default
    args: dict[str, Any] = field(default_factory=dict)  # anything else that vLLM's speculative_config takes

    @property
    def is_on(self) -> bool:
        return self.method != "none"

    def problems(self, path: str) -> Iterator[str]:
        yield from _one_of(f"{path}.method", self.method, SPECULATION_METHODS)
        yield from _at_least(f"{path}.num_speculative_tokens", self.num_speculative_tokens, 1)
        yield from _at_least(f"{path}.prompt_lookup_min", self.prompt_lookup_min, 1)
        yield from _at_least(f"{path}.prompt_lookup_max", self.prompt_lookup_max, self.prompt_lookup_min or 1)
        yield from self._idle_problems(path)
        if self.is_on and self.num_speculative_tokens is None:
            yield f"{path}.num_speculative_tokens: not set; {self.method} needs at least 1"
        if self.is_on and self.method != "ngram" and not self.model:
            yield f"{path}.model: {self.model!r} is no folder; {self.method} needs a model that guesses"
        if named := sorted(self.args.keys() & vars(self).keys()):
            yield f"{path}.args: {', '.join(named)} have fields of their own; allowed: what has none"

    def _idle_problems(self, path: str) -> Iterator[str]:
        """Values that the method does not look at."""
        lookups = ("prompt_lookup_min", "prompt_lookup_max")
        idle = {"none": ("model", "num_speculative_tokens", *lookups, "args"), "ngram": ("model",)}
        for name in idle.get(self.method, lookups):
            if value := getattr(self, name):
                yield f"{path}.{name}: {value} does nothing with method {self.method}; allowed: null"


@dataclass(kw_only=True)
class EngineConfig:
    """One of the two engines."""

    model: str = MISSING  # a local folder, or a name that the hub's cache holds
    dtype: str = "auto"
    max_model_len: int = 16384  # tokens: the window
    tensor_parallel_size: int = 1
    device_ids: list[int] | None = None  # None: all that the job sees
    kv_cache_gib: int | None = None  # GiB for its KV cache; None: by gpu_memory_utilization (CPU: 4)
    gpu_memory_utilization: float | None = None  # share of a GPU's memory, (0, 1]; None: vLLM's default
    kv_offload_gib: int | None = None  # GiB of host memory for evicted KV, in all; GPUs only; None: none
    cpu_cores: list[int] | None = None  # cores that a CPU engine is bound to; None: see run.started_engines
    block_size: int | None = None  # tokens a KV block; None: 32 on CPU, vLLM's default on GPU
    in_process: bool = False  # run the engine inside this process: quick to start, one engine works at a time
    engine_timeout_seconds: float = 600.0  # no output for this long counts as a dead engine
    trust_remote_code: bool = False
    vllm_args: dict[str, Any] = field(default_factory=dict)  # anything else that vllm.LLM takes
    speculative: SpeculativeConfig = field(default_factory=SpeculativeConfig)
    chat: ChatConfig = MISSING

    def problems(self, path: str) -> Iterator[str]:
        yield from _nonempty(f"{path}.model", self.model)
        yield from _at_least(f"{path}.max_model_len", self.max_model_len, 16)
        yield from _at_least(f"{path}.tensor_parallel_size", self.tensor_parallel_size, 1)
        yield from _at_least(f"{path}.kv_cache_gib", self.kv_cache_gib, 1)
        yield from _within(f"{path}.gpu_memory_utilization", self.gpu_memory_utilization, 0.0, 1.0, open_low=True)
        yield from _at_least(f"{path}.kv_offload_gib", self.kv_offload_gib, 1)
        yield from self._core_problems(f"{path}.cpu_cores")
        yield from _at_least(f"{path}.block_size", self.block_size, 1)
        yield from _at_least(f"{path}.engine_timeout_seconds", self.engine_timeout_seconds, 1)
        yield from self.speculative.problems(f"{path}.speculative")
        if self.speculative.is_on and self.vllm_args.get("speculative_config"):
            yield f"{path}.vllm_args.speculative_config: given beside {path}.speculative.method; allowed: one of them"
        yield from self.chat.problems(f"{path}.chat")

    def _core_problems(self, path: str) -> Iterator[str]:
        cores = self.cpu_cores
        if cores is None:
            return
        if not cores or len(set(cores)) < len(cores) or min(cores) < 0:
            yield f"{path}: {cores} is out of range; allowed: one or more different core numbers, from 0"
        elif len(cores) < self.tensor_parallel_size:
            workers = self.tensor_parallel_size
            yield f"{path}: {cores} is fewer than tensor_parallel_size={workers}; allowed: at least a core each"
        if self.in_process:
            yield f"{path}: {cores} does not go with in_process=true, which binds nothing; allowed: null"


@dataclass(kw_only=True)
class DecodingConfig:
    """How one kind of text is sampled."""

    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0  # 0: all

    def problems(self, path: str) -> Iterator[str]:
        yield from _within(f"{path}.temperature", self.temperature, 0.0, 5.0)
        if 0.0 < self.temperature < 0.01:
            yield f"{path}.temperature: {self.temperature} is neither greedy (0) nor at least 0.01"
        yield from _within(f"{path}.top_p", self.top_p, 0.0, 1.0, open_low=True)
        yield from _at_least(f"{path}.top_k", self.top_k, 0)


@dataclass(kw_only=True)
class SamplingConfig:
    """Sampling by role for steps, and for answers."""

    draft: DecodingConfig = MISSING
    base: DecodingConfig = MISSING
    answer: DecodingConfig = MISSING

    def problems(self, path: str) -> Iterator[str]:
        for name in ("draft", "base", "answer"):
            yield from getattr(self, name).problems(f"{path}.{name}")


@dataclass(kw_only=True)
class PolicyConfig:
    """Who writes, and what is kept."""

    name: str = MISSING  # one of POLICY_NAMES
    threshold: float = 7.0  # on the reading's scale: 0-9 (yes_no: 0-1)
    first_n_base_steps: int = 0
    accept_rate: float | None = None  # random: 0-1; None: accepted/graded steps of `match_run`
    match_run: str | None = None  # random: the output folder of a finished run to match
    answer_role: Role = Role.base

    def problems(self, path: str) -> Iterator[str]:
        yield from _one_of(f"{path}.name", self.name, POLICY_NAMES)
        yield from _within(f"{path}.threshold", self.threshold, 0.0, 9.0)
        yield from _at_least(f"{path}.first_n_base_steps", self.first_n_base_steps, 0)
        yield from _within(f"{path}.accept_rate", self.accept_rate, 0.0, 1.0)
        if self.name == "random" and (self.accept_rate is None) == (self.match_run is None):
            yield f"{path}: random needs either accept_rate (0 to 1) or match_run (a run's output folder)"
        only_role = {"base_only": Role.base, "base_direct": Role.base, "draft_only": Role.draft}.get(self.name)
        if only_role is not None and self.answer_role is not only_role:
            yield f"{path}.answer_role: {self.answer_role} does not run with policy {self.name}; allowed: {only_role}"


@dataclass(kw_only=True)
class JudgeConfig:
    """The grading turn."""

    question: str = MISSING
    reply_opening: str = MISSING
    reading: Reading = Reading.expected
    mass_floor: float = 0.5
    labels: list[str] = field(default_factory=lambda: list(DIGITS))

    def problems(self, path: str) -> Iterator[str]:
        yield from _nonempty(f"{path}.question", self.question)
        yield from _nonempty(f"{path}.reply_opening", self.reply_opening)
        yield from _within(f"{path}.mass_floor", self.mass_floor, 0.0, 1.0)
        wanted = 2 if self.reading is Reading.yes_no else 10
        if len(self.labels) != wanted:
            yield f"{path}.labels: {len(self.labels)} labels; reading {self.reading} takes {wanted}"


@dataclass(kw_only=True)
class BudgetConfig:
    """Lengths, in tokens of the base's vocabulary."""

    max_step_tokens: int = 512
    thinking_tokens: int = 8192  # kept tokens: the paper's budget
    generated_tokens: int | None = None  # kept and rejected ones; None: no such limit
    repeated_steps: int = 3  # the same step this many times running ends thinking
    max_answer_tokens: int = 1024

    def problems(self, path: str) -> Iterator[str]:
        for name in ("max_step_tokens", "thinking_tokens", "generated_tokens", "max_answer_tokens"):
            yield from _at_least(f"{path}.{name}", getattr(self, name), 1)
        yield from _at_least(f"{path}.repeated_steps", self.repeated_steps, 2)

    def limits(self) -> Limits:
        return Limits(
            max_step_tokens=self.max_step_tokens,
            thinking_tokens=self.thinking_tokens,
            generated_tokens=self.generated_tokens,
            repeated_steps=self.repeated_steps,
        )


@dataclass(kw_only=True)
class InputConfig:
    """Prompt shards: Parquet with `prompt_id`, `prompt` and, if there is one, `gold_answer`."""

    path: str = MISSING  # a file, a folder of *.parquet, or a glob
    shards: list[int] | None = None  # only these shards, counted from 0 in name order; None: all

    def problems(self, path: str) -> Iterator[str]:
        yield from _nonempty(f"{path}.path", self.path)
        if self.shards is not None and (not self.shards or min(self.shards) < 0):
            yield f"{path}.shards: {self.shards} is out of range; allowed: one or more shard numbers, from 0"


@dataclass(kw_only=True)
class ScheduleConfig:
    """When requests run."""

    name: str = MISSING  # one of SCHEDULE_NAMES
    active_size: int = 64  # chains at a time, at most
    fit_memory: bool = True  # hold fewer where the engines' KV caches do not hold so many
    cohorts: int | None = None  # overlapped: 1 (the default) or 2, one drafted while the other is graded
    wave: float | None = None  # waves: share of the active chains that starts drafting together, 0-1; None: 0.3

    def problems(self, path: str) -> Iterator[str]:
        yield from _one_of(f"{path}.name", self.name, SCHEDULE_NAMES)
        yield from _at_least(f"{path}.active_size", self.active_size, 1)
        yield from _within(f"{path}.cohorts", self.cohorts, 1, 2)
        yield from _within(f"{path}.wave", self.wave, 0.0, 1.0)
        for name, value, schedule in (("cohorts", self.cohorts, "overlapped"), ("wave", self.wave, "waves")):
            if value is not None and self.name != schedule:
                yield f"{path}.{name}: {value} does nothing in {self.name}; allowed: null"


@dataclass(kw_only=True)
class PartsConfig:
    """When a part is closed: at whichever comes first."""

    chains: int = 1000
    seconds: float = 600.0

    def problems(self, path: str) -> Iterator[str]:
        yield from _at_least(f"{path}.chains", self.chains, 1)
        yield from _at_least(f"{path}.seconds", self.seconds, 0)


@dataclass(kw_only=True)
class CheckpointConfig:
    """How often the chains in flight are saved: this is the most work that a kill can cost."""

    seconds: float = 60.0  # between checkpoints; 0: after every round (or second)
    keep: int = 2  # the newest ones that stay; a torn one is passed over for the one before

    def problems(self, path: str) -> Iterator[str]:
        yield from _at_least(f"{path}.seconds", self.seconds, 0)
        yield from _at_least(f"{path}.keep", self.keep, 1)


@dataclass(kw_only=True)
class LeaseConfig:
    """One writer a shard (specreason_batch/store/attempts.py)."""

    beat_seconds: float = 10.0  # between the owner's signs of life
    stale_seconds: float = 90.0  # without one for this long, a shard may be taken over

    def problems(self, path: str) -> Iterator[str]:
        yield from _at_least(f"{path}.beat_seconds", self.beat_seconds, 0.05)
        yield from _at_least(f"{path}.stale_seconds", self.stale_seconds, 3 * self.beat_seconds)


@dataclass(kw_only=True)
class RecoveryConfig:
    """What happens when an engine dies, or a signal comes."""

    max_rebuilds: int = 16  # of engines in a row, without a chain finished in between; then the run fails
    stop_seconds: float = 60.0  # from a stop signal to the process's end, at most
    node_check: str | None = None  # a shell command run before models load; a non-zero status means a bad node

    def problems(self, path: str) -> Iterator[str]:
        yield from _at_least(f"{path}.max_rebuilds", self.max_rebuilds, 0)
        yield from _at_least(f"{path}.stop_seconds", self.stop_seconds, 1)


@dataclass(kw_only=True)
class LogConfig:
    """What a person sees."""

    seconds: float = 10.0  # between progress lines where there is no terminal
    vllm_level: str = "ERROR"  # how much of vLLM's own log is shown

    def problems(self, path: str) -> Iterator[str]:
        yield from _at_least(f"{path}.seconds", self.seconds, 0.1)
        yield from _one_of(f"{path}.vllm_level", self.vllm_level, ("DEBUG", "INFO", "WARNING", "ERROR"))


@dataclass(kw_only=True)
class GenerateConfig:
    """`python -m jobs.generate`. Raises InvalidInput that lists every field out of range."""

    name: str = MISSING  # the experiment's
    output_dir: str = MISSING
    seed: int = 0  # of the run; every request's seed derives from it
    seeded: bool = True  # False: no per-request seeds, where those cost throughput
    samples_per_prompt: int = 1
    limit: int | None = None  # a pilot: the first prompts of each shard
    input: InputConfig = MISSING
    draft: EngineConfig = MISSING
    base: EngineConfig = MISSING
    sampling: SamplingConfig = MISSING
    policy: PolicyConfig = MISSING
    judge: JudgeConfig = MISSING
    budgets: BudgetConfig = MISSING
    schedule: ScheduleConfig = MISSING
    parts: PartsConfig = MISSING
    checkpoint: CheckpointConfig = MISSING
    lease: LeaseConfig = MISSING
    recovery: RecoveryConfig = MISSING
    log: LogConfig = MISSING

    def __post_init__(self) -> None:
        problems = list(self.problems())
        if problems:
            raise InvalidInput("\n".join(problems))

    def problems(self) -> Iterator[str]:
        yield from _nonempty("output_dir", self.output_dir)
        yield from _at_least("seed", self.seed, 0)
        yield from _at_least("samples_per_prompt", self.samples_per_prompt, 1)
        yield from _at_least("limit", self.limit, 1)
        for name in SECTIONS:
            yield from getattr(self, name).problems(name)
        if self.judge.reading is Reading.yes_no:
            yield from _within("policy.threshold (reading yes_no)", self.policy.threshold, 0.0, 1.0)
        for role in Role:
            window = self.engine(role).max_model_len
            if window <= self.budgets.max_answer_tokens:
                yield (
                    f"budgets.max_answer_tokens: {self.budgets.max_answer_tokens} leaves nothing of "
                    f"{role}.max_model_len={window}; allowed: less than that"
                )
        if shared := set(self.draft.cpu_cores or ()) & set(self.base.cpu_cores or ()):
            yield f"draft.cpu_cores: {sorted(shared)} are in base.cpu_cores too; allowed: cores of its own"

    def engine(self, role: Role) -> EngineConfig:
        return self.draft if role is Role.draft else self.base


def _nonempty(name: str, value: str) -> Iterator[str]:
    if not value:
        yield f"{name}: {value!r} is empty; allowed: text"


def _at_least(name: str, value: float | None, low: float) -> Iterator[str]:
    if value is not None and not value >= low:
        yield f"{name}: {value} is out of range; allowed: at least {low}"


def _within(name: str, value: float | None, low: float, high: float, open_low: bool = False) -> Iterator[str]:
    if value is None or (low < value <= high) or (value == low and not open_low):
        return
    yield f"{name}: {value} is out of range; allowed: {'over ' if open_low else ''}{low} to {high}"


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> Iterator[str]:
    if value not in allowed:
        yield f"{name}: {value!r} is unknown; allowed: {', '.join(allowed)}"
