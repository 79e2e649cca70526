"""A report laid out for reading: each section once, with its runs beside each other. Pure.

Does not know: what any section is about, terminals, HTML.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from specreason_batch.accounting.figures import Basis, Chart, Figure, Report, Section, Table
from specreason_batch.report.digits import interval, quantity

HeadlineFigure = tuple[str, str]  # names of a section and of a figure in it


class _Named(Protocol):
    @property
    def name(self) -> str: ...


_N = TypeVar("_N", bound=_Named)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run's value of a figure."""

    value: str
    interval: str = ""
    basis: Basis | None = None  # None: the run has no such figure

    @classmethod
    def of(cls, figure: Figure | None) -> "Cell":
        if figure is None:
            return cls(value="")
        return cls(
            value=quantity(figure.value, figure.unit), interval=interval(figure.low, figure.high), basis=figure.basis
        )


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
class Owned:
    """A table or chart, and whose it is."""

    run: str | None  # None: of the only run, or of all together
    place: int  # of the run, among those that have the section
    item: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Laid:
    """One section of all runs that have it."""

    name: str
    title: str
    texts: tuple[str, ...]
    columns: tuple[str, ...]  # labels of runs; a single empty one: there is nothing to tell apart
    rows: tuple[Row, ...]
    tables: tuple[Owned, ...]
    charts: tuple[Owned, ...]


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
    for section_name, name in figures:
        found = [_find(run.sections, section_name, name) for run in report.runs]
        if any(figure is not None for figure in found):
            rows.append(_row(list(zip(labels, found, strict=True)), _why_unknown))
    return rows


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
    first = owned[0][1]
    names = _in_order([[figure.name for figure in section.figures] for _, section in owned])
    return Laid(
        name=name,
        title=first.title,
        texts=_told([(label, section.text) for label, section in owned]),
        columns=tuple(label for label, _ in owned),
        rows=tuple(_row([(label, _find([section], name, figure)) for label, section in owned]) for figure in names),
        tables=tuple(_owned(owned, lambda section: section.tables)),
        charts=tuple(_owned(owned, lambda section: section.charts)),
    )


def _row(figures: Sequence[tuple[str, Figure | None]], note: Callable[[Figure], str] = _note) -> Row:
    first = next(figure for _, figure in figures if figure is not None)
    notes = [(label, note(figure)) for label, figure in figures if figure is not None]
    return Row(
        label=first.label,
        cells=tuple(Cell.of(figure) for _, figure in figures),
        notes=_told(notes),
    )


def _owned(
    owned: Sequence[tuple[str, Section]], items: Callable[[Section], Sequence[Table] | Sequence[Chart]]
) -> Iterator[Owned]:
    """The same table or chart of all runs together, then the next."""
    for name in _in_order([[item.name for item in items(section)] for _, section in owned]):
        for place, (label, section) in enumerate(owned):
            found = [item for item in items(section) if item.name == name]
            yield from (Owned(run=label or None, place=place, item=item) for item in found)


def _told(texts: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """What runs say: once where all say the same, else each under its label."""
    said = [(label, text) for label, text in texts if text]
    if len(said) == len(texts) and len({text for _, text in said}) == 1:
        return (said[0][1],)
    return tuple(f"{label}: {text}" if label else text for label, text in said)


def _in_order(lists: Iterable[Iterable[str]]) -> list[str]:
    """All names once, in the order of their first appearance."""
    return list(dict.fromkeys(name for names in lists for name in names))
