"""One report from run folders to files: open, account, show. The composition root of `report`."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from specreason_batch.accounting import latency, whatif
from specreason_batch.accounting.account import account
from specreason_batch.accounting.comparison import compare
from specreason_batch.accounting.figures import Report, RunReport
from specreason_batch.accounting.latency_constants import LatencyConstants, read_calibration
from specreason_batch.accounting.load import RunFiles
from specreason_batch.accounting.prices import Prices
from specreason_batch.report.config import ReportConfig
from specreason_batch.report.digits import number
from specreason_batch.report.documents import as_json, chart_frames, figures_frame, table_frames
from specreason_batch.report.output import (
    CHARTS,
    DOCUMENT,
    FIGURES,
    PAGE,
    TABLES,
    check_folder,
    replaced,
    write_frame,
    write_frames,
)
from specreason_batch.report.runs import default_output, find_runs, labels
from specreason_batch.report.side_by_side import HeadlineFigure, lay_out
from specreason_batch.report.terminal import tell
from specreason_batch.store.durable import write_text

# What is asked first: how good, how fast, for how much, what the draft's part was; then the amounts behind that.
HEADLINE = (
    HeadlineFigure("chains", "num_chains", "chains committed"),
    HeadlineFigure("chains", "accuracy", "accuracy"),
    HeadlineFigure("wall_clock", "chains_per_second"),
    HeadlineFigure("cost", "money_per_correct_answer"),
    HeadlineFigure("acceptance", "acceptance", "drafts accepted"),
    HeadlineFigure("acceptance", "draft_step_share", "steps written by the draft"),
    HeadlineFigure("tokens", "kept_tokens", "tokens kept"),
    HeadlineFigure("tokens", "wasted_share", "tokens thrown away"),
    HeadlineFigure("wall_clock", "tokens_per_second", "tokens generated a second"),
    HeadlineFigure("wall_clock", "attempt_seconds", "wall-clock, of all shards"),
    HeadlineFigure("latency", "active_seconds_p50", "median time of a chain"),
    HeadlineFigure("latency", "stream_seconds_mean"),
    HeadlineFigure("latency", "stream_speed_up"),
    HeadlineFigure("cost", "device_hours"),
    HeadlineFigure("cost", "core_hours"),
    HeadlineFigure("cost", "money"),
    HeadlineFigure("cost", "money_per_chain"),
)


def report(config: ReportConfig, console: Console, command: str = "") -> Report:
    """The whole job. Raises InvalidInput, OSError; then an earlier report is as it was."""
    paths = find_runs(config.run_names)
    folder = Path(config.output) if config.output is not None else default_output(paths)
    check_folder(folder)
    constants = read_calibration(Path(config.calibration)) if config.calibration is not None else config.latency
    made = replace(make_report(paths, config.cost, constants, config.baseline), made_at=time.time(), command=command)
    shown = config.shown_sections([laid.name for laid in lay_out(made)])
    write_report(made, HEADLINE, folder)
    tell(made, HEADLINE, shown, console)
    console.print(f"{folder / PAGE}", style="bold", highlight=False, markup=False, soft_wrap=True)
    return made


def make_report(
    paths: Sequence[Path], prices: Prices, constants: LatencyConstants | None = None, baseline: str | None = None
) -> Report:
    """Every section of these runs. `baseline`: the label of the one to compare with. Raises InvalidInput."""
    files = [RunFiles(path, label) for path, label in zip(paths, labels(paths), strict=True)]
    runs = tuple(_account(run, prices, constants) for run in files)
    if len(runs) == 1:
        return Report(runs=runs, warnings=tuple(_unfinished(run) for run in runs if not run.is_finished))
    section, warnings = compare(files, runs, constants, baseline)
    return Report(runs=runs, comparison=section, warnings=warnings)


def _account(run: RunFiles, prices: Prices, constants: LatencyConstants | None) -> RunReport:
    """Its sections in the order of reading."""
    made = account(run, prices)
    replayed = whatif.section(run)
    return replace(
        made, sections=(*made.sections, latency.section(run, constants), *([replayed] if replayed is not None else []))
    )


def _unfinished(run: RunReport) -> str:
    done, expected = (run.section("chains").figure(name).value for name in ("num_chains", "num_expected"))
    return f"{run.label}: not finished: figures are of the {number(done)} committed chains of {number(expected)}"


def write_report(report: Report, figures: Sequence[HeadlineFigure], folder: Path) -> None:
    """All files, or none. Raises InvalidInput, OSError."""
    from specreason_batch.report.page import as_html  # it imports matplotlib, which takes a second

    with replaced(folder) as staged:
        write_text(staged / DOCUMENT, as_json(report))
        write_frame(staged / FIGURES, figures_frame(report))
        write_frames(staged / TABLES, table_frames(report))
        write_frames(staged / CHARTS, chart_frames(report))
        write_text(staged / PAGE, as_html(report, figures))
