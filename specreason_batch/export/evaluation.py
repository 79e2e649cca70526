"""Evaluation prompts, and whether a prompt shares words with one (decontamination).

Two prompts share words where `ngram` words in a row of one stand in the other. Of an evaluation prompt that has fewer,
all of its words must stand there in a row; one of fewer than five must begin the prompt with them. Words in a row that
many evaluation prompts have are an instruction, not a problem, and are passed over (as in GPT-3's decontamination).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from specreason_batch.export.config import DecontaminateConfig
from specreason_batch.export.measures import ngrams, words
from specreason_batch.prepare.sources import InputFile, carry, list_inputs, read_batches, scan
from specreason_batch.types import InvalidInput

COLUMNS = ("prompt", "problem", "question")  # well-known names, the first there is
COMMON = 10  # evaluation prompts that share words in a row, from which on they are an instruction
_SHORT = 5  # words
_CACHED = 4096  # prompts: the samples of one lie near each other


@dataclass(slots=True, kw_only=True)
class EvaluationPrompts:
    """An index of evaluation prompts by their words."""

    ngram: int
    prompts: list[str] = field(default_factory=list)  # for people: file, row and the first words
    fingerprints: list[dict[str, Any]] = field(default_factory=list)  # of the files
    _anywhere: dict[str, int] = field(default_factory=dict)  # number of the first prompt with these words in a row
    _beginnings: dict[str, int] = field(default_factory=dict)
    _sizes: list[int] = field(default_factory=list)  # in words, of what `_anywhere` holds
    _found: dict[str, int | None] = field(default_factory=dict)  # the last prompts asked for

    @classmethod
    def read(cls, config: DecontaminateConfig) -> "EvaluationPrompts | None":
        """None: no files are given. Raises InvalidInput that names the file that cannot be used."""
        if not config.files:
            return None
        found = cls(ngram=config.ngram)
        counts: Counter[str] = Counter()
        for given in config.files:
            for file in _inputs(given):
                found.fingerprints.append(file.fingerprint())
                for row, prompt in _prompts(file, config.column):
                    found._add(f"{file.name}, row {row}", words(prompt), counts)
        if not found.prompts:
            raise InvalidInput(f"decontaminate.files: {config.files} hold no prompt; allowed: at least one")
        found._drop_common(counts)
        return found

    def find(self, prompt: str) -> int | None:
        """The number of the first evaluation prompt that this one shares words with."""
        if prompt not in self._found:
            if len(self._found) >= _CACHED:
                self._found.clear()
            self._found[prompt] = self._look_up(words(prompt))
        return self._found[prompt]

    def _add(self, name: str, found: Sequence[str], counts: Counter[str]) -> None:
        if not found:
            return
        number = len(self.prompts)
        self.prompts.append(f"{name}: {' '.join(found[:12])}")
        if len(found) < _SHORT:
            self._beginnings.setdefault(" ".join(found), number)
            return
        grams = set(ngrams(found, min(self.ngram, len(found))))
        counts.update(grams)
        for gram in grams:
            self._anywhere.setdefault(gram, number)

    def _drop_common(self, counts: Counter[str]) -> None:
        for gram, count in counts.items():
            if count > COMMON:
                del self._anywhere[gram]
        self._sizes = sorted({gram.count(" ") + 1 for gram in self._anywhere}, reverse=True)

    def _look_up(self, found: Sequence[str]) -> int | None:
        beginnings = (" ".join(found[:size]) for size in range(1, _SHORT))
        anywhere = (gram for size in self._sizes for gram in ngrams(found, size))
        hits = (self._anywhere.get(gram) for gram in anywhere)
        starts = (self._beginnings.get(beginning) for beginning in beginnings)
        return next((number for numbers in (hits, starts) for number in numbers if number is not None), None)


def _inputs(given: str) -> list[InputFile]:
    try:
        return list_inputs(given)
    except InvalidInput as error:
        raise InvalidInput(f"decontaminate.files: {error}") from error


def _prompts(file: InputFile, column: str | None) -> Iterator[tuple[int, str]]:
    """Row numbers and texts; rows without one are passed over."""
    found = scan(file, lambda _name, _rows: None)
    name = column or next((known for known in COLUMNS if known in found.columns), None)
    if name is None or name not in found.columns:
        allowed = f"one of {', '.join(sorted(found.columns))}"
        raise InvalidInput(f"decontaminate.column: {file.path} has no column {name or COLUMNS}; allowed: {allowed}")
    for batch in read_batches(found, [name], carry([found], {})):
        for row, text in zip(batch.rows, batch.values[name], strict=True):
            if isinstance(text, str):
                yield row, text
