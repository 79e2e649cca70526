"""A report on the terminal: what matters first, sections where they are asked for. Does not know: files."""

from collections.abc import Sequence

import polars as pl
from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from specreason_batch.accounting.figures import Basis, Report, Table
from specreason_batch.report.digits import column, heading
from specreason_batch.report.side_by_side import (
    Cell,
    HeadlineFigure,
    Laid,
    Row,
    all_notes,
    first_rows,
    headline,
    lay_out,
)

_MAX_ROWS = 20  # of a table
_MAX_CELL = 60  # characters of a text
_FIGURE_WIDTH, _RUN_WIDTH = 44, 18  # columns that a figure's name and basis take, and a run
_STYLES = {Basis.measured: "green", Basis.attributed: "blue", Basis.modelled: "yellow"}


def tell(report: Report, figures: Sequence[HeadlineFigure], sections: Sequence[str], console: Console) -> None:
    """`figures`: the headline; `sections`: names of those to show below it."""
    for warning in report.warnings:
        _say(console, f"warning: {warning}", "yellow")
    _print_figures(console, headline(report, figures), [run.label for run in report.runs])
    for laid in lay_out(report):
        if laid.name in sections:
            _print_section(console, laid)


def _print_section(console: Console, laid: Laid) -> None:
    console.print()
    console.rule(Text(laid.title, style="bold"), align="left")
    for text in laid.texts:
        _say(console, text)
    _print_figures(console, laid.rows, laid.columns)
    for table in laid.tables:
        _print_table(console, table, laid.name)
    for gallery in laid.galleries:
        _say(console, f"chart in report.html: {gallery.charts[0].title}", "dim")


def _print_figures(console: Console, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """As many runs beside each other as the width holds; the others below them; then notes."""
    if not rows:
        return
    notes = all_notes(rows)
    size = max(1, (console.width - _FIGURE_WIDTH) // _RUN_WIDTH)
    for first in range(0, len(columns), size):
        grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, show_header=len(columns) > 1)
        grid.add_column("")
        for label in columns[first : first + size]:
            grid.add_column(Text(label), justify="right", overflow="fold")
        grid.add_column("")
        for row in rows:
            grid.add_row(_label(row, notes), *map(_cell, row.cells[first : first + size]), _basis(row))
        console.print(grid)
    for number, note in enumerate(notes, start=1):
        _say(console, f"{number}: {note}", "dim")


def _label(row: Row, notes: Sequence[str]) -> Text:
    numbers = ", ".join(str(notes.index(note) + 1) for note in row.notes)
    return Text(row.label).append(f" [{numbers}]" if numbers else "", style="dim")


def _cell(cell: Cell) -> Text:
    text = Text(cell.value)
    return text.append(f"\n{cell.interval}", style="dim") if cell.interval else text


def _basis(row: Row) -> Text:
    if row.basis is not None:
        return Text(row.basis, style=_STYLES[row.basis])
    return Text(", ".join(dict.fromkeys(cell.basis for cell in row.cells if cell.basis is not None)))


def _print_table(console: Console, table: Table, section: str) -> None:
    frame = first_rows(table.frame, _MAX_ROWS)
    console.print(Text(table.title, style="bold").append(f"  {table.basis}", _STYLES[table.basis]))
    console.print(_grid(table, frame))
    if table.note:
        _say(console, table.note, "dim")
    if frame.height < table.frame.height:
        file = f"tables/{section}__{table.name}.parquet"
        _say(console, f"the first {frame.height} of {table.frame.height:,} rows; all: {file}", "dim")


def _grid(table: Table, frame: pl.DataFrame) -> Grid:
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, kind in frame.schema.items():
        label, unit = table.labels.get(name, heading(name)), table.units.get(name, "")
        text = Text(f"{label} ({unit})" if unit not in ("", label) else label)
        grid.add_column(text, justify="right" if kind.is_numeric() else "left")
    for row in zip(*(column(values.to_list()) for values in frame), strict=True):
        grid.add_row(*(Text(_cut(text)) for text in row))
    return grid


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_CELL else f"{text[: _MAX_CELL - 1]}…"


def _say(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, highlight=False, markup=False)
