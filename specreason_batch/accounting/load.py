"""A run's folder, opened for reading: lazily, and only what is committed."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from specreason_batch.store.attempts import Attempt, read_attempts
from specreason_batch.store.manifest import read_manifest
from specreason_batch.store.parts import ShardPaths
from specreason_batch.store.reading import scan, shard_paths
from specreason_batch.types import InvalidInput


@dataclass(frozen=True)
class RunFiles:
    """One output folder. Raises InvalidInput if it holds no run, or a run without any committed chain."""

    output_dir: Path
    label: str
    manifest: dict[str, Any] = field(init=False, repr=False)  # run.json

    def __post_init__(self) -> None:
        object.__setattr__(self, "manifest", read_manifest(self.output_dir))
        if scan(self.output_dir, "chains") is None:
            raise InvalidInput(f"{self.output_dir}: no chain is committed yet: there is nothing to report")

    @property
    def config(self) -> dict[str, Any]:
        """The run's resolved configuration, nested as in conf/."""
        return dict(self.manifest["config"])

    @property
    def policy(self) -> str:
        return str(self.config["policy"]["name"])

    @cached_property
    def shards(self) -> list[ShardPaths]:
        return shard_paths(self.output_dir)

    @cached_property
    def attempts(self) -> list[Attempt]:
        """Of all shards."""
        return [attempt for shard in self.shards for attempt in read_attempts(shard.root)]

    @property
    def chains(self) -> pl.LazyFrame:
        frame = scan(self.output_dir, "chains")
        assert frame is not None
        return frame

    @property
    def steps(self) -> pl.LazyFrame:
        frame = scan(self.output_dir, "steps")
        assert frame is not None  # committed before its chains
        return frame

    @property
    def rounds(self) -> pl.LazyFrame | None:
        """None: telemetry was removed."""
        return scan(self.output_dir, "rounds")

    @property
    def verdicts(self) -> pl.LazyFrame | None:
        """None: not verified (`python -m jobs.verify`)."""
        return scan(self.output_dir, "verdicts")

    @cached_property
    def num_chains(self) -> int:
        """Committed, from the files' footers."""
        return sum(pq.read_metadata(path).num_rows for shard in self.shards for path in shard.committed("chains"))
