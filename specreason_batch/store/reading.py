"""Readers of what was written: only committed parts, lazily."""

from pathlib import Path

import polars as pl

from specreason_batch.store.parts import ShardPaths, read_part
from specreason_batch.types import InvalidInput


def shard_paths(output_dir: Path) -> list[ShardPaths]:
    """Every shard's output under a run's folder, in name order."""
    return [ShardPaths(folder.parent) for folder in sorted(output_dir.glob("*/chains"))]


def scan(output_dir: Path, kind: str) -> pl.LazyFrame | None:
    """All committed rows of `chains`, `steps`, `rounds` or `verdicts`; None if there are none."""
    files = committed_files(output_dir, kind)
    return scan_files(files) if files else None


def committed_files(output_dir: Path, kind: str) -> list[Path]:
    """This kind's files that count as output, of all shards."""
    return [path for shard in shard_paths(output_dir) for path in _files(shard, kind)]


def scan_files(files: list[Path]) -> pl.LazyFrame:
    """All rows of one kind's files."""
    return pl.scan_parquet(files, missing_columns="insert", extra_columns="ignore")


def _files(shard: ShardPaths, kind: str) -> list[Path]:
    if kind == "rounds":  # telemetry: not tied to a part
        return [shard.file(kind, part) for part in shard.parts(kind)]
    return shard.committed(kind)


def rejected_rows(paths: ShardPaths) -> set[int]:
    """Numbers of the input rows that were found unusable."""
    path = paths.file("rejects", "input")
    return set(read_part(path, ["row"])["row"].to_pylist()) if path.is_file() else set()


def acceptance_rate(output_dir: Path) -> float:
    """Accepted steps by graded steps of a finished run. Raises InvalidInput if it graded none."""
    steps = scan(output_dir, "steps")
    graded = steps.filter(pl.col("accepted").is_not_null()) if steps is not None else None
    rate = graded.select(pl.col("accepted").mean()).collect().item() if graded is not None else None
    if rate is None:
        raise InvalidInput(f"policy.match_run: {str(output_dir)!r} holds no graded steps")
    return float(rate)
