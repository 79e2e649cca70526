"""A run's folder, opened for reading: lazily, and only what was committed when it was opened."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from specreason_batch.store.attempts import Attempt, read_attempts
from specreason_batch.store.manifest import read_manifest
from specreason_batch.store.parts import ShardPaths
from specreason_batch.store.reading import committed_files, scan_files, shard_paths
from specreason_batch.store.schemas import CHAINS, ROUNDS, SCHEMA_VERSION, STEPS
from specreason_batch.store.verdicts import VERDICTS
from specreason_batch.types import InvalidInput

_COLUMNS = {"chains": CHAINS.names, "steps": STEPS.names, "rounds": ROUNDS.names, "verdicts": VERDICTS.names}


@dataclass(frozen=True)
class RunFiles:
    """One output folder, as it was when this was made: a run at work may go on meanwhile.

    Raises InvalidInput if it holds no run, a run without any committed chain, or one of another schema.
    """

    output_dir: Path
    label: str
    manifest: dict[str, Any] = field(init=False, repr=False)  # run.json
    _files: dict[str, list[Path]] = field(init=False, repr=False)  # by kind

    def __post_init__(self) -> None:
        object.__setattr__(self, "manifest", read_manifest(self.output_dir))
        object.__setattr__(self, "_files", _list_files(self.output_dir))
        if not self._files["chains"]:
            raise InvalidInput(f"{self.output_dir}: no chain is committed yet: there is nothing to report")
        for kind in _COLUMNS:
            self._check_columns(kind)

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
    def attempts_by_shard(self) -> dict[str, list[Attempt]]:
        """Oldest first, by the shard's name; of every shard that was ever begun."""
        roots = sorted({folder.parent for folder in self.output_dir.glob("*/attempts")})
        return {root.name: read_attempts(root) for root in roots}

    @property
    def attempts(self) -> list[Attempt]:
        """Of all shards."""
        return [attempt for attempts in self.attempts_by_shard.values() for attempt in attempts]

    @property
    def chains(self) -> pl.LazyFrame:
        return scan_files(self._files["chains"])

    @property
    def steps(self) -> pl.LazyFrame:
        return scan_files(self._files["steps"])  # committed before their chains

    @property
    def rounds(self) -> pl.LazyFrame | None:
        """None: telemetry was removed."""
        return scan_files(self._files["rounds"]) if self._files["rounds"] else None

    @property
    def verdicts(self) -> pl.LazyFrame | None:
        """None: not verified (`python -m jobs.verify`)."""
        return scan_files(self._files["verdicts"]) if self._files["verdicts"] else None

    @property
    def rejects(self) -> pl.LazyFrame | None:
        """Unusable input rows, and chains that were given up; None: there are none."""
        return scan_files(self._files["rejects"]) if self._files["rejects"] else None

    def files(self, kind: str) -> list[Path]:
        """The parts themselves; those of `steps` in the order of those of `chains`."""
        return self._files[kind]

    @cached_property
    def num_chains(self) -> int:
        """Committed, from the files' footers."""
        return sum(pq.read_metadata(path).num_rows for path in self._files["chains"])

    def _check_columns(self, kind: str) -> None:
        for path in self._files[kind][:1]:
            if missing := sorted(set(_COLUMNS[kind]) - set(_column_names(path))):
                raise InvalidInput(
                    f"{path}: no column {', '.join(missing)}: the run was written by schema version "
                    f"{self.manifest.get('schema_version')}, and this program reads version {SCHEMA_VERSION}"
                )


def _column_names(path: Path) -> list[str]:
    """Raises InvalidInput if the file is damaged."""
    try:
        return list(pq.read_schema(path).names)
    except pa.ArrowException as error:
        raise InvalidInput(f"{path} is damaged: {error}") from error


def _list_files(output_dir: Path) -> dict[str, list[Path]]:
    """By kind: one moment's parts, whatever is committed while they are listed."""
    chains = committed_files(output_dir, "chains")
    kinds = ("steps", "verdicts", "rejects")
    beside = {kind: [path.parent.parent / kind / path.name for path in chains] for kind in kinds}
    files = {kind: [path for path in paths if path.is_file()] for kind, paths in beside.items()}
    files["rejects"] += sorted(output_dir.glob("*/rejects/input.parquet"))
    return {"chains": chains, "rounds": committed_files(output_dir, "rounds"), **files}
