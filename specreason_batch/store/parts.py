"""One shard's output: parts committed as chains finish (docs/design.md, section 6).

A part's steps (and rejects) are committed before its chains, under one part id. The committed chains file is the only
marker that its chains are done; a steps file without it is not output, and the next attempt removes it.

Every file is written in the attempt's staging folder, flushed to disk, and renamed from there (store/attempts.py).
"""

import os
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from specreason_batch.store.durable import sync_folder
from specreason_batch.store.prompts import Reject
from specreason_batch.store.schemas import REJECTS, ROUNDS, SCHEMA_VERSION, STEPS
from specreason_batch.types import InvalidInput

ChainKey = tuple[str, int]


class Commit(Protocol):
    """The right to put files in place: a lease."""

    @property
    def staging(self) -> Path:
        """A folder on the same file system, this process's own."""
        ...

    def check(self) -> None:
        """Raises LeaseLost where the right was lost."""
        ...

    def commit(self, staged: Path, path: Path) -> None:
        """Rename a file or folder of the staging folder. Raises LeaseLost where the right was lost, OSError."""
        ...

    def remove(self, path: Path) -> None:
        """Remove a file or folder, if it is there. Raises LeaseLost where the right was lost, OSError."""
        ...


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file and flush it to disk."""
    with path.open("wb") as file:
        pq.write_table(table, file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())


def commit_table(table: pa.Table, path: Path, commit: Commit) -> None:
    """Whole or not at all. Raises OSError, and what `commit` raises."""
    commit.check()
    staged = commit.staging / f"{path.parent.name}-{path.name}"
    path.parent.mkdir(exist_ok=True)
    try:
        write_table(table, staged)
        commit.commit(staged, path)
    except OSError:
        commit.check()  # it may be that the staging folder was taken away
        raise
    finally:
        staged.unlink(missing_ok=True)
    sync_folder(path.parent)


def read_part(path: Path, columns: list[str]) -> pa.Table:
    """These columns of a committed file. Raises InvalidInput if it has been damaged since."""
    try:
        return pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise InvalidInput(
            f"{path} is damaged ({error}). It was whole when it was committed: move it away, with the file of the same "
            "name in steps/ or chains/, and its chains are made again"
        ) from error


@dataclass(frozen=True, slots=True)
class ShardPaths:
    """Where one shard's output lies."""

    root: Path

    def file(self, kind: str, part: str) -> Path:
        return self.root / kind / f"{part}.parquet"

    def parts(self, kind: str) -> list[str]:
        """Ids of this kind's files in order, committed or not."""
        return sorted(path.stem for path in (self.root / kind).glob("part-*.parquet"))

    def committed(self, kind: str) -> list[Path]:
        """This kind's files that count as output: those whose chains file is there."""
        return [self.file(kind, part) for part in self.parts("chains") if self.file(kind, part).is_file()]

    def remove_uncommitted(self, commit: Commit) -> int:
        """Remove what an interrupted attempt left: steps and rejects without chains."""
        done = set(self.parts("chains"))
        left = [self.file(kind, part) for kind in ("steps", "rejects") for part in self.parts(kind) if part not in done]
        for path in left:
            commit.remove(path)
        return len(left)

    def done_keys(self) -> set[ChainKey]:
        """(prompt_id, sample_index) of every committed chain."""
        keys: set[ChainKey] = set()
        for path in self.committed("chains"):
            table = read_part(path, ["prompt_id", "sample_index"])
            keys.update(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))
        return keys

    def last_round(self) -> int:
        """The number of the last committed round; 0 if there is none."""
        parts = self.parts("rounds")
        return max(read_part(self.file("rounds", parts[-1]), ["round"])["round"].to_pylist()) if parts else 0

    def source_identities(self) -> set[str]:
        """The input identities that the committed parts were made from."""
        metadata = [read_part(path, []).schema.metadata or {} for path in self.committed("chains")]
        return {found[b"source"].decode() for found in metadata if b"source" in found}


@dataclass(slots=True)
class ShardWriter:
    """Collects finished chains and commits them as parts."""

    paths: ShardPaths
    lease: Commit
    chains_schema: pa.Schema
    metadata: dict[str, str]  # put into every file: fingerprint, source ...
    chains_per_part: int
    seconds_per_part: float
    _chains: list[dict[str, Any]] = field(default_factory=list)
    _steps: list[dict[str, Any]] = field(default_factory=list)
    _rounds: list[dict[str, Any]] = field(default_factory=list)
    _rejects: list[Reject] = field(default_factory=list)
    _opened: float = field(default_factory=time.monotonic)
    _attempt: str = field(default_factory=lambda: uuid.uuid4().hex[:8])

    def add_chain(self, chain: dict[str, Any], steps: list[dict[str, Any]], reject: Reject | None = None) -> None:
        self._chains.append(chain)
        self._steps.extend(steps)
        if reject:
            self._rejects.append(reject)

    def add_round(self, row: dict[str, Any]) -> None:
        self._rounds.append(row)

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """Telemetry that is not committed yet."""
        return self._rounds

    def commit_if_due(self) -> bool:
        """Close the part at its size or its age; whether it was."""
        old = time.monotonic() - self._opened >= self.seconds_per_part
        is_due = len(self._chains) >= self.chains_per_part or (old and bool(self._chains))
        if is_due:
            self.commit()
        return is_due

    def commit(self) -> None:
        """Close the part: rejects and steps first, the chains last; telemetry beside them."""
        part = f"part-{self._next_number():05d}-{self._attempt}"
        if self._chains:
            if self._rejects:
                self._write("rejects", part, [reject.as_row() for reject in self._rejects], REJECTS)
            self._write("steps", part, self._steps, STEPS)
            self._write("chains", part, self._chains, self.chains_schema)
        if self._rounds:
            self._write("rounds", part, self._rounds, ROUNDS)
        self._chains, self._steps, self._rounds, self._rejects = [], [], [], []
        self._opened = time.monotonic()

    def write_input_rejects(self, rejects: list[Reject]) -> None:
        """The shard's unusable rows: the same at every attempt, so the file is simply put in place."""
        path = self.paths.file("rejects", "input")
        if rejects:
            self._write("rejects", "input", [reject.as_row() for reject in rejects], REJECTS)
        elif path.exists():
            self.lease.remove(path)

    def _next_number(self) -> int:
        numbers = [int(part.split("-")[1]) for kind in ("chains", "rounds") for part in self.paths.parts(kind)]
        return max(numbers, default=-1) + 1

    def _write(self, kind: str, part: str, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
        metadata = self.metadata | {"schema_version": SCHEMA_VERSION, "kind": kind}
        table = pa.Table.from_pylist(rows, schema=schema.with_metadata(metadata))
        commit_table(table, self.paths.file(kind, part), self.lease)


def check_source(paths: ShardPaths, identity: str) -> None:
    """Raises InvalidInput if committed parts were made from another content of the input shard."""
    if others := paths.source_identities() - {identity}:
        raise InvalidInput(
            f"{paths.root}: its output was made from another content of this input shard "
            f"({sorted(others)[0]}, now {identity}); use another output_dir"
        )
