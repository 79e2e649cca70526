"""A report laid out for reading: each section once, with its runs beside each other. Pure.

Does not know: what any section is about, terminals, HTML.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import polars as pl

from specreason_batch.accounting.figures import Basis, Chart, Figure, Report, Section, Table
from specreason_batch.report.digits import interval, quantities, scale

RUN = "run"  # the column of a table or chart of several runs that says whose a row is


class HeadlineFigure(NamedTuple):
    """A figure that is shown first, away from its section."""

    section: str
    name: str
    label: str = ""  # in place of its own, which its section explains


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run's value of a figure."""

    value: str
    interval: str = ""
    basis: Basis | None = None  # None: the run has no such figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure of all runs."""

    label: str
    cells: tuple[Cell, ...]  # a run each
    notes: tuple[str, ...] = ()

    @property
    def basis(self) -> Basis | None:
        """None: it differs between runs, and stands in each cell."""
        found = {cell.basis for cell in self.cells} - {None}
        return found.pop() if len(found) == 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gallery:
    """One chart of all runs that have it."""

    runs: tuple[str, ...]  # their labels; a single empty one: there is nothing to tell apart
    charts: tuple[Chart, ...]  # a run each


@dataclass(frozen=True, slots=True, kw_only=True)
class Laid:
    """One section of all runs that have it."""

    name: str
    title: str
    texts: tuple[str, ...]
    columns: tuple[str, ...]  # labels of runs; a single empty one: there is nothing to tell apart
    rows: tuple[Row, ...]
    tables: tuple[Table, ...]  # of all runs together, with a column `run`
    galleries: tuple[Gallery, ...]


def lay_out(report: Report) -> list[Laid]:
    """The comparison first, then every section in the runs' order."""
    compared = [_lay(report.comparison.name, [("", report.comparison)])] if report.comparison else []
    runs = [(label, run.sections) for label, run in zip(_labels(report), report.runs, strict=True)]
    names = _in_order([[section.name for section in sections] for _, sections in runs])
    return compared + [
        _lay(name, [(label, section) for label, sections in runs for section in sections if section.name == name])
        for name in names
    ]


def headline(report: Report, figures: Sequence[HeadlineFigure]) -> list[Row]:
    """These figures of all runs, with notes where one is unknown; one that no run has is left out."""
    rows = []
    labels = _labels(report)
    for wanted in figures:
        found = [_find(run.sections, wanted.section, wanted.name) for run in report.runs]
        if any(figure is not None for figure in found):
            row = _row(list(zip(labels, found, strict=True)), _why_unknown)
            rows.append(replace(row, label=wanted.label or row.label))
    return rows


def all_notes(rows: Sequence[Row]) -> list[str]:
    """Each once, where rows refer to them by number."""
    return list(dict.fromkeys(note for row in rows for note in row.notes))


def first_rows(frame: pl.DataFrame, most: int) -> pl.DataFrame:
    """Of each run as many as of the others."""
    if frame.height <= most:
        return frame
    if RUN not in frame.columns:
        return frame.head(most)
    return frame.group_by(RUN, maintain_order=True).head(max(1, most // frame[RUN].n_unique()))


def with_run(frame: pl.DataFrame, run: str | None) -> pl.DataFrame:
    """With the run's label in front; a comparison's frame may have a column of its own that says whose a row is."""
    if run is None and RUN in frame.columns:
        return frame
    assert RUN not in frame.columns, f"a run's own table has a column {RUN!r}"
    return frame.select(pl.lit(run, pl.String).alias(RUN), pl.all())


def _labels(report: Report) -> list[str]:
    """Of the runs; nothing where there is nothing to tell apart."""
    return [run.label if len(report.runs) > 1 else "" for run in report.runs]


def _why_unknown(figure: Figure) -> str:
    return figure.note if figure.value is None else ""


def _note(figure: Figure) -> str:
    return figure.note


def _find(sections: Iterable[Section], section_name: str, name: str) -> Figure | None:
    return next(
        (item for section in sections if section.name == section_name for item in section.figures if item.name == name),
        None,
    )


def _lay(name: str, owned: Sequence[tuple[str, Section]]) -> Laid:
    """`owned`: the section of each run that has it, with the run's label."""
    names = _in_order([[figure.name for figure in section.figures] for _, section in owned])
    return Laid(
        name=name,
        title=owned[0][1].title,
        texts=_told([(label, section.text) for label, section in owned]),
        columns=tuple(label for label, _ in owned),
        rows=tuple(_row([(label, _find([section], name, figure)) for label, section in owned]) for figure in names),
        tables=tuple(_tables(owned)),
        galleries=tuple(_galleries(owned)),
    )


def _row(figures: Sequence[tuple[str, Figure | None]], note: Callable[[Figure], str] = _note) -> Row:
    first = next(figure for _, figure in figures if figure is not None)
    return Row(
        label=first.label,
        cells=tuple(_cells([figure for _, figure in figures], first.unit)),
        notes=_told([(label, note(figure)) for label, figure in figures if figure is not None]),
    )


def _cells(figures: Sequence[Figure | None], unit: str) -> Iterator[Cell]:
    assert all(figure is None or figure.unit == unit for figure in figures), f"a figure has two units: {figures}"
    values = [figure.value if figure is not None else None for figure in figures]
    factor, _ = scale(values, unit)
    for figure, text in zip(figures, quantities(values, unit), strict=True):
        if figure is None:
            yield Cell(value="")
        else:
            low, high = (bound if bound is None else bound * factor for bound in (figure.low, figure.high))
            yield Cell(value=text, interval=interval(low, high), basis=figure.basis)


def _tables(owned: Sequence[tuple[str, Section]]) -> Iterator[Table]:
    for name in _in_order([[table.name for table in section.tables] for _, section in owned]):
        found = [(label, table) for label, section in owned for table in section.tables if table.name == name]
        for basis in dict.fromkeys(table.basis for _, table in found):
            yield _together([(label, table) for label, table in found if table.basis is basis])


def _together(found: Sequence[tuple[str, Table]]) -> Table:
    """The same table of several runs as one, with a column that says whose a row is."""
    label, first = found[0]
    if len(found) == 1:
        return replace(first, title=f"{first.title}: {label}") if label else first
    tables = [table for _, table in found]
    return replace(
        first,
        frame=pl.concat([with_run(table.frame, label) for label, table in found], how="diagonal_relaxed"),
        labels={name: text for table in tables for name, text in table.labels.items()},
        units={name: unit for table in tables for name, unit in table.units.items()},
        note="; ".join(_told([(label, table.note) for label, table in found])),
    )


def _galleries(owned: Sequence[tuple[str, Section]]) -> Iterator[Gallery]:
    for name in _in_order([[chart.name for chart in section.charts] for _, section in owned]):
        found = [(label, chart) for label, section in owned for chart in section.charts if chart.name == name]
        yield Gallery(runs=tuple(label for label, _ in found), charts=tuple(chart for _, chart in found))


def _told(texts: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """What runs say: once where all say the same, else under the labels of those that do."""
    said: dict[str, list[str]] = {}
    for label, text in texts:
        said.setdefault(text, []).append(label)
    if len(said) == 1:
        return tuple(text for text in said if text)
    return tuple(f"{', '.join(labels)}: {text}" for text, labels in said.items() if text)


def _in_order(lists: Iterable[Iterable[str]]) -> list[str]:
    """All names once, in the order of their first appearance."""
    return list(dict.fromkeys(name for names in lists for name in names))
