"""A report as one HTML page that needs nothing else: no script, no font, no picture from anywhere.

What it looks like is page.html.jinja. Text of whatever origin is escaped there; only our own drawings are not.
Imports matplotlib: import this module late.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

import jinja2
from markupsafe import Markup

from specreason_batch.accounting.figures import Basis, Report, Table
from specreason_batch.report.digits import column, heading
from specreason_batch.report.plot import draw
from specreason_batch.report.side_by_side import (
    Gallery,
    HeadlineFigure,
    Laid,
    all_notes,
    first_rows,
    headline,
    lay_out,
)

_MAX_ROWS = 50  # of a table; all are in its Parquet file
_MAX_OPEN_ROWS = 20  # a longer table is folded


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A chart in the page."""

    caption: str
    basis: Basis
    notes: tuple[str, ...]
    svg: Markup


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawings:
    """Charts beside each other."""

    title: str = ""  # of all; '': each is captioned with its own
    note: str = ""
    drawn: tuple[Drawn, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column's heading."""

    label: str
    unit: str
    is_number: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A table in the page."""

    table: Table
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def is_folded(self) -> bool:
        return len(self.rows) > _MAX_OPEN_ROWS

    @property
    def num_left_out(self) -> int:
        return self.table.frame.height - len(self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A section in the page."""

    laid: Laid
    tables: tuple[Shown, ...]
    drawings: tuple[Drawings, ...]


def as_html(report: Report, figures: Sequence[HeadlineFigure]) -> str:
    """`figures`: shown at the top."""
    parts = [_part(laid) for laid in lay_out(report)]
    made_at = datetime.fromtimestamp(report.made_at, tz=UTC)
    rows = headline(report, figures)
    return _template().render(
        report=report, made_at=made_at, headline=rows, headline_notes=all_notes(rows), parts=parts
    )


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
    return Part(laid=laid, tables=tuple(map(_shown, laid.tables)), drawings=tuple(_drawings(laid)))


def _drawings(laid: Laid) -> Iterator[Drawings]:
    """The charts that one run has, together; of several, each chart's runs."""
    for is_alone, galleries in groupby(laid.galleries, key=lambda gallery: len(gallery.charts) == 1):
        if is_alone:
            yield Drawings(drawn=tuple(drawn for gallery in galleries for drawn in _alone(gallery, laid.name)))
        else:
            yield from (_side_by_side(gallery, laid.name) for gallery in galleries)


def _alone(gallery: Gallery, section: str) -> list[Drawn]:
    [run], [chart] = gallery.runs, gallery.charts
    return _drawn(gallery, section, [f"{chart.title}: {run}" if run else chart.title], [chart.note])


def _side_by_side(gallery: Gallery, section: str) -> Drawings:
    notes = [chart.note for chart in gallery.charts]
    is_common = len(set(notes)) == 1
    return Drawings(
        title=gallery.charts[0].title,
        note=notes[0] if is_common else "",
        drawn=tuple(_drawn(gallery, section, gallery.runs, [""] * len(notes) if is_common else notes)),
    )


def _drawn(gallery: Gallery, section: str, captions: Sequence[str], notes: Sequence[str]) -> list[Drawn]:
    keys = [f"{section}-{chart.name}-{place}" for place, chart in enumerate(gallery.charts)]
    return [
        Drawn(caption=caption, basis=chart.basis, notes=tuple(filter(None, (note, left_out))), svg=Markup(svg))
        for chart, (svg, left_out), caption, note in zip(
            gallery.charts, draw(gallery.charts, keys), captions, notes, strict=True
        )
    ]


def _shown(table: Table) -> Shown:
    frame = first_rows(table.frame, _MAX_ROWS)
    columns = tuple(_column(table, name) for name in frame.columns)
    cells = [column(values.to_list()) for values in frame]
    return Shown(table=table, columns=columns, rows=tuple(zip(*cells, strict=True)))


def _column(table: Table, name: str) -> Column:
    label, unit = table.labels.get(name, heading(name)), table.units.get(name, "")
    return Column(label=label, unit="" if unit == label else unit, is_number=table.frame.schema[name].is_numeric())
