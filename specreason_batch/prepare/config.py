"""The choices of `jobs.prepare`: typed, with their ranges. Does not know: files, what columns there are."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

from specreason_batch.types import InvalidInput

MISSING: Any = "???"  # OmegaConf's: a value that must be given


class GoldIs(StrEnum):
    """How the gold answer of a multiple-choice question names its choice."""

    letter = "letter"
    number = "number"  # counted from 0
    number_from_1 = "number_from_1"
    text = "text"


@dataclass(kw_only=True)
class ColumnsConfig:
    """Input columns by what they hold. None: found by a well-known name (mapping.KNOWN); '': there is none."""

    prompt: str | None = None
    prompt_id: str | None = None
    gold_answer: str | None = None
    messages: str | None = None  # whole conversations that end with the user's turn, in place of `prompt`
    system_prompt: str | None = None
    choices: Any = None  # a column of lists or of letter -> text; or one column a choice, as [A,B,C,D]

    def problems(self, path: str) -> Iterator[str]:
        texts = self.choices if isinstance(self.choices, list) else [self.choices or "-"]
        if not texts or not all(isinstance(text, str) and text for text in texts):
            yield f"{path}.choices: {self.choices!r}; allowed: a column's name, or several as [A,B,C,D]"
        if self.prompt and self.messages:
            yield f"{path}.prompt: {self.prompt!r} beside {path}.messages={self.messages!r}; allowed: one of the two"
        given = [name for item in fields(self) for name in _names(getattr(self, item.name))]
        for name in sorted({name for name in given if given.count(name) > 1}):
            if name not in self._gold_among_choices():
                yield f"{path}: {name!r} is given twice; allowed: a column once"

    def _gold_among_choices(self) -> list[str]:
        """The column of the right answer may be one of the choices' columns."""
        shared = isinstance(self.choices, list) and self.choices.count(self.gold_answer) == 1
        return [self.gold_answer] if shared and self.gold_answer else []


def _names(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value] if value else []


@dataclass(kw_only=True)
class PrepareConfig:
    """`python -m jobs.prepare`. Raises InvalidInput that lists every field out of range."""

    input: str = MISSING  # a file, a folder or a glob: .parquet, .jsonl, .ndjson, and the latter two with .gz
    output: str = MISSING  # a folder that does not exist yet
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    template: str | None = None  # a ready one, a file *.jinja, or a text with {{ prompt }}; None: by the columns
    shuffle_choices: bool = True  # each question's own order, by a stable seed; the gold letter follows
    gold_answer_is: GoldIs | None = None  # of a multiple-choice question; None: found out for each row
    seed: int = 0  # of shuffling and of the holdout
    num_shards: int | None = None  # None: as shard_rows says
    shard_rows: int = 1000  # rows of a shard, at most, where num_shards is not given
    holdout: float = 0.0  # evaluation prompts put aside: a number of rows, or a share under 1
    log_seconds: float = 10.0  # between progress lines

    def __post_init__(self) -> None:
        problems = list(self.problems())
        if problems:
            raise InvalidInput("\n".join(problems))

    def problems(self) -> Iterator[str]:
        for name in ("input", "output"):
            if not getattr(self, name) or getattr(self, name) == MISSING:
                yield f"{name}: not set; it needs a value"
        yield from self.columns.problems("columns")
        for name, low in (("seed", 0), ("num_shards", 1), ("shard_rows", 1), ("log_seconds", 0.1)):
            value = getattr(self, name)
            if value is not None and not value >= low:
                yield f"{name}: {value} is out of range; allowed: at least {low}"
        if not 0 <= self.holdout < float("inf") or (self.holdout > 1 and self.holdout != int(self.holdout)):
            yield f"holdout: {self.holdout} is out of range; allowed: a share from 0 to under 1, or a number of rows"
        if self.template is not None and not self.template.strip():
            yield f"template: {self.template!r} is empty; allowed: null, a ready template, a file or a text"

    def row_fields(self) -> dict[str, Any]:
        """What decides the output, but for the inputs' content: two equal ones make the same files."""
        kept = {name: value for name, value in asdict(self).items() if name not in ("input", "output", "log_seconds")}
        kept["shard_rows"] = None if self.num_shards else self.shard_rows
        return kept
