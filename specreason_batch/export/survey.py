"""The first of two passes over the chains: each becomes a line of figures, by which all is decided (`groups`).

A part of the runs makes a file of lines, which a restart finds. Does not know: the other chains.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from specreason_batch.export.chains import FinishedChain, read_part_chains
from specreason_batch.export.config import Best, ExportConfig, SelectConfig, TokensBy
from specreason_batch.export.evaluation import EvaluationPrompts
from specreason_batch.export.filters import Check, CountTokens, Filter, Removed, checks
from specreason_batch.export.formats import Lost, RowMaker
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
from specreason_batch.export.near import Sketcher, remove_near_duplicates
from specreason_batch.export.rendering import Target, markup_pattern, thinking_and_answer
from specreason_batch.export.runs import Part, Run
from specreason_batch.store.parts import write_table

ROW_COLUMNS = (
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
    "input_license",
)
_SKETCH = "sketch"
_LICENSE = "license"
_LINES = pl.Schema([*MARKS.items(), (_LICENSE, pl.String()), (_SKETCH, pl.Binary())])  # null: none; not compared
_MAX_GRADE_RANK = 1.0  # after every real one, which is a score negated

Tick = Callable[[int], None]  # told how many chains have been read; raises Stopped


def read_part(
    run: Run, part: Part, columns: Sequence[str], step_columns: Sequence[str], place: int, tick: Tick
) -> Iterator[tuple[int, list[FinishedChain]]]:
    """A part's chains, some at a time, with the place of their first among all chains."""
    for chains in read_part_chains(run, part, list(dict.fromkeys(columns)), step_columns):
        tick(place)
        yield place, chains
        place += len(chains)


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
    """Marks chains, one by one."""

    config: ExportConfig
    maker: RowMaker
    num_tokens: CountTokens
    checks: Sequence[Check]
    sketcher: Sketcher | None  # None: near-duplicates are not looked for

    @classmethod
    def of(
        cls,
        config: ExportConfig,
        runs: Sequence[Run],
        maker: RowMaker,
        target: Target | None,
        evaluation: EvaluationPrompts | None,
    ) -> "Survey":
        find = (lambda chain: evaluation.find(chain.asked)) if evaluation else None
        tokens = token_count(config, target)
        tests = checks(config.select, config.format, markup_pattern(runs, target), tokens, find)
        sketcher = None if config.near_duplicates.threshold is None else Sketcher(config.near_duplicates)
        return cls(config=config, maker=maker, num_tokens=tokens, checks=tests, sketcher=sketcher)

    def take(self, run: Run, part: Part, place: int, path: Path, tick: Tick) -> None:
        """Of a part, unless it is there; whole or not at all. Raises InvalidInput, OSError, Stopped."""
        if path.is_file():
            return
        batches = read_part(run, part, ROW_COLUMNS, self._step_columns, place, tick)
        lines = [self._line(chain) for _, chains in batches for chain in chains]
        growing = path.with_suffix(".growing")
        write_table(pl.DataFrame(lines, schema=_LINES, orient="row").to_arrow(), growing)
        growing.rename(path)

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
        """In the order of _LINES."""
        removed = next((found for check in self.checks if (found := check(chain))), None)
        num_rows, lost = (0, Counter[Lost]()) if removed else self._made(chain)
        removed = removed or (None if num_rows else Removed(Filter.nothing_to_learn))
        asked = json.dumps(chain.turns, ensure_ascii=False)
        is_compared = removed is None and self.sketcher is not None
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
            *(lost[why] for why in Lost),
            None if (license := chain.row.get("input_license")) is None else str(license),
            self._sketch(chain) if is_compared else None,
        )

    def _made(self, chain: FinishedChain) -> tuple[int, Counter[Lost]]:
        """How many rows it makes, and which drafts make none."""
        if self.maker.makes_one:
            return 1, Counter()
        made = self.maker.make(chain)
        return len(made.rows), made.lost

    def _sketch(self, chain: FinishedChain) -> bytes | None:
        assert self.sketcher is not None
        return self.sketcher.sketch(f"{chain.asked}\n{thinking_and_answer(chain)}")

    def _rejected(self, chain: FinishedChain) -> Iterator[str]:
        """Its rejected drafts and where they stood, if they make rows: samples may differ in these alone."""
        if not self.maker.makes_one:
            yield from (f"{step['start']}:{step['rejected_text']}" for step in chain.steps if step["rejected_text"])


def decide(config: ExportConfig, surveys: list[Path], sketches: Path) -> Marks:
    """What becomes of each chain. Raises OSError."""
    select, near = config.select, config.near_duplicates
    marks = Marks(pl.scan_parquet(surveys).select(MARKS.names()).collect().with_row_index("place"))
    split(marks, config.validation, config.seed)
    remove_by_pass_rate(marks, select)
    if select.drop_duplicates:
        remove_duplicates(marks)
    if near.threshold is not None:
        found = (pl.read_parquet(path, columns=[_SKETCH])[_SKETCH].to_list() for path in surveys)
        remove_near_duplicates(marks, found, near, sketches)
    if select.per_prompt is not None:
        remove_beyond(marks, select.per_prompt)
    return marks


def licenses(surveys: list[Path], marks: Marks) -> dict[str, int]:
    """What the input's column `license` says of kept chains, the most frequent first. Raises OSError."""
    found = pl.scan_parquet(surveys).select(_LICENSE).collect()[_LICENSE]
    counts = found.filter(marks.frame["removed"].is_null()).drop_nulls().value_counts()
    return dict(counts.sort(["count", _LICENSE], descending=[True, False]).iter_rows())


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
