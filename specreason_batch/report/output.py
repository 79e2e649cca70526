"""The report's folder: whole or not at all, in place of an earlier report. Does not know: what a report says.

report/report.html               one page, for people
report/report.json               the same figures and tables, for scripts
report/figures.parquet           one row a figure
report/tables/<section>__<table>.parquet
report/charts/<section>__<chart>.parquet      what the page's charts draw
"""

import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from specreason_batch.store.durable import sync_folder
from specreason_batch.types import InvalidInput

PAGE, DOCUMENT, FIGURES = "report.html", "report.json", "figures.parquet"
TABLES, CHARTS = "tables", "charts"


def check_folder(folder: Path) -> None:
    """Raises InvalidInput if it holds anything that no report holds: nothing else is ever replaced."""
    if folder.exists() and not folder.is_dir():
        raise InvalidInput(f"output: {folder} is a file; allowed: a new folder, or that of an earlier report")
    other = next(_of_no_report(folder), None) if folder.exists() else None
    if other is not None:
        raise InvalidInput(
            f"output: {folder} holds {str(other.relative_to(folder))!r}, which is of no report; "
            "allowed: a new folder, or that of an earlier report"
        )


def _of_no_report(folder: Path) -> Iterator[Path]:
    """What is found without going deeper than a report does: it may be anyone's folder, of any size."""
    yield from (path for path in sorted(folder.iterdir()) if path.name not in (PAGE, DOCUMENT, FIGURES, TABLES, CHARTS))
    for inside in (folder / TABLES, folder / CHARTS):
        if inside.is_dir():
            yield from (path for path in sorted(inside.iterdir()) if path.suffix != ".parquet" or path.is_dir())


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder`, which takes its place if all goes well and is removed if not.

    A process that is killed between the two renames, which take microseconds, leaves the earlier report whole in the
    hidden folder `.<name>.earlier-...`. A link stays, and the folder that it leads to is replaced.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    writer = f"{socket.gethostname()}-{os.getpid()}"
    staged, earlier = (folder.parent / f".{folder.name}.{what}-{writer}" for what in ("writing", "earlier"))
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        yield staged
        for inside in [*staged.iterdir(), staged]:
            if inside.is_dir():
                sync_folder(inside)
        check_folder(folder)  # again: it may have been filled since
        _swap(staged, folder, earlier)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _swap(staged: Path, folder: Path, earlier: Path) -> None:
    if folder.exists():
        folder.rename(earlier)
    try:
        if earlier.exists():
            check_folder(earlier)  # once more, now that nobody finds it
        staged.rename(folder)
    except (InvalidInput, OSError):
        if earlier.exists():
            earlier.rename(folder)
        raise
    sync_folder(folder.parent)
    if earlier.exists():
        shutil.rmtree(earlier)


def write_frame(path: Path, frame: pl.DataFrame) -> None:
    """Flushed to disk."""
    with path.open("wb") as file:
        frame.write_parquet(file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())


def write_frames(folder: Path, frames: Mapping[str, pl.DataFrame]) -> None:
    """A file each, in a folder that exists only if there is one."""
    if frames:
        folder.mkdir()
    for name, frame in frames.items():
        write_frame(folder / f"{name}.parquet", frame)
