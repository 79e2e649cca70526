"""The second pass: kept chains to rows, and keys of the others aside. Does not know: why a chain is kept."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from specreason_batch.export.card import SplitCounts
from specreason_batch.export.chains import FinishedChain
from specreason_batch.export.config import ExportConfig
from specreason_batch.export.evaluation import EvaluationPrompts
from specreason_batch.export.filters import MEANINGS, Filter, Removed
from specreason_batch.export.formats import RowMaker
from specreason_batch.export.groups import Marks, code_of, filter_of
from specreason_batch.export.output import Aside, Rows, Split
from specreason_batch.export.runs import Part, Run, all_parts
from specreason_batch.export.survey import ROW_COLUMNS, Tick, read_part

SPLITS = {False: "train", True: "validation"}  # by whether it is validation
_KEYS = ("prompt_id", "sample_index")
_TWINS = (Filter.duplicate, Filter.near_duplicate)  # their value is another chain's place


def write_rows(
    config: ExportConfig, runs: Sequence[Run], maker: RowMaker, marks: Marks, folder: Path, tick: Tick
) -> dict[str, SplitCounts]:
    """The splits, those of no row left out. Raises InvalidInput, OSError, Stopped."""
    splits = {
        side: Split(folder, name, maker.schema, _num_rows(marks.kept, side), config.rows_per_file)
        for side, name in SPLITS.items()
    }
    for place, run, part in all_parts(runs):
        lines = marks.frame[place : place + part.num_chains]
        counts = {side: _num_rows(lines.filter(pl.col("removed").is_null()), side) for side in SPLITS}
        if all(counts[side] <= splits[side].num_to_skip for side in SPLITS):
            for side, split in splits.items():
                split.skip(counts[side])
        else:
            _write_part(run, part, place, maker, marks, splits, tick)
    for split in splits.values():
        split.close()
    return {name: _counts(marks, side, splits[side]) for side, name in SPLITS.items() if splits[side].num_rows}


def _num_rows(kept: pl.DataFrame, is_validation: bool) -> int:
    return int(kept.filter(pl.col("is_validation") == is_validation)["rows"].sum())


def _write_part(
    run: Run, part: Part, place: int, maker: RowMaker, marks: Marks, splits: dict[bool, Split], tick: Tick
) -> None:
    for first, chains in read_part(run, part, [*ROW_COLUMNS, *maker.chain_columns], maker.step_columns, place, tick):
        lines = marks.frame[first : first + len(chains)].select("removed", "is_validation").iter_rows()
        rows: dict[bool, Rows] = {side: [] for side in SPLITS}
        for chain, (removed, is_validation) in zip(chains, lines, strict=True):
            if removed is None:
                rows[is_validation] += maker.make(chain).rows
        for side, found in rows.items():
            splits[side].add(found)


def _counts(marks: Marks, is_validation: bool, split: Split) -> SplitCounts:
    kept = marks.kept.filter(pl.col("is_validation") == is_validation)
    return SplitCounts(
        num_prompts=kept["prompt"].n_unique(),
        num_chains=kept.height,
        num_rows=split.num_rows,
        num_files=split.num_files,
    )


# --- aside ---

_Key = dict[str, Any]  # run, prompt_id, sample_index


@dataclass(slots=True, kw_only=True)
class Removals:
    """Writes which chains each filter removed, and why. Reads keys alone, so a restart begins anew."""

    marks: Marks
    evaluation: EvaluationPrompts | None
    _twins: dict[int, _Key | None] = field(default_factory=dict)  # chains that others are like, by place

    def write(self, runs: Sequence[Run], folder: Path, tick: Tick) -> None:
        """Raises InvalidInput, OSError, Stopped."""
        shutil.rmtree(folder / "removed", ignore_errors=True)
        self._twins = dict.fromkeys(self._twin_places())
        aside = Aside(folder)
        for first, run, part in all_parts(runs):
            for place, chains in read_part(run, part, _KEYS, (), first, tick):
                self._write(chains, place, aside)
        aside.close()

    def _write(self, chains: Sequence[FinishedChain], first: int, aside: Aside) -> None:
        lines = self.marks.frame[first : first + len(chains)].select("removed", "value").iter_rows()
        rows: dict[Filter, Rows] = {}
        for place, (chain, (code, value)) in enumerate(zip(chains, lines, strict=True), start=first):
            key = {"run": chain.run.fingerprint, "prompt_id": chain.key[0], "sample_index": chain.key[1]}
            if place in self._twins:
                self._twins[place] = key
            if code is not None:
                removed = Removed(filter_of(code), value)
                rows.setdefault(removed.by, []).append(key | {"reason": self._reason(removed)})
        for by, found in rows.items():
            aside.add(by, found)

    def _reason(self, removed: Removed) -> str:
        if removed.by in _TWINS and removed.value is not None:
            twin = self._twins[int(removed.value)]
            assert twin is not None, "a twin is always earlier"
            return f"{MEANINGS[removed.by]}: {twin['prompt_id']}, sample {twin['sample_index']}, of run {twin['run']}"
        if removed.by is Filter.evaluation and self.evaluation and removed.value is not None:
            return f"{MEANINGS[removed.by]}: {self.evaluation.prompts[int(removed.value)]}"
        return removed.reason()

    def _twin_places(self) -> list[int]:
        codes = [code_of(by) for by in _TWINS]
        return self.marks.frame.filter(pl.col("removed").is_in(codes))["value"].cast(pl.Int64).to_list()
