"""Charts to pieces of SVG that go straight into a page: no ids but their own, no reference to anywhere.

The same charts give the same bytes. Imports matplotlib: import this module late. Figures are objects of their own, with
no display and no state shared between them. Text stays text, in the page's font.
"""

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from specreason_batch.accounting.figures import Chart, ChartKind
from specreason_batch.report.digits import heading, number
from specreason_batch.report.drawing import BARS, Drawing, Numbers, prepare

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
_MARKED_POINTS = 25  # up to here, each has a dot
_MARK_LINES = 4  # of marks' names above each other
_SIZES = ((1e9, "G"), (1e6, "M"))
_MAX_SQUEEZE = 5  # times, for a scale that charts share
_STEPS = (1, 2, 2.5, 5, 10)  # between ticks


@dataclass(frozen=True, slots=True, eq=False)
class _Picture:
    """A chart on its way to SVG."""

    chart: Chart
    drawing: Drawing
    figure: Figure
    axes: Axes
    is_sideways: bool  # bars lie, below each other

    @property
    def values(self) -> Axis:
        return self.axes.xaxis if self.is_sideways else self.axes.yaxis

    @property
    def places(self) -> Axis:
        """The axis of `drawing.x`."""
        return self.axes.yaxis if self.is_sideways else self.axes.xaxis


def draw(charts: Sequence[Chart], keys: Sequence[str]) -> list[tuple[str, str]]:
    """Of each chart the SVG, and what of the data it does not show ('' if all).

    `charts`: the same of several runs. They get the same scales where that leaves all
    of them readable, and a series the same colour in all.
    `keys`: unique in the page.
    """
    drawings = [prepare(chart) for chart in charts]
    drawn = [drawing for drawing in drawings if drawing is not None]
    labels = list(dict.fromkeys(series.label for drawing in drawn for series in drawing.series))
    is_sideways = any(map(_needs_room, drawn))
    with mpl.rc_context(_STYLE):
        pictures = [
            _fill(chart, drawing, labels, is_sideways) if drawing is not None else None
            for chart, drawing in zip(charts, drawings, strict=True)
        ]
        _share_scales([picture for picture in pictures if picture is not None])
        return [
            (_svg(picture, key), picture.drawing.left_out) if picture is not None else ("", "nothing to draw")
            for picture, key in zip(pictures, keys, strict=True)
        ]


def _fill(chart: Chart, drawing: Drawing, labels: Sequence[str], is_sideways: bool) -> _Picture:
    has_legend = len(labels) > 1 or chart.by is not None
    figure = Figure(figsize=(_WIDTH, _height(drawing, has_legend, is_sideways)), layout="constrained")
    axes = figure.add_subplot()
    axes.use_sticky_edges = False  # the upper end of a bar is no end of the axis
    picture = _Picture(chart, drawing, figure, axes, is_sideways)
    looks = [_Look.of(labels.index(series.label)) for series in drawing.series]
    handles = _DRAW[drawing.kind](picture, looks)
    _scale(picture)
    for x in chart.marks.values():
        axes.axvline(x, color="#333333", linestyle=(0, (4, 3)), linewidth=1)
    _name_axes(picture)
    if has_legend:
        names = [f"\u200b{series.label}" for series in drawing.series]  # matplotlib hides what begins with `_`
        figure.legend(handles, names, loc="outside upper left", ncols=_columns(names), frameon=False)
    return picture


def _name_axes(picture: _Picture) -> None:
    """Categories need no name but what the chart gives them."""
    chart = picture.chart
    x_label = chart.x_label or ("" if picture.drawing.categories else _label(chart, chart.x))
    picture.places.set_label_text(x_label)
    picture.values.set_label_text(chart.y_label or _label(chart, chart.y[0]))


def _label(chart: Chart, name: str) -> str:
    return chart.labels.get(name, heading(name))


def _columns(labels: Sequence[str]) -> int:
    """Of the legend, as the width holds."""
    return max(1, min(len(labels), 72 // (max(map(len, labels)) + 6)))


def _needs_room(drawing: Drawing) -> bool:
    """Bars of categories whose names have no room below."""
    return drawing.kind in BARS and sum(len(name) + 2 for name in drawing.categories or ()) > 60


def _height(drawing: Drawing, has_legend: bool, is_sideways: bool) -> float:
    legend = 0.2 * math.ceil(len(drawing.series) / 3) if has_legend else 0.0
    if not is_sideways:
        return _HEIGHT + legend
    bars = len(drawing.x) * (min(3, len(drawing.series)) if drawing.kind is ChartKind.bar else 1)
    return max(_HEIGHT, 0.8 + 0.24 * bars) + legend


# --- what is drawn ---


@dataclass(frozen=True, slots=True)
class _Look:
    """Of a series."""

    colour: str
    dash: str
    hatch: str

    @classmethod
    def of(cls, place: int) -> "_Look":
        turn = place // len(_COLOURS)  # how often all colours have been used before
        return cls(_COLOURS[place % len(_COLOURS)], _DASHES[turn % len(_DASHES)], _HATCHES[turn % len(_HATCHES)])


def _lines(picture: _Picture, looks: Sequence[_Look]) -> list[Any]:
    drawing = picture.drawing
    style = "steps-post" if drawing.kind is ChartKind.step else "default"
    handles: list[Any] = []
    for series, look in zip(drawing.series, looks, strict=True):
        has_value = np.isfinite(series.y)
        shown = has_value if drawing.joins_points else slice(None)
        marker = "o" if has_value.sum() <= _MARKED_POINTS else ""
        [handle] = picture.axes.plot(
            drawing.x[shown],
            series.y[shown],
            color=look.colour,
            linestyle=look.dash,
            drawstyle=style,
            linewidth=1.6,
            marker=marker,
            markersize=4,
        )
        handles.append(handle)
    return handles


def _bars(picture: _Picture, looks: Sequence[_Look]) -> list[Any]:
    """Side by side, or on top of each other."""
    drawing, is_stacked = picture.drawing, picture.drawing.kind is not ChartKind.bar
    slot = _slot(drawing.x)
    thickness = slot if is_stacked else slot / len(drawing.series)
    handles: list[Any] = []
    below = np.zeros(len(drawing.x))
    for place, (series, look) in enumerate(zip(drawing.series, looks, strict=True)):
        length = np.nan_to_num(series.y)
        at = drawing.x if is_stacked else drawing.x - slot / 2 + thickness * (place + 0.5)
        handles.append(_bar(picture, look, at, length, thickness, below))
        below = below + length if is_stacked else below
    return handles


def _bar(picture: _Picture, look: _Look, at: Numbers, length: Numbers, thickness: float, start: Numbers) -> Any:
    style: dict[str, Any] = {"color": look.colour, "hatch": look.hatch, "edgecolor": "white", "linewidth": 0.4}
    if picture.is_sideways:
        return picture.axes.barh(at, length, height=thickness, left=start, **style)
    return picture.axes.bar(at, length, width=thickness, bottom=start, **style)


def _slot(x: Numbers) -> float:
    """Of the space between neighbours, what bars fill."""
    gaps = np.diff(np.unique(x))
    if len(gaps):
        return 0.8 * float(gaps.min())
    return 0.8 if _is_whole(x) else 0.1 * abs(float(x[0]))


def _areas(picture: _Picture, looks: Sequence[_Look]) -> list[Any]:
    drawing = picture.drawing
    if len(drawing.x) == 1:  # an area without a width cannot be seen
        return _bars(picture, looks)
    handles = picture.axes.stackplot(
        drawing.x,
        *(np.nan_to_num(series.y) for series in drawing.series),
        colors=[look.colour for look in looks],
        linewidth=0,
    )
    for handle, look in zip(handles, looks, strict=True):
        handle.set_hatch(look.hatch)
        handle.set_edgecolor("white")
    return list(handles)


_DRAW = {
    ChartKind.line: _lines,
    ChartKind.step: _lines,
    ChartKind.bar: _bars,
    ChartKind.stacked_bar: _bars,
    ChartKind.stacked_area: _areas,
}


# --- axes ---


def _scale(picture: _Picture) -> None:
    drawing, values, places = picture.drawing, picture.values, picture.places
    values.set_major_formatter(_formatter(values))
    values.set_major_locator(MaxNLocator(6, steps=_STEPS, integer=_is_whole(drawing.values)))
    places.grid(False)
    if drawing.categories is not None:
        places.set_ticks(drawing.x, labels=_tick_names(drawing.categories, picture.is_sideways))
    elif drawing.is_time:
        locator = AutoDateLocator(maxticks=7)  # type: ignore[no-untyped-call]
        places.set_major_locator(locator)
        places.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    else:
        places.set_major_locator(MaxNLocator(10, steps=_STEPS, integer=_is_whole(drawing.x)))
        places.set_major_formatter(_formatter(places))
    if _starts_at_zero(drawing):
        _set_limits(values, 0, _limits(values)[1])
    if drawing.kind is ChartKind.stacked_area and len(drawing.x) > 1:
        _set_limits(places, drawing.x[0], drawing.x[-1])


def _is_whole(values: Numbers) -> bool:
    return bool((values[np.isfinite(values)] % 1 == 0).all())


def _tick_names(names: Sequence[str], is_sideways: bool) -> list[str]:
    """All of them, or as many as have room below a line."""
    every = 1 if is_sideways else math.ceil(sum(len(name) + 2 for name in names) / 80)
    return [name if place % every == 0 else "" for place, name in enumerate(names)]


def _starts_at_zero(drawing: Drawing) -> bool:
    """Nothing is under zero; and lines that are far from it would lose their differences for no gain."""
    least, greatest = drawing.values.min(), drawing.values.max()
    is_line = drawing.kind in (ChartKind.line, ChartKind.step)
    return bool(least >= 0 and greatest > 0 and (not is_line or least <= 0.7 * greatest))


def _limits(axis: Axis) -> tuple[float, float]:
    low, high = axis.get_view_interval()
    return float(low), float(high)


def _set_limits(axis: Axis, low: float, high: float) -> None:
    set_limits = axis.axes.set_xlim if axis is axis.axes.xaxis else axis.axes.set_ylim
    set_limits(low, high)


def _share_scales(pictures: Sequence[_Picture]) -> None:
    """So that lengths beside each other can be compared; times of day and names of categories are each run's own."""
    _share([picture.values for picture in pictures])
    if not any(picture.drawing.categories or picture.drawing.is_time for picture in pictures):
        _share([picture.places for picture in pictures])
    for picture in pictures:
        picture.axes.yaxis.set_inverted(picture.is_sideways)  # the first on top
        _name_marks(picture.axes, picture.chart.marks)


def _share(axes: Sequence[Axis]) -> None:
    """Unless the smallest would be squeezed until nothing is seen of it."""
    limits = [_limits(axis) for axis in axes]
    spans = [high - low for low, high in limits]
    if spans and max(spans) <= _MAX_SQUEEZE * min(spans):
        for axis in axes:
            _set_limits(axis, min(low for low, _ in limits), max(high for _, high in limits))


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


# --- into the page ---


def _svg(picture: _Picture, key: str) -> str:
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": key}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has them
        picture.figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(text.getvalue(), picture.chart.title, key)


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
