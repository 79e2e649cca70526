"""The first of two passes over the chains: each becomes a line of figures (`groups.Marks`), by which all is decided.

Of a chain that is read, about 70 bytes stay in memory; sorting and grouping take as much again for a while.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import polars as pl

from specreason_batch.export.config import Best, ExportConfig, SelectConfig, TokensBy
from specreason_batch.export.evaluation import EvaluationPrompts
from specreason_batch.export.filters import Check, CountTokens, Filter, Removed, checks
from specreason_batch.export.formats import RowMaker
from specreason_batch.export.groups import (
    MARKS,
    Marks,
    code_of,
    remove_beyond,
    remove_by_pass_rate,
    remove_duplicates,
    split,
)
from specreason_batch.export.measures import stable_hash, words
from specreason_batch.export.near import Sketchbook
from specreason_batch.export.rendering import Target, markup_pattern, thinking_and_answer
from specreason_batch.export.runs import FinishedChain, Run, read_part_chains

_COLUMNS = (
    "prompt_id",
    "sample_index",
    "prompt",
    "thinking",
    "answer",
    "thinking_end",
    "answer_end",
    "num_steps",
    "num_draft_tokens_kept",
    "num_base_tokens",
    "num_answer_tokens",
    "input_messages",
    "input_system_prompt",
)
_MAX_GRADE_RANK = 1.0  # after every real one, which is a score negated

Tick = Callable[[int], None]  # told how many chains have been read; raises Stopped


def read_all(
    runs: Sequence[Run], columns: Sequence[str], step_columns: Sequence[str], tick: Tick
) -> Iterator[list[FinishedChain]]:
    """Every chain of every run in order, some at a time."""
    num_read = 0
    wanted = list(dict.fromkeys([*_COLUMNS, *columns]))
    for run in runs:
        for part in run.parts:
            for chains in read_part_chains(run, part, wanted, step_columns):
                tick(num_read)
                yield chains
                num_read += len(chains)


def token_count(config: ExportConfig, target: Target | None) -> CountTokens:
    """Of thinking, think-close and answer."""
    if config.select.tokens_by is TokensBy.run:
        return lambda chain: chain.num_thinking_tokens + int(chain.row["num_answer_tokens"])
    assert target is not None
    return _Remembered(lambda chain: target.num_tokens(thinking_and_answer(chain)))


@dataclass(slots=True)
class _Remembered:
    """The last chain's count is asked for again: by the filter, the rank and the line."""

    count: CountTokens
    _last: tuple[FinishedChain, int] | None = None

    def __call__(self, chain: FinishedChain) -> int:
        if self._last is None or self._last[0] is not chain:
            self._last = chain, self.count(chain)
        return self._last[1]


@dataclass(slots=True, kw_only=True)
class Survey:
    """Marks chains one by one, then decides among them."""

    config: ExportConfig
    maker: RowMaker
    num_tokens: CountTokens
    checks: Sequence[Check]
    sketchbook: Sketchbook | None  # None: near-duplicates are not looked for
    _places: Iterator[int] = field(default_factory=count)

    @classmethod
    def of(
        cls,
        config: ExportConfig,
        runs: Sequence[Run],
        maker: RowMaker,
        target: Target | None,
        evaluation: EvaluationPrompts | None,
        sketchbook: Sketchbook | None,
    ) -> "Survey":
        find = (lambda chain: evaluation.find(chain.asked)) if evaluation else None
        tokens = token_count(config, target)
        tests = checks(config.select, config.format, markup_pattern(runs, target), tokens, find)
        return cls(config=config, maker=maker, num_tokens=tokens, checks=tests, sketchbook=sketchbook)

    def take(self, runs: Sequence[Run], tick: Tick) -> Marks:
        """Read everything, and decide. Raises InvalidInput, OSError, Stopped."""
        batches = [
            pl.DataFrame([self._line(chain) for chain in chains], schema=MARKS, orient="row")
            for chains in read_all(runs, (), self._step_columns, tick)
        ]
        frame = pl.concat(batches).with_row_index("place")
        batches.clear()
        marks = Marks(frame)
        self._decide(marks)
        return marks

    def _decide(self, marks: Marks) -> None:
        select = self.config.select
        remove_by_pass_rate(marks, select)
        if select.drop_duplicates:
            remove_duplicates(marks)
        if self.sketchbook is not None:
            self.sketchbook.remove_near_duplicates(marks)
        if select.per_prompt is not None:
            remove_beyond(marks, select.per_prompt)
        split(marks, self.config.validation, self.config.seed)

    @property
    def _step_columns(self) -> list[str]:
        select, wanted = self.config.select, set[str]()
        if select.max_repeated_steps is not None:
            wanted |= {"start", "end"}
        if select.per_prompt is not None and select.best is Best.highest_grade:
            wanted |= {"accepted", "score"}
        if not self.maker.makes_one:
            wanted |= {*self.maker.step_columns}
        return sorted(wanted)

    def _line(self, chain: FinishedChain) -> tuple[Any, ...]:
        """In the order of MARKS."""
        place = next(self._places)
        removed = next((found for check in self.checks if (found := check(chain))), None)
        num_rows = 0 if removed else self._num_rows(chain)
        removed = removed or (None if num_rows else Removed(Filter.nothing_to_learn))
        asked = json.dumps(chain.turns, ensure_ascii=False)
        if removed is None and self.sketchbook is not None:
            self.sketchbook.add(place, f"{chain.asked}\n{thinking_and_answer(chain)}")
        return (
            stable_hash(asked),
            stable_hash(chain.key[0]),
            stable_hash(" ".join(words(asked))),
            stable_hash("\0".join([asked, chain.thinking, chain.answer or "", *self._rejected(chain)])),
            self.num_tokens(chain),
            _rank(chain, self.config.select, self.num_tokens),
            num_rows,
            chain.is_right,
            code_of(removed.by) if removed else None,
            removed.value if removed else None,
        )

    def _num_rows(self, chain: FinishedChain) -> int:
        return 1 if self.maker.makes_one else len(self.maker.make(chain).rows)

    def _rejected(self, chain: FinishedChain) -> Iterator[str]:
        """Its rejected drafts and where they stood, if they make rows: samples may differ in these alone."""
        if not self.maker.makes_one:
            yield from (f"{step['start']}:{step['rejected_text']}" for step in chain.steps if step["rejected_text"])


def _rank(chain: FinishedChain, select: SelectConfig, num_tokens: CountTokens) -> float:
    """The lower the better."""
    if select.per_prompt is None:
        return 0.0
    match select.best:
        case Best.first:
            return 0.0
        case Best.shortest:
            return float(num_tokens(chain))
        case Best.highest_grade:
            scores = [step["score"] for step in chain.steps if step["accepted"] and step["score"] is not None]
            return -sum(scores) / len(scores) if scores else _MAX_GRADE_RANK
        case Best.most_draft:
            return -float(chain.row["num_draft_tokens_kept"]) / max(1, chain.num_thinking_tokens)
