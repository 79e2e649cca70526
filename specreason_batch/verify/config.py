"""The choices of `jobs.verify`: typed, with their ranges. Does not know: files, what an answer is."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from specreason_batch.store.verdicts import AnswerKind
from specreason_batch.types import InvalidInput

MISSING: Any = "???"  # OmegaConf's: a value that must be given
AUTO = "auto"
KINDS = (AUTO, *AnswerKind)
_NOT_IN_SETTINGS = ("run", "num_workers", "log_seconds")


@dataclass(kw_only=True)
class VerifyConfig:
    """`python -m jobs.verify`. Raises InvalidInput that lists every field out of range."""

    run: Any = MISSING  # a run's output_dir, or several as [A,B]
    kind: str = AUTO  # how answers are compared; auto: as each gold answer looks (spelling.kind_of)
    kind_column: str | None = None  # a column of the chains that says it for each row, in place of `kind`
    gold_column: str = "gold_answer"  # of the chains: input_<name> for other columns of the input
    from_thinking: bool = False  # where the answer has none, take the last \boxed{} of the thinking
    majority: float = 0.5  # without a gold answer: more than this share of the prompt's samples must agree
    timeout_seconds: float = 10.0  # for one comparison; its worker is killed then
    memory_gib: float = 4.0  # address space of a worker, at most
    num_workers: int | None = None  # None: the cores that this process may use
    log_seconds: float = 10.0  # between progress lines

    def __post_init__(self) -> None:
        if problems := list(self.problems()):
            raise InvalidInput("\n".join(problems))

    def problems(self) -> Iterator[str]:
        if not self.runs or not all(self.runs):
            yield f"run: {self.run!r}; allowed: a run's output_dir, or several as [A,B]"
        elif len(set(self.runs)) < len(self.runs):
            yield f"run: {self.run!r} names one twice; allowed: each once"
        if self.kind not in KINDS:
            yield f"kind: {self.kind!r} is unknown; allowed: {', '.join(KINDS)}"
        if not self.gold_column:
            yield "gold_column: empty; allowed: the name of a column of the chains"
        if not 0 <= self.majority < 1:
            yield f"majority: {self.majority} is out of range; allowed: from 0 to under 1"
        for name, low in (("timeout_seconds", 0.1), ("memory_gib", 0.25), ("num_workers", 1), ("log_seconds", 0.1)):
            value = getattr(self, name)
            if value is not None and not low <= value < float("inf"):
                yield f"{name}: {value} is out of range; allowed: at least {low}"

    @property
    def runs(self) -> list[str]:
        """The folders, whichever way they were given."""
        return list(map(str, self.run if isinstance(self.run, list) else [self.run]))

    def verdict_fields(self) -> dict[str, Any]:
        """What can change a verdict."""
        return {name: value for name, value in asdict(self).items() if name not in _NOT_IN_SETTINGS}
