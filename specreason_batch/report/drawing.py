"""A chart's frame as it is drawn: series of numbers beside their x, no more of them than can be seen. Pure.

Does not know: how anything looks. Imports matplotlib, for its time axis: import this module late.
"""

from dataclasses import dataclass, replace
from datetime import date, datetime
from typing import Any

import numpy as np
import polars as pl
from matplotlib.dates import date2num

from specreason_batch.accounting.figures import Chart, ChartKind
from specreason_batch.report.digits import cell, heading

BARS = {ChartKind.bar: ChartKind.line, ChartKind.stacked_bar: ChartKind.stacked_area}  # and what many become
_MAX_POINTS = 1000  # of a line; more are drawn as the least and the greatest of each stretch
_MAX_BARS = 120  # of numbers; more are drawn as a line or an area
_MAX_CATEGORIES = 40
_MAX_NAME = 32  # characters of a category or series

Numbers = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """One line, or one colour of bars."""

    label: str
    y: Numbers  # beside the drawing's x; nan: no value


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Drawing:
    """A chart's frame as it is drawn."""

    kind: ChartKind
    x: Numbers  # ascending; of categories, their places
    series: tuple[Series, ...]
    categories: tuple[str, ...] | None  # None: x is a number or a time
    is_time: bool
    joins_points: bool  # a line goes on where its series has no value: each series has x of its own
    num_left_out: int = 0  # categories

    @property
    def values(self) -> Numbers:
        """Of all series, without those that are none."""
        values = np.concatenate([series.y for series in self.series])
        return np.asarray(values[np.isfinite(values)])

    @property
    def left_out(self) -> str:
        """What of the data is not drawn; '' if all is."""
        shown = len(self.x)
        return f"the first {shown} of {shown + self.num_left_out} are drawn" if self.num_left_out else ""


def prepare(chart: Chart) -> Drawing | None:
    """None if there is no value at all."""
    frame = chart.frame.filter(pl.col(chart.x).is_not_null())
    wide, labels = _widened(chart, frame)
    if wide.is_empty() or not labels:
        return None
    is_time = wide[chart.x].dtype.is_temporal()
    is_category = not (is_time or wide[chart.x].dtype.is_numeric())
    num_left_out = max(0, wide.height - _MAX_CATEGORIES) if is_category else 0
    wide = wide.head(_MAX_CATEGORIES) if is_category else wide.sort(chart.x)
    drawing = Drawing(
        kind=chart.kind,
        x=np.arange(wide.height, dtype=np.float64) if is_category else _numbers(wide[chart.x]),
        series=tuple(Series(label, _numbers(wide[name])) for name, label in labels.items()),
        categories=tuple(_short(cell(value)) for value in wide[chart.x]) if is_category else None,
        is_time=is_time,
        joins_points=chart.by is not None,
        num_left_out=num_left_out,
    )
    return _thinned(drawing) if len(drawing.values) else None


def _widened(chart: Chart, frame: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, str]]:
    """One row an x, one column a series; and the series' labels by their columns."""
    if chart.by is None:
        return frame, {name: chart.labels.get(name, heading(name)) for name in chart.y}
    [value] = chart.y
    parts = frame.partition_by(chart.by, maintain_order=True, as_dict=True)
    labels = {f"series {place}": _short(cell(key[0])) for place, key in enumerate(parts)}
    wide = frame.select(chart.x).unique(maintain_order=True)
    for name, part in zip(labels, parts.values(), strict=True):
        lines = part.select(chart.x, pl.col(value).alias(name)).unique(chart.x, keep="last", maintain_order=True)
        wide = wide.join(lines, on=chart.x, how="left", maintain_order="left")
    return wide, labels


def _numbers(column: pl.Series) -> Numbers:
    """Infinity is no value either."""
    if column.dtype == pl.Duration:
        column = column.dt.total_microseconds() / 1e6
    if column.dtype.is_temporal():
        return np.asarray(date2num([_naive(value) for value in column]), dtype=np.float64)  # type: ignore[no-untyped-call]
    values = column.cast(pl.Float64).to_numpy().astype(np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def _naive(value: date | datetime) -> date | datetime:
    return value.replace(tzinfo=None) if isinstance(value, datetime) else value


def _thinned(drawing: Drawing) -> Drawing:
    """No more points than can be seen; bars that would be hair-thin become a line or an area."""
    if drawing.categories is None and len(drawing.x) > _MAX_BARS:
        drawing = replace(drawing, kind=BARS.get(drawing.kind, drawing.kind))
    if len(drawing.x) <= _MAX_POINTS:
        return drawing
    kept = np.unique(np.concatenate([_extremes(series.y) for series in drawing.series]))
    series = tuple(Series(series.label, series.y[kept]) for series in drawing.series)
    return replace(drawing, x=drawing.x[kept], series=series)


def _extremes(y: Numbers) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Places of the least and the greatest value of each stretch, and of both ends: no peak is lost."""
    places = [np.array([0, len(y) - 1])]
    for stretch in np.array_split(np.arange(len(y)), _MAX_POINTS // 2):
        places.append(stretch[[np.argmin(np.nan_to_num(y[stretch], nan=np.inf))]])
        places.append(stretch[[np.argmax(np.nan_to_num(y[stretch], nan=-np.inf))]])
    return np.concatenate(places)


def _short(text: str) -> str:
    """Beginning and end: either may be what tells names apart."""
    text = " ".join(text.split())
    half = (_MAX_NAME - 1) // 2
    return text if len(text) <= _MAX_NAME else f"{text[:half]}…{text[-half:]}"
