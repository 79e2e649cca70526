"""What a report consists of: figures, tables and charts in sections, each saying what it is and where it came from.

Does not know: how they are computed, how they are shown.
"""

from dataclasses import dataclass, field
from enum import StrEnum

import polars as pl


class Basis(StrEnum):
    """Where a figure comes from. A reader must never take one for another."""

    measured = "measured"  # counted or clocked while it happened
    attributed = "attributed"  # a share of something measured, given out by a rule that the note states
    modelled = "modelled"  # computed from constants or assumptions that the note states


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number."""

    name: str  # snake_case, unique in its section
    label: str  # for people
    value: float | int | None  # None: unknown, and the note says why
    unit: str = ""  # "tokens", "s", "chains/s", "USD", "%" (of 100) ...; "": a plain number
    basis: Basis = Basis.measured
    low: float | None = None  # of the 95 % confidence interval
    high: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of figures. Column names are snake_case."""

    name: str  # unique in its section
    title: str
    frame: pl.DataFrame
    labels: dict[str, str] = field(default_factory=dict)  # of columns, for people; default: the name, spaced
    units: dict[str, str] = field(default_factory=dict)  # of columns, as in Figure
    basis: Basis = Basis.measured
    note: str = ""


class ChartKind(StrEnum):
    """How a chart is drawn."""

    line = "line"
    step = "step"  # a line that holds its value until the next x
    bar = "bar"  # several y: side by side
    stacked_bar = "stacked_bar"
    stacked_area = "stacked_area"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A picture of a frame."""

    name: str  # unique in its section
    title: str
    kind: ChartKind
    frame: pl.DataFrame
    x: str  # its column; numbers, text (categories) or timestamps
    y: tuple[str, ...]  # its columns
    by: str | None = None  # column whose values are lines (or bars) of their own; then a single y
    labels: dict[str, str] = field(default_factory=dict)  # of columns
    x_label: str = ""
    y_label: str = ""
    marks: dict[str, float] = field(default_factory=dict)  # vertical lines by their labels, e.g. the threshold
    basis: Basis = Basis.measured
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Figures that belong together."""

    name: str  # snake_case, unique in a report
    title: str
    text: str = ""  # a paragraph for people: what this is, and what it is not
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()

    def figure(self, name: str) -> Figure:
        """Raises KeyError."""
        return {figure.name: figure for figure in self.figures}[name]

    def table(self, name: str) -> Table:
        """Raises KeyError."""
        return {table.name: table for table in self.tables}[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """One run."""

    label: str  # unique in a report
    output_dir: str
    policy: str
    is_finished: bool  # False: figures are of what is committed so far
    sections: tuple[Section, ...]

    def section(self, name: str) -> Section:
        """Raises KeyError."""
        return {section.name: section for section in self.sections}[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One or more runs, side by side where there are several."""

    runs: tuple[RunReport, ...]
    comparison: Section | None = None
    warnings: tuple[str, ...] = ()  # what a reader must know before any figure
    made_at: float = 0.0  # seconds since the epoch
    command: str = ""
