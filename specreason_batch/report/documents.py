"""A report as data: report.json and Parquet, for scripts (docs/reports.md has their schemas).

The same runs give the same bytes, but for `made_at` and `command`: fractions are cut to the digits that do not depend
on the order in which threads add numbers up. Does not know: where anything is written.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any

import polars as pl
from polars import selectors

from specreason_batch.accounting.figures import Chart, Figure, Report, RunReport, Section, Table
from specreason_batch.report.side_by_side import with_run

SCHEMA_VERSION = 1
FIGURES_SCHEMA = pl.Schema(
    {
        "run": pl.String,
        "section": pl.String,
        "name": pl.String,
        "label": pl.String,
        "value": pl.Float64,
        "unit": pl.String,
        "basis": pl.String,
        "low": pl.Float64,
        "high": pl.Float64,
        "note": pl.String,
    }
)
_DIGITS = 12  # significant ones of a fraction
_NAME = re.compile(r"[a-z0-9_]+")


def as_json(report: Report) -> str:
    """The whole report; no NaN or infinity, which JSON has not: they are null."""
    return json.dumps(as_document(report), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def as_document(report: Report) -> dict[str, Any]:
    """Sections, figures and tables by their names."""
    _check_names(report)
    return {
        "schema_version": SCHEMA_VERSION,
        "made_at": report.made_at,
        "command": report.command,
        "warnings": list(report.warnings),
        "runs": [_run(run) for run in report.runs],
        "comparison": None if report.comparison is None else _section(report.comparison),
    }


def figures_frame(report: Report) -> pl.DataFrame:
    """One row a figure; `run` is null for figures of the comparison."""
    rows = [
        {"run": run, "section": section.name, **_figure(figure), "name": figure.name}
        for run, section in _sections(report)
        for figure in section.figures
    ]
    for row in rows:
        row["value"] = None if row["value"] is None else float(row["value"])
    return pl.DataFrame(rows, schema=FIGURES_SCHEMA)


def table_frames(report: Report) -> dict[str, pl.DataFrame]:
    """By `<section>__<table>`: the table of all runs, with a column `run`."""
    return _frames((run, section, table) for run, section in _sections(report) for table in section.tables)


def chart_frames(report: Report) -> dict[str, pl.DataFrame]:
    """By `<section>__<chart>`: what is drawn, of all runs."""
    return _frames((run, section, chart) for run, section in _sections(report) for chart in section.charts)


def _frames(items: Iterable[tuple[str | None, Section, Table | Chart]]) -> dict[str, pl.DataFrame]:
    found: dict[str, list[pl.DataFrame]] = {}
    for run, section, item in items:
        found.setdefault(f"{section.name}__{item.name}", []).append(with_run(item.frame, run))
    return {name: _rounded(pl.concat(frames, how="diagonal_relaxed")) for name, frames in found.items()}


def _rounded(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(selectors.float().round_sig_figs(_DIGITS))


def _sections(report: Report) -> Iterator[tuple[str | None, Section]]:
    """Every section with its run's label; the comparison's is None."""
    if report.comparison is not None:
        yield None, report.comparison
    yield from ((run.label, section) for run in report.runs for section in run.sections)


# --- JSON ---


def _run(run: RunReport) -> dict[str, Any]:
    return {
        "label": run.label,
        "output_dir": run.output_dir,
        "policy": run.policy,
        "is_finished": run.is_finished,
        "sections": {section.name: _section(section) for section in run.sections},
    }


def _section(section: Section) -> dict[str, Any]:
    return {
        "title": section.title,
        "text": section.text,
        "figures": {figure.name: _figure(figure) for figure in section.figures},
        "tables": {table.name: _table(table) for table in section.tables},
    }


def _figure(figure: Figure) -> dict[str, Any]:
    return {
        "label": figure.label,
        "value": _plain(figure.value),
        "unit": figure.unit,
        "basis": figure.basis.value,
        "low": _plain(figure.low),
        "high": _plain(figure.high),
        "note": figure.note,
    }


def _table(table: Table) -> dict[str, Any]:
    return {
        "title": table.title,
        "basis": table.basis.value,
        "note": table.note,
        "units": {name: table.units[name] for name in table.frame.columns if table.units.get(name)},
        "rows": [_plain(row) for row in table.frame.iter_rows(named=True)],
    }


def _plain(value: Any) -> Any:
    """What JSON can hold. Raises TypeError for what no table should."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float | Decimal):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no place in a report")


# --- names ---


def _check_names(report: Report) -> None:
    """Names are keys and file names."""
    _check(run.label for run in report.runs)
    for sections in [*(run.sections for run in report.runs), [report.comparison] if report.comparison else []]:
        _check((section.name for section in sections), _NAME)
        for section in sections:
            for items in (section.figures, section.tables, section.charts):
                _check((item.name for item in items), _NAME)


def _check(names: Iterable[str], pattern: re.Pattern[str] | None = None) -> None:
    names = list(names)
    assert len(set(names)) == len(names), f"a name is used twice: {names}"
    assert pattern is None or all(pattern.fullmatch(name) for name in names), f"not snake_case: {names}"
