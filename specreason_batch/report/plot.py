"""A chart to a piece of SVG that goes straight into a page: no ids but its own, no reference to anywhere.

The same chart gives the same bytes. Imports matplotlib: import this module late. Figures are objects of their own, with
no display and no state shared between them. Text stays text, in the page's font.
"""

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from specreason_batch.accounting.figures import Chart, ChartKind
from specreason_batch.report.digits import cell, heading, number

# Told apart by colour-blind readers (Okabe and Ito), without the yellow, which white paper swallows.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#666666")
_DASHES = ("-", "--", ":", "-.")
_HATCHES = ("", "///", "...", "xxx")
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.labelcolor": "#444444",
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "DejaVu Sans",  # comes with matplotlib; wider than a page's font, so nothing will overlap
    "font.size": 10,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "hatch.linewidth": 0.5,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}
_WIDTH, _HEIGHT = 6.0, 3.1  # inches
_MAX_POINTS = 1000  # of a line; more are drawn as the least and the greatest of each stretch
_MAX_BARS = 120  # of numbers; more are drawn as a line or an area
_MAX_CATEGORIES = 40
_MAX_NAME = 32  # characters of a category or series
_MARKED_POINTS = 25  # up to here, each has a dot
_MARK_LINES = 4  # of marks' names above each other
_SIZES = ((1e9, "G"), (1e6, "M"))
_STACKED = (ChartKind.stacked_bar, ChartKind.stacked_area)
_BARS = {ChartKind.bar: ChartKind.line, ChartKind.stacked_bar: ChartKind.stacked_area}


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """One line, or one colour of bars."""

    label: str
    y: np.ndarray[Any, np.dtype[np.float64]]  # beside the drawing's x; nan: no value


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Drawing:
    """A chart's frame as it is drawn."""

    kind: ChartKind
    x: np.ndarray[Any, np.dtype[np.float64]]  # ascending; of categories, their places
    series: tuple[Series, ...]
    categories: tuple[str, ...] | None  # None: x is a number or a time
    is_time: bool
    num_left_out: int = 0  # categories


def draw(chart: Chart, key: str) -> tuple[str, str]:
    """The SVG, and what of the data it does not show ('' if all). `key`: unique in the page."""
    drawing = prepare(chart)
    if drawing is None:
        return "", "nothing to draw"
    rc = _STYLE | {"svg.hashsalt": key}
    with mpl.rc_context(rc), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has them
        figure = Figure(figsize=(_WIDTH, _height(drawing)), layout="constrained")
        _fill(figure, chart, drawing)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(text.getvalue(), chart.title, key), _left_out(drawing)


# --- from frame to numbers ---


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
        num_left_out=num_left_out,
    )
    if not any(np.isfinite(series.y).any() for series in drawing.series):
        return None
    return _thinned(drawing)


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


def _numbers(column: pl.Series) -> np.ndarray[Any, np.dtype[np.float64]]:
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
        drawing = replace(drawing, kind=_BARS.get(drawing.kind, drawing.kind))
    if len(drawing.x) <= _MAX_POINTS:
        return drawing
    kept = np.unique(np.concatenate([_extremes(series.y) for series in drawing.series]))
    series = tuple(Series(series.label, series.y[kept]) for series in drawing.series)
    return replace(drawing, x=drawing.x[kept], series=series)


def _extremes(y: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
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


# --- from numbers to a picture ---


def _fill(figure: Figure, chart: Chart, drawing: Drawing) -> None:
    axes = figure.add_subplot()
    is_sideways = _is_sideways(drawing)
    handles = _DRAW[drawing.kind](axes, drawing, is_sideways)
    _scale(axes, drawing, is_sideways)
    for x in chart.marks.values():
        axes.axvline(x, color="#333333", linestyle=(0, (4, 3)), linewidth=1)
    _name_marks(axes, chart.marks)
    x_label, y_label = chart.x_label or _label(chart, chart.x), chart.y_label or _label(chart, chart.y[0])
    axes.set_xlabel(y_label if is_sideways else x_label)
    axes.set_ylabel(x_label if is_sideways else y_label)
    if len(drawing.series) > 1:
        labels = [f"\u200b{series.label}" for series in drawing.series]  # matplotlib hides what begins with `_`
        figure.legend(handles, labels, loc="outside upper left", ncols=_columns(labels), frameon=False)


def _label(chart: Chart, name: str) -> str:
    return chart.labels.get(name, heading(name))


def _columns(labels: Sequence[str]) -> int:
    """Of the legend, as the width holds."""
    return max(1, min(len(labels), 72 // (max(map(len, labels)) + 6)))


def _is_sideways(drawing: Drawing) -> bool:
    """Bars of categories whose names have no room below."""
    names = drawing.categories or ()
    return drawing.kind in _BARS and sum(len(name) + 2 for name in names) > 60


def _height(drawing: Drawing) -> float:
    legend = 0.2 * math.ceil(len(drawing.series) / 3) if len(drawing.series) > 1 else 0.0
    if not _is_sideways(drawing):
        return _HEIGHT + legend
    bars = len(drawing.x) * (1 if drawing.kind in _STACKED else min(3, len(drawing.series)))
    return max(_HEIGHT, 0.8 + 0.24 * bars) + legend


def _look(place: int) -> tuple[str, int]:
    """A colour, and how often all have been used before."""
    return _COLOURS[place % len(_COLOURS)], (place // len(_COLOURS)) % len(_DASHES)


def _lines(axes: Axes, drawing: Drawing, is_sideways: bool) -> list[Any]:
    style = "steps-post" if drawing.kind is ChartKind.step else "default"
    handles: list[Any] = []
    for place, series in enumerate(drawing.series):
        colour, turn = _look(place)
        has_value = np.isfinite(series.y)
        x, y = (drawing.x[has_value], series.y[has_value]) if _is_sparse(drawing) else (drawing.x, series.y)
        dots = {"marker": "o", "markersize": 4} if has_value.sum() <= _MARKED_POINTS else {}
        [handle] = axes.plot(
            x,
            y,
            color=colour,
            linestyle=_DASHES[turn],
            drawstyle=style,
            linewidth=1.6,
            **dots,  # type: ignore[arg-type]
        )
        handles.append(handle)
    return handles


def _is_sparse(drawing: Drawing) -> bool:
    """Series with x of their own: where another has a value, a line goes on."""
    return len(drawing.series) > 1 and not any(np.isfinite(series.y).all() for series in drawing.series)


def _bars(axes: Axes, drawing: Drawing, is_sideways: bool) -> list[Any]:
    slot = _slot(drawing)
    thickness = slot / len(drawing.series)
    handles: list[Any] = []
    for place, series in enumerate(drawing.series):
        at = drawing.x - slot / 2 + thickness * (place + 0.5)
        handles.append(_bar(axes, place, at, np.nan_to_num(series.y), thickness, 0, is_sideways))
    return handles


def _stacked_bars(axes: Axes, drawing: Drawing, is_sideways: bool) -> list[Any]:
    below = np.zeros(len(drawing.x))
    handles: list[Any] = []
    for place, series in enumerate(drawing.series):
        y = np.nan_to_num(series.y)
        handles.append(_bar(axes, place, drawing.x, y, _slot(drawing), below, is_sideways))
        below = below + y
    return handles


def _bar(axes: Axes, place: int, at: Any, length: Any, thickness: float, start: Any, is_sideways: bool) -> Any:
    colour, turn = _look(place)
    look: dict[str, Any] = {"color": colour, "hatch": _HATCHES[turn], "edgecolor": "white", "linewidth": 0.4}
    if is_sideways:
        return axes.barh(at, length, height=thickness, left=start, **look)
    return axes.bar(at, length, width=thickness, bottom=start, **look)


def _slot(drawing: Drawing) -> float:
    """Of the space between neighbours, what bars fill."""
    gaps = np.diff(np.unique(drawing.x))
    return 0.8 * float(gaps.min()) if len(gaps) else 0.8


def _areas(axes: Axes, drawing: Drawing, is_sideways: bool) -> list[Any]:
    if len(drawing.x) == 1:  # an area without a width cannot be seen
        return _stacked_bars(axes, drawing, is_sideways)
    looks = [_look(place) for place in range(len(drawing.series))]
    handles = axes.stackplot(
        drawing.x,
        *(np.nan_to_num(series.y) for series in drawing.series),
        colors=[colour for colour, _ in looks],
        linewidth=0,
    )
    for handle, (_, turn) in zip(handles, looks, strict=True):
        handle.set_hatch(_HATCHES[turn])
        handle.set_edgecolor("white")
    return list(handles)


_DRAW = {
    ChartKind.line: _lines,
    ChartKind.step: _lines,
    ChartKind.bar: _bars,
    ChartKind.stacked_bar: _stacked_bars,
    ChartKind.stacked_area: _areas,
}


# --- axes ---


def _scale(axes: Axes, drawing: Drawing, is_sideways: bool) -> None:
    values, places = (axes.xaxis, axes.yaxis) if is_sideways else (axes.yaxis, axes.xaxis)
    values.set_major_formatter(_formatter(values))
    is_count = all(_is_whole(series.y) for series in drawing.series)
    values.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=is_count))
    places.grid(False)
    if drawing.categories is not None:
        places.set_ticks(drawing.x, labels=_tick_names(drawing, is_sideways))
    elif drawing.is_time:
        locator = AutoDateLocator(maxticks=7)  # type: ignore[no-untyped-call]
        places.set_major_locator(locator)
        places.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    else:
        places.set_major_locator(MaxNLocator(10, integer=_is_whole(drawing.x)))
        places.set_major_formatter(_formatter(places))
    if is_sideways:
        axes.invert_yaxis()
    elif drawing.kind not in _BARS and _is_near_zero(drawing):
        axes.set_ylim(bottom=0)
    if drawing.kind is ChartKind.stacked_area and len(drawing.x) > 1:
        axes.set_xlim(drawing.x[0], drawing.x[-1])


def _is_whole(values: np.ndarray[Any, np.dtype[np.float64]]) -> bool:
    return bool((values[np.isfinite(values)] % 1 == 0).all())


def _tick_names(drawing: Drawing, is_sideways: bool) -> list[str]:
    """All of them, or as many as have room below a line."""
    names = list(drawing.categories or ())
    every = 1 if is_sideways else math.ceil(sum(len(name) + 2 for name in names) / 80)
    return [name if place % every == 0 else "" for place, name in enumerate(names)]


def _is_near_zero(drawing: Drawing) -> bool:
    """Nothing is under zero, and cutting the axis would blow small differences up for no gain."""
    values = np.concatenate([series.y[np.isfinite(series.y)] for series in drawing.series])
    return bool(0 <= values.min() <= 0.7 * values.max())


def _formatter(axis: Axis) -> FuncFormatter:
    """Thousands apart; where the axis goes into millions, all of it in millions."""

    def tick(value: float, _: Any = None) -> str:
        greatest = max(map(abs, axis.get_view_interval()))
        size, letter = next(((size, letter) for size, letter in _SIZES if greatest >= size), (1.0, ""))
        return f"{value / size:,.10g}{letter if value else ''}"

    return FuncFormatter(tick)


def _name_marks(axes: Axes, marks: dict[str, float]) -> None:
    """Above the data, each beside its line; a name that would meet another goes a line higher."""
    low, high = axes.get_xlim()
    ends = [-math.inf] * _MARK_LINES  # how far each line is taken, in shares of the width
    for name, x in sorted(marks.items(), key=lambda mark: mark[1]):
        at = (x - low) / (high - low)
        text = f"{name} {number(x)}"
        half = 0.009 * len(text)
        at_centre = min(max(at, half), 1 - half)
        line = next((line for line, end in enumerate(ends) if end < at_centre - half), _MARK_LINES - 1)
        ends[line] = at_centre + half
        axes.annotate(
            text,
            xy=(at_centre, 1),
            xycoords="axes fraction",
            xytext=(0, 3 + 12 * line),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color="#333333",
        )


def _left_out(drawing: Drawing) -> str:
    shown = len(drawing.x)
    return f"the first {shown} of {shown + drawing.num_left_out} are drawn" if drawing.num_left_out else ""


# --- into the page ---


def _inline(svg: str, title: str, key: str) -> str:
    """Without the file's prologue and style, and with ids that no other chart of the page has."""
    body = re.sub(r"<!--.*?-->|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    body = re.sub(r"<[^>]*>", lambda tag: _own(tag[0], key), body)  # text has no `>`: it is escaped
    return re.sub(r"<svg[^>]*>", lambda tag: _opening(tag[0], title), body, count=1)


def _own(tag: str, key: str) -> str:
    tag = re.sub(r'^<g id="[^"]*"', "<g", tag)
    tag = re.sub(r"\bxlink:href=", "href=", tag)
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{key}-", tag)


def _opening(tag: str, title: str) -> str:
    box = re.search(r'viewBox="[^"]*"', tag)
    assert box is not None
    return f'<svg {box[0]} role="img" aria-label="{escape(title)}">'
