"""What one stream costs on some machine: the constants of the paper's latency formula, measured on idle engines.

Each figure is the median of several requests that run alone, after one that does not count. Does not know: vLLM, files.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from specreason_batch.engine import Engine, EngineDead
from specreason_batch.types import Completion, FinishReason, InvalidInput, Request, Role, Sampling

_POLL_SECONDS = 1.0
_FEWEST_TOKENS = 8  # generated, for seconds per token to mean anything


@dataclass(kw_only=True)
class CalibrateConfig:
    """`python -m jobs.calibrate`. Raises InvalidInput that lists every field out of range."""

    output: str = "calibration.json"
    repeats: int = 9  # measurements of each figure
    tokens: int = 64  # generated for seconds per token; the chain that is graded is as long

    def __post_init__(self) -> None:
        if problems := list(self.problems()):
            raise InvalidInput("\n".join(problems))

    def problems(self) -> Iterator[str]:
        if not self.output.strip():
            yield f"output: {self.output!r} is empty; allowed: a file"
        for name, low in (("repeats", 3), ("tokens", 2 * _FEWEST_TOKENS)):
            if getattr(self, name) < low:
                yield f"{name}: {getattr(self, name)} is out of range; allowed: at least {low}"


@dataclass(frozen=True, slots=True)
class Measured:
    """One figure, in seconds."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """What is sent: openings of prompts by role, and the base's grading turn."""

    openings: Mapping[Role, Sequence[list[int]]]  # as many as there are repeats, and one to warm up
    turn: Sequence[int]
    label_ids: tuple[int, ...]
    tokens: int


class Stopwatch:
    """One request at a time on one engine."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._count = 0

    def seconds(self, prompt: Sequence[int], max_tokens: int = 1, label_ids: tuple[int, ...] = ()) -> float:
        return self.complete(prompt, max_tokens, label_ids)[0]

    def complete(
        self, prompt: Sequence[int], max_tokens: int = 1, label_ids: tuple[int, ...] = ()
    ) -> tuple[float, Completion]:
        """Seconds from handing a request in to having it. Raises InvalidInput if it is refused, EngineDead."""
        self._count += 1
        request = Request(
            request_id=f"calibrate-{self._count}",
            prompt_token_ids=list(prompt),
            max_tokens=max_tokens,
            sampling=Sampling(temperature=0.0, logprob_token_ids=label_ids),
        )
        began = time.perf_counter()
        self._engine.submit([request])
        done: list[Completion] = []
        while not done:
            done = self._engine.poll(_POLL_SECONDS)
            if not done and not self._engine.num_outstanding:
                raise EngineDead(f"the engine for {self._engine.info.model!r} lost a request")
        seconds = time.perf_counter() - began
        if done[0].finish_reason is FinishReason.refused:
            raise InvalidInput(f"{self._engine.info.model}: the engine refused a measurement: {done[0].error}")
        return seconds, done[0]


def calibrate(
    engines: Mapping[Role, Engine], stream: Stream, tell: Callable[[str], None] = lambda text: None
) -> dict[str, Measured]:
    """Every constant by its name in the latency formula. Raises InvalidInput, EngineDead."""
    draft, base = Stopwatch(engines[Role.draft]), Stopwatch(engines[Role.base])
    tell("time to first token")
    first = [base.seconds(opening) for opening in stream.openings[Role.base]]
    found = {"time_to_first_token_seconds": Measured(tuple(first[1:]))}
    tell("seconds per token")
    found["base_seconds_per_token"], texts = _generation(base, Role.base, stream)
    found["draft_seconds_per_token"], _ = _generation(draft, Role.draft, stream)
    tell("grades")
    chains = [[*opening, *text] for opening, text in zip(stream.openings[Role.base], texts, strict=True)]
    found["grade_seconds"] = _grades(base, chains, stream)
    found["base_prefill_seconds_per_token"] = _prefill(base, chains, engines[Role.base].info.max_model_len)
    return found


def _generation(engine: Stopwatch, role: Role, stream: Stream) -> tuple[Measured, list[tuple[int, ...]]]:
    """A token's seconds, its prompt being cached, and what was written after each opening."""
    seconds, texts = [], []
    for opening in stream.openings[role]:
        engine.seconds(opening)
        one = engine.seconds(opening)
        whole, completion = engine.complete(opening, stream.tokens)
        num_tokens = len(completion.token_ids)
        if num_tokens < _FEWEST_TOKENS:
            raise InvalidInput(
                f"{role}: it wrote {num_tokens} tokens after a prompt, too few to time; allowed: prompts after which "
                f"it writes at least {_FEWEST_TOKENS} (input.path)"
            )
        seconds.append((whole - one) / (num_tokens - 1))
        texts.append(completion.token_ids)
    return Measured(tuple(seconds[1:])), texts


def _grades(base: Stopwatch, chains: Sequence[list[int]], stream: Stream) -> Measured:
    """Of the second half of each text, the first half standing in the cache as its chain."""
    seconds = []
    for chain in chains:
        before = chain[: len(chain) - stream.tokens // 2]
        base.seconds(before)
        seconds.append(base.seconds([*chain, *stream.turn], label_ids=stream.label_ids))
    return Measured(tuple(seconds[1:]))


def _prefill(base: Stopwatch, chains: Sequence[list[int]], window: int) -> Measured:
    """A new prompt token's seconds: what a prompt that nothing is cached of takes over one a quarter as long."""
    seconds = []
    long = min(window - 1, 8 * max(map(len, chains)))
    for number, chain in enumerate(chains):
        times = [base.seconds(_unseen(chain, number, kind, length)) for kind, length in enumerate((long // 4, long))]
        seconds.append((times[1] - times[0]) / (long - long // 4))
    return Measured(tuple(seconds[1:]))


def _unseen(chain: list[int], number: int, kind: int, length: int) -> list[int]:
    """The chain's tokens over and over, in an order that no other prompt begins with."""
    shifted = chain[2 * number + kind + 1 :: 2] + chain[::-1]
    return (shifted * (length // len(shifted) + 1))[:length]
