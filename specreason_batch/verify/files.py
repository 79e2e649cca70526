"""What verification reads of a run and writes beside it. Does not know: what a verdict is.

A verdicts file is written under a hidden name of its own in its folder, flushed to disk and renamed: two verifications
at once never meet, and a reader finds the old one or the new one, whole.
"""

import json
import os
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from specreason_batch.store.durable import sync_folder
from specreason_batch.store.manifest import read_manifest
from specreason_batch.store.parts import ShardPaths, read_part, write_table
from specreason_batch.store.reading import shard_paths
from specreason_batch.store.schemas import SCHEMA_VERSION
from specreason_batch.store.verdicts import VERDICTS
from specreason_batch.types import InvalidInput
from specreason_batch.verify.config import VerifyConfig
from specreason_batch.verify.judging import has_gold

KIND = "verdicts"
Row = dict[str, Any]
_ABANDONED_SECONDS = 86_400.0  # age of a hidden file that only a killed verification can have left


@dataclass(frozen=True, slots=True)
class Run:
    """An output folder with chains in it."""

    root: Path
    fingerprint: str
    samples_per_prompt: int
    shards: list[ShardPaths]

    @classmethod
    def open(cls, name: str) -> "Run":
        """Raises InvalidInput if there is no run, or no chain yet."""
        root = Path(name)
        if not root.is_dir():
            raise InvalidInput(f"run: {name!r} is no folder; allowed: the output_dir of a run")
        manifest = read_manifest(root)
        shards = [shard for shard in shard_paths(root) if shard.parts("chains")]
        if not shards:
            raise InvalidInput(f"run: {name!r} holds no committed chains yet")
        try:
            return cls(root, manifest["fingerprint"], manifest["config"]["samples_per_prompt"], shards)
        except (KeyError, TypeError) as error:
            raise InvalidInput(f"{root / 'run.json'}: not a run manifest: no {error}") from error


@dataclass
class ShardChains:
    """A shard's committed chains, as of now, and the verdicts beside them."""

    paths: ShardPaths
    config: VerifyConfig
    samples_per_prompt: int

    @cached_property
    def parts(self) -> list[str]:
        return self.paths.parts("chains")

    @cached_property
    def columns(self) -> dict[str, str]:
        """Columns of the chains by what verification calls them. Raises InvalidInput if one is not there."""
        first = self.paths.file("chains", self.parts[0])
        read_part(first, ["prompt_id"])  # says what to do if it is damaged
        present = pq.read_schema(first).names
        wanted = {"prompt_id": "prompt_id", "sample_index": "sample_index", "answer": "answer"}
        if self.config.from_thinking:
            wanted["thinking"] = "thinking"
        for name, column in (("kind", self.config.kind_column), ("gold", self._gold_column(present))):
            if column is not None and column not in present:
                raise InvalidInput(
                    f"{name}_column: {self.paths.root} has no column {column!r}; it has {', '.join(present)}"
                )
            if column is not None:
                wanted[name] = column
        return wanted

    def _gold_column(self, present: Collection[str]) -> str | None:
        """None: the run has none, and enough samples of a prompt to vote."""
        column = self.config.gold_column
        may_vote = self.samples_per_prompt > 1 and column == VerifyConfig.gold_column
        return None if may_vote and column not in present else column

    @cached_property
    def _ballots(self) -> dict[str, dict[str, int]]:
        """Of each prompt without a gold answer: how many of its chains lie in which part."""
        found: dict[str, dict[str, int]] = {}
        for part in self.parts:
            for row in self._read(part, [name for name in ("prompt_id", "gold") if name in self.columns]):
                if not has_gold(row):
                    counts = found.setdefault(row["prompt_id"], {})
                    counts[part] = counts.get(part, 0) + 1
        return found

    @cached_property
    def _voting(self) -> dict[str, list[str]]:
        """Prompts without a gold answer by part."""
        found: dict[str, list[str]] = {part: [] for part in self.parts}
        for prompt_id, counts in self._ballots.items():
            for part in counts:
                found[part].append(prompt_id)
        return found

    def is_waiting(self, part: str) -> bool:
        """Whether a prompt of the part must be voted on and not all of its samples are committed."""
        counts = (self._ballots[prompt_id].values() for prompt_id in self._voting[part])
        return any(sum(count) < self.samples_per_prompt for count in counts)

    def voters(self, part: str) -> dict[str, list[Row]]:
        """Rows of all samples of each prompt of the part that must be voted on, in their order."""
        rows: dict[str, list[Row]] = {prompt_id: [] for prompt_id in self._voting[part]}
        for other in sorted({name for prompt_id in rows for name in self._ballots[prompt_id]}):
            for row in self._read(other, list(self.columns), only=rows):
                rows[row["prompt_id"]].append(row)
        return {prompt_id: sorted(found, key=lambda row: row["sample_index"]) for prompt_id, found in rows.items()}

    def read(self, part: str) -> list[Row]:
        """A part's rows by the names of `columns`. Raises InvalidInput if it is damaged."""
        return self._read(part, list(self.columns))

    def _read(self, part: str, names: Sequence[str], only: Collection[str] | None = None) -> list[Row]:
        """`only`: of these prompts."""
        wanted = list(dict.fromkeys(self.columns[name] for name in names))  # one column may serve as two
        table = read_part(self.paths.file("chains", part), wanted)
        if only is not None:
            table = table.filter(pc.is_in(table["prompt_id"], pa.array(only, pa.string())))
        values = [table[self.columns[name]].to_pylist() for name in names]
        return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]


def settings_text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def is_verified(paths: ShardPaths, part: str, settings: str) -> bool:
    """Whether verdicts of these settings are there. A damaged file is none: it is made again."""
    try:
        metadata = pq.read_schema(paths.file(KIND, part)).metadata or {}
    except (OSError, pa.ArrowException):
        return False
    return bool(metadata.get(b"settings", b"").decode() == settings)


def write_verdicts(
    paths: ShardPaths, part: str, rows: Sequence[dict[str, Any]], fingerprint: str, settings: str
) -> None:
    """Whole or not at all. Raises OSError."""
    metadata = {"schema_version": SCHEMA_VERSION, "kind": KIND, "fingerprint": fingerprint, "settings": settings}
    table = pa.Table.from_pylist(list(rows), schema=VERDICTS.with_metadata(metadata))
    path = paths.file(KIND, part)
    path.parent.mkdir(exist_ok=True)
    hidden = path.with_name(f".{part}.{uuid.uuid4().hex}.tmp")
    try:
        write_table(table, hidden)
        os.replace(hidden, path)
    finally:
        hidden.unlink(missing_ok=True)
    sync_folder(path.parent)


def remove_abandoned(paths: ShardPaths) -> None:
    """Hidden files that killed verifications left, a day ago or more."""
    for path in (paths.root / KIND).glob(".part-*.tmp"):
        with suppress(FileNotFoundError):  # another verification has just renamed it
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()
