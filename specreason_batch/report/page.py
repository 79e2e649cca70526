"""A report as one HTML page that needs nothing else: no script, no font, no picture from anywhere.

What it looks like is page.html.jinja. Text of whatever origin is escaped there; only our own drawings are not.
Imports matplotlib: import this module late.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

import jinja2
from markupsafe import Markup

from specreason_batch.accounting.figures import Chart, Report, Table
from specreason_batch.report.digits import column, heading
from specreason_batch.report.plot import draw
from specreason_batch.report.side_by_side import HeadlineFigure, Laid, Owned, headline, lay_out

_MAX_ROWS = 50  # of a table; all are in its Parquet file


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A chart in the page."""

    run: str | None
    chart: Chart
    svg: Markup
    left_out: str  # what the drawing does not show


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column's heading."""

    label: str
    unit: str
    is_number: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A table in the page."""

    run: str | None
    table: Table
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def num_left_out(self) -> int:
        return self.table.frame.height - len(self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A section in the page."""

    laid: Laid
    tables: tuple[tuple[Shown, ...], ...]  # of several runs: the same table of all, then the next
    drawings: tuple[tuple[Drawn, ...], ...]  # likewise


def as_html(report: Report, figures: Sequence[HeadlineFigure]) -> str:
    """`figures`: shown at the top."""
    parts = [_part(laid) for laid in lay_out(report)]
    made_at = datetime.fromtimestamp(report.made_at, tz=UTC)
    return _template().render(report=report, made_at=made_at, headline=headline(report, figures), parts=parts)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")


def _part(laid: Laid) -> Part:
    return Part(
        laid=laid,
        tables=tuple(tuple(map(_shown, group)) for group in _groups(laid.tables)),
        drawings=tuple(tuple(_drawn(owned, laid.name) for owned in group) for group in _groups(laid.charts)),
    )


def _groups(items: Sequence[Owned]) -> list[list[Owned]]:
    """The same of all runs; all together where there is nothing to tell apart."""
    return [list(group) for _, group in groupby(items, key=lambda owned: owned.run is not None and owned.item.name)]


def _drawn(owned: Owned, section: str) -> Drawn:
    svg, left_out = draw(owned.item, f"{section}-{owned.item.name}-{owned.place}")
    return Drawn(run=owned.run, chart=owned.item, svg=Markup(svg), left_out=left_out)


def _shown(owned: Owned) -> Shown:
    table: Table = owned.item
    columns = tuple(_column(table, name) for name in table.frame.columns)
    cells = [column(values.to_list()) for values in table.frame.head(_MAX_ROWS)]
    return Shown(run=owned.run, table=table, columns=columns, rows=tuple(zip(*cells, strict=True)))


def _column(table: Table, name: str) -> Column:
    label, unit = table.labels.get(name, heading(name)), table.units.get(name, "")
    return Column(label=label, unit="" if unit == label else unit, is_number=table.frame.schema[name].is_numeric())
