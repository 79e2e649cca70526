"""Runs as an export reads them: what is committed, part by part, each checked against its run.

Owns: which runs may be exported, and together. Does not know: filters, formats.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from specreason_batch.status import ShardState, StatusReader
from specreason_batch.store.manifest import file_identity, read_manifest
from specreason_batch.store.parts import ShardPaths
from specreason_batch.store.reading import shard_paths
from specreason_batch.store.schemas import CHAINS, SCHEMA_VERSION
from specreason_batch.store.verdicts import Verdict, VerdictBasis
from specreason_batch.types import InvalidInput, Message, Role, Row

BATCH_CHAINS = 256  # that are in memory at once
KEYS = ("prompt_id", "sample_index", "step_index")
_READ_BUFFER = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Part:
    """One committed part's files."""

    chains: Path
    steps: Path
    verdicts: Path | None  # None: not verified

    @property
    def num_chains(self) -> int:
        return int(_open(self.chains).metadata.num_rows)

    def identity(self) -> tuple[str, int, int, str]:
        """Chains and steps never change once they are there; verdicts may."""
        name = f"{self.chains.parent.parent.name}/{self.chains.stem}"
        verdicts = file_identity(self.verdicts) if self.verdicts else ""
        return name, self.chains.stat().st_size, self.steps.stat().st_size, verdicts


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One output folder."""

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

    @property
    def roles(self) -> list[Role]:
        """Those whose models took part."""
        return [role for role in Role if any(name.startswith(f"{role}.") for name in self._fields)]

    @property
    def think_tags(self) -> tuple[str, str]:
        """Open and close, as the thinking was written with."""
        chat = self._chat
        return chat["think_open"], chat["think_close"]

    @property
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


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedChain:
    """A chain as it was committed."""

    run: Run
    row: Row  # of `chains`; the columns that were asked for
    steps: Sequence[Row] = ()  # of `steps`, in order; empty if they were not asked for
    verdict: Verdict | None = None
    basis: VerdictBasis | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.row["prompt_id"], self.row["sample_index"]

    @property
    def prompt(self) -> str:
        return str(self.row["prompt"])

    @property
    def thinking(self) -> str:
        return str(self.row["thinking"])

    @property
    def answer(self) -> str | None:
        """None: it was never asked for."""
        answer: str | None = self.row["answer"]
        return answer

    @property
    def num_thinking_tokens(self) -> int:
        """Of its kept steps, by whoever wrote each."""
        return int(self.row["num_draft_tokens_kept"] + self.row["num_base_tokens"])

    @property
    def turns(self) -> list[Message]:
        """What was asked: perhaps a system turn, then the user's, or a whole conversation."""
        conversation = [Message(turn["role"], turn["content"]) for turn in self.row.get("input_messages") or ()]
        turns = conversation or [Message("user", self.prompt)]
        system = self.row.get("input_system_prompt")
        system = self.run.system_prompt if system is None else system
        return turns if system is None or turns[0].role == "system" else [Message("system", system), *turns]

    @property
    def asked(self) -> str:
        """The user's words."""
        return "\n".join(turn.content for turn in self.turns if turn.role == "user")

    @property
    def is_right(self) -> bool | None:
        """None: not verified, or it cannot be said."""
        return self.verdict is Verdict.right if self.verdict in (Verdict.right, Verdict.wrong) else None

    def step_text(self, step: Row) -> str:
        return self.thinking[step["start"] : step["end"]]


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
        found = _open(path).schema_arrow.metadata or {}
        for name in ("schema_version", "fingerprint"):
            written = found.get(name.encode(), b"none").decode()
            if written != manifest[name]:
                raise InvalidInput(f"{path}: its {name} is {written}, that of run.json {manifest[name]}; allowed: one")
    schema = _open(part.chains).schema_arrow
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


# --- reading ---


def read_part_chains(
    run: Run, part: Part, columns: Sequence[str], step_columns: Sequence[str]
) -> Iterator[list[FinishedChain]]:
    """All chains of a part in their order, some at a time; steps too where some of their columns are asked for.

    Raises InvalidInput that names the file if one is damaged, or they do not fit together.
    """
    verdicts = _verdicts(part)
    steps = _steps_of(part, step_columns) if step_columns else None
    there = _open(part.chains).schema_arrow.names
    for rows in _batches(part.chains, [name for name in columns if name in there]):
        yield [_chain(run, row, steps(row) if steps else [], verdicts) for row in rows]


def _chain(run: Run, row: Row, steps: Sequence[Row], verdicts: dict[tuple[str, int], Row]) -> FinishedChain:
    found = verdicts.get((row["prompt_id"], row["sample_index"]), {})
    verdict, basis = found.get("verdict"), found.get("basis")
    return FinishedChain(
        run=run,
        row=row,
        steps=steps,
        verdict=Verdict(verdict) if verdict else None,
        basis=VerdictBasis(basis) if basis else None,
    )


def _steps_of(part: Part, columns: Sequence[str]) -> Callable[[Row], Sequence[Row]]:
    """Takes chains in their order and gives each one's steps: a part's steps lie in the order of its chains."""
    wanted = list(dict.fromkeys([*KEYS, *columns]))
    rows = (row for batch in _batches(part.steps, wanted, BATCH_CHAINS * 8) for row in batch)

    def take(chain: Row) -> Sequence[Row]:
        found = list(islice(rows, chain["num_steps"]))
        keys = [tuple(step[name] for name in KEYS) for step in found]
        if keys != [(chain["prompt_id"], chain["sample_index"], index) for index in range(chain["num_steps"])]:
            raise InvalidInput(
                f"{part.steps} does not fit {part.chains.name} of chains/: the {chain['num_steps']} steps of "
                f"{chain['prompt_id']!r}, sample {chain['sample_index']}, are not there; the part is damaged"
            )
        return found

    return take


def _verdicts(part: Part) -> dict[tuple[str, int], Row]:
    if part.verdicts is None:
        return {}
    batches = _batches(part.verdicts, ["prompt_id", "sample_index", "verdict", "basis"])
    return {(row["prompt_id"], row["sample_index"]): row for rows in batches for row in rows}


def _batches(path: Path, columns: Sequence[str], size: int = BATCH_CHAINS) -> Iterator[list[Row]]:
    try:
        for batch in _open(path).iter_batches(size, columns=list(columns), use_threads=False):
            yield batch.to_pylist()
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, buffer_size=_READ_BUFFER)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InvalidInput:
    remedy = "verify the run again"
    if path.parent.name != "verdicts":
        remedy = "move it away, with the file of the same name in steps/ or chains/, and generate its chains again"
    return InvalidInput(f"{path} is damaged ({error}). It was whole when it was committed: {remedy}")
