"""Runs as an export reads them: what is committed, part by part, each checked against its run.

Owns: which runs may be exported, and together. Does not know: filters, formats.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from specreason_batch.status import ShardState, StatusReader
from specreason_batch.store.manifest import file_identity, read_manifest
from specreason_batch.store.parts import ShardPaths
from specreason_batch.store.reading import shard_paths
from specreason_batch.store.schemas import CHAINS, SCHEMA_VERSION
from specreason_batch.types import InvalidInput, Role

_READ_BUFFER = 1 << 20  # bytes


@dataclass(frozen=True)
class Part:
    """One committed part's files."""

    chains: Path
    steps: Path
    verdicts: Path | None  # None: not verified

    @cached_property
    def num_chains(self) -> int:
        return int(open_file(self.chains).metadata.num_rows)

    def identity(self) -> tuple[str, int, int, str]:
        """Chains and steps never change once they are there; verdicts may."""
        name = f"{self.chains.parent.parent.name}/{self.chains.stem}"
        verdicts = file_identity(self.verdicts) if self.verdicts else ""
        return name, self.chains.stat().st_size, self.steps.stat().st_size, verdicts


@dataclass(frozen=True, kw_only=True)
class Run:
    """One output folder. What every chain asks for is worked out once."""

    folder: Path
    manifest: dict[str, Any]  # run.json
    parts: list[Part]
    columns: pa.Schema  # of its chains; a shard may lack some that another one's input has

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.manifest["config"])

    @cached_property
    def roles(self) -> list[Role]:
        """Those whose models took part."""
        return [role for role in Role if any(name.startswith(f"{role}.") for name in self._fields)]

    @cached_property
    def think_tags(self) -> tuple[str, str]:
        """Open and close, as the thinking was written with."""
        chat = self._chat
        return chat["think_open"], chat["think_close"]

    @cached_property
    def system_prompt(self) -> str | None:
        """Of prompts that bring none of their own."""
        prompt: str | None = self._chat["system_prompt"]
        return prompt

    @property
    def _chat(self) -> dict[str, Any]:
        return dict(self.config[Role.base if Role.base in self.roles else Role.draft]["chat"])

    @property
    def _fields(self) -> dict[str, Any]:
        return dict(self.manifest["fingerprint_fields"])

    def model_identity(self, role: Role) -> dict[str, str]:
        """Its model's files by size and hash, as the run saw them."""
        start = f"{role}.model."
        return {name.removeprefix(start): str(value) for name, value in self._fields.items() if name.startswith(start)}

    def identity(self) -> dict[str, Any]:
        """Two equal ones hold the same rows."""
        parts = json.dumps([part.identity() for part in self.parts])
        digest = hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()
        return {"fingerprint": self.fingerprint, "parts": len(self.parts), "blake2b": digest}


def all_parts(runs: Iterable[Run]) -> Iterator[tuple[int, Run, Part]]:
    """In order, each with the place of its first chain among all chains."""
    place = 0
    for run in runs:
        for part in run.parts:
            yield place, run, part
            place += part.num_chains


# --- opening ---


def open_runs(folders: Sequence[str], allow_unfinished: bool, needs_verdicts: bool) -> list[Run]:
    """Raises InvalidInput: no run there, not done, another schema, not verified, or not to be mixed."""
    runs = [_open_run(Path(folder), allow_unfinished) for folder in folders]
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise InvalidInput(f"runs: {', '.join(folders)} names a run twice; allowed: each once")
    for run in runs:
        if run.think_tags != runs[0].think_tags:
            raise InvalidInput(
                f"runs: {runs[0].folder} thinks within {' '.join(runs[0].think_tags)}, {run.folder} within "
                f"{' '.join(run.think_tags)}; allowed together: runs of the same think tags"
            )
        if needs_verdicts:
            _check_verified(run)
    return runs


def _open_run(folder: Path, allow_unfinished: bool) -> Run:
    manifest = read_manifest(folder)
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InvalidInput(f"runs: {folder} is of schema version {version}; allowed: {SCHEMA_VERSION}, as this reads")
    if not allow_unfinished:
        _check_finished(folder)
    parts = [part for shard in shard_paths(folder) for part in _parts(shard)]
    if not parts:
        raise InvalidInput(f"runs: {folder} has no committed chain: there is nothing to export")
    return Run(folder=folder, manifest=manifest, parts=parts, columns=_all_columns(folder, parts, manifest))


def _all_columns(folder: Path, parts: Sequence[Part], manifest: dict[str, Any]) -> pa.Schema:
    schemas = dict.fromkeys(_check_part(part, manifest).remove_metadata() for part in parts)
    return unify([folder], list(schemas))


def unify(folders: Sequence[Path], schemas: Sequence[pa.Schema]) -> pa.Schema:
    """The columns of all. Raises InvalidInput if one has different types."""
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        names = ", ".join(map(str, folders))
        raise InvalidInput(f"runs: the chains of {names} have an input column of different types: {error}") from error


def _parts(shard: ShardPaths) -> Iterator[Part]:
    for name in shard.parts("chains"):
        verdicts = shard.file("verdicts", name)
        yield Part(shard.file("chains", name), shard.file("steps", name), verdicts if verdicts.is_file() else None)


def _check_finished(folder: Path) -> None:
    status = StatusReader(folder, ask_queue=lambda _: None).read()
    undone = [shard for shard in status.shards if shard.state is not ShardState.done]
    if not undone:
        return
    first = undone[0]
    why = first.last_error or " ".join([first.state, *([first.detail] if first.detail else [])]).replace("_", " ")
    raise InvalidInput(
        f"runs: {folder} is not finished: {len(undone)} of {len(status.shards)} shard(s), the first {first.name} "
        f"({why}); allow_unfinished=true exports what is committed"
    )


def _check_part(part: Part, manifest: dict[str, Any]) -> pa.Schema:
    """Its columns. Raises InvalidInput if a file of it is missing, damaged, or of another run."""
    for path in (part.chains, part.steps):
        if not path.is_file():
            raise InvalidInput(f"{path} is missing: its chains are there, its steps are not; the part is damaged")
        found = open_file(path).schema_arrow.metadata or {}
        for name in ("schema_version", "fingerprint"):
            written = found.get(name.encode(), b"none").decode()
            if written != manifest[name]:
                raise InvalidInput(f"{path}: its {name} is {written}, that of run.json {manifest[name]}; allowed: one")
    schema = open_file(part.chains).schema_arrow
    if missing := [name for name in CHAINS.names if name not in schema.names]:
        raise InvalidInput(f"{part.chains}: no column {missing[0]!r}; the part is damaged")
    return schema


def _check_verified(run: Run) -> None:
    missing = [part for part in run.parts if part.verdicts is None]
    if missing:
        raise InvalidInput(
            f"runs: {run.folder} is not verified ({len(missing)} of {len(run.parts)} part(s), the first "
            f"{missing[0].chains}), and the selection asks for verdicts; first: python -m jobs.verify run={run.folder}"
        )


# --- files ---


def open_file(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, buffer_size=_READ_BUFFER)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> InvalidInput:
    remedy = "verify the run again"
    if path.parent.name != "verdicts":
        remedy = "move it away, with the file of the same name in steps/ or chains/, and generate its chains again"
    return InvalidInput(f"{path} is damaged ({error}). It was whole when it was committed: {remedy}")
