"""Chains among each other: what is decided by looking at all of a prompt's, or at all.

Works on `Marks`, one line of figures a chain; nothing here reads text. Sorts and groups in polars.
"""

from dataclasses import dataclass

import polars as pl

from specreason_batch.export.config import SelectConfig
from specreason_batch.export.filters import Filter
from specreason_batch.export.formats import Lost
from specreason_batch.seeds import stable_uniform


def lost_column(why: Lost) -> str:
    return f"lost_{why.name}"


MARKS = pl.Schema(
    {
        "prompt": pl.UInt64,  # hash of all that was asked: samples of one prompt, whatever its ids
        "prompt_id": pl.UInt64,  # hash
        "wording": pl.UInt64,  # hash of the prompt's words alone
        "content": pl.UInt64,  # hash of prompt, thinking, answer; of rejected drafts too, where they make rows
        "tokens": pl.UInt32,
        "rank": pl.Float64,  # the lower the better (select.best)
        "rows": pl.UInt32,  # that it makes
        "is_right": pl.Boolean,  # null: unknown
        "removed": pl.UInt8,  # place of the filter among Filter's; null: kept
        "value": pl.Float64,  # that decided
        **{lost_column(why): pl.UInt16 for why in Lost},  # rejected drafts that make no row
    }
)
_FILTERS = list(Filter)
IS_KEPT = pl.col("removed").is_null()


@dataclass(slots=True)
class Marks:
    """A line a chain, in reading order; `place` numbers them from 0."""

    frame: pl.DataFrame

    def remove(self, by: Filter, found: pl.DataFrame) -> None:
        """`found`: `place` of kept chains, and the `value` that decided."""
        place = pl.col("place").cast(self.frame.schema["place"])
        found = found.select(place, found_value=pl.col("value").cast(pl.Float64), found=pl.lit(True))
        joined = self.frame.join(found, on="place", how="left", maintain_order="left")
        is_found = pl.col("found").fill_null(False)
        self.frame = joined.with_columns(
            removed=pl.when(is_found).then(pl.lit(code_of(by), pl.UInt8)).otherwise("removed"),
            value=pl.when(is_found).then("found_value").otherwise("value"),
        ).drop("found", "found_value")

    @property
    def kept(self) -> pl.DataFrame:
        return self.frame.filter(IS_KEPT)

    @property
    def num_removed(self) -> dict[Filter, int]:
        """By filter, those that removed any."""
        counts = dict(self.frame.filter(~IS_KEPT).group_by("removed").len().iter_rows())
        return {by: counts[code_of(by)] for by in Filter if code_of(by) in counts}

    @property
    def lost(self) -> dict[Lost, int]:
        """Rejected drafts of kept chains that make no row, by why; none of which there are none."""
        counts = {why: int(self.kept[lost_column(why)].sum()) for why in Lost}
        return {why: count for why, count in counts.items() if count}


def code_of(by: Filter) -> int:
    return _FILTERS.index(by)


def filter_of(code: int) -> Filter:
    return _FILTERS[code]


def remove_by_pass_rate(marks: Marks, select: SelectConfig) -> None:
    """Prompts outside the band. The rate counts all samples that are right or wrong, those removed included."""
    if select.min_pass_rate is None and select.max_pass_rate is None:
        return
    low, high = select.min_pass_rate or 0.0, 1.0 if select.max_pass_rate is None else select.max_pass_rate
    rated = marks.frame.with_columns(value=pl.col("is_right").mean().over("prompt"))
    inside = pl.col("value").is_between(low, high).fill_null(False)
    marks.remove(Filter.pass_rate, rated.filter(IS_KEPT & ~inside))


def remove_duplicates(marks: Marks) -> None:
    """All but the first of the same content. The value is the first one's place. `content` is not needed again."""
    first = pl.when(IS_KEPT).then("place").min().over("content")
    found = marks.frame.with_columns(value=first).filter(IS_KEPT & (pl.col("place") > pl.col("value")))
    marks.remove(Filter.duplicate, found)


def remove_beyond(marks: Marks, per_prompt: int) -> None:
    """All but a prompt's best samples; of equals, the first in reading order. The value is the sample's place."""
    ordered = marks.kept.sort("prompt", "rank", "place")
    found = ordered.with_columns(value=pl.int_range(1, pl.len() + 1).over("prompt"))
    marks.remove(Filter.per_prompt, found.filter(pl.col("value") > per_prompt))


def split(marks: Marks, validation: float, seed: int) -> None:
    """Adds `is_validation`: decided for all prompts at once that share an id or a wording, by a stable hash.

    `prompt_id` and `wording` are needed for nothing else, and go.
    """
    names = ["prompt_id", "wording"]
    families = _families(marks.frame.select(names).unique(maintain_order=True))
    chosen = [key for key in families["family"].unique() if stable_uniform("split", seed, key) < validation]
    is_chosen = pl.col("family").is_in(pl.Series(chosen, dtype=pl.UInt64).implode())
    sides = families.with_columns(is_validation=is_chosen).drop("family")
    marks.frame = marks.frame.join(sides, on=names, how="left", maintain_order="left").drop(names)


def _families(prompts: pl.DataFrame) -> pl.DataFrame:
    """With `family`: the same for prompts that are linked through shared ids and wordings, however far.

    Each takes the least mark among those that it shares an id or a wording with, until nothing changes.
    """
    found = prompts.with_columns(family=pl.col("wording"))
    while True:
        wider = found.with_columns(pl.col("family").min().over("prompt_id")).with_columns(
            pl.col("family").min().over("wording")
        )
        if wider["family"].equals(found["family"]):
            return found
        found = wider
