"""Chains in flight, saved so that a restart goes on from their last step (docs/design.md, section 6).

A checkpoint is a folder: `chains.parquet` (begun chains, and finished ones whose part is not committed yet),
`rounds.parquet` (telemetry that is not committed yet) and `about.json` with a digest of each. It is renamed into place
whole, the newest few stay, and one whose digests do not match is passed over for the one before.

Saved are steps, not state: a chain is opened again from its prompt and its steps are replayed, so that what it counts
and when it ends is derived by the same code as the first time.
"""

import hashlib
import json
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from specreason_batch.chain import Chain, Usage
from specreason_batch.store.durable import sync_folder, write_text
from specreason_batch.store.parts import ChainKey, Commit, write_table
from specreason_batch.store.schemas import ROUNDS, SCHEMA_VERSION
from specreason_batch.types import AnswerEnd, EndedBy, Grade, Role, Step, WrittenAnswer, WrittenStep

FOLDER = "checkpoints"
_FILES = ("chains.parquet", "rounds.parquet")
_IDS = pa.list_(pa.int32())
_WRITTEN = pa.struct(
    {
        "author": pa.string(),
        "ended_by": pa.string(),
        "base_ids": _IDS,
        "draft_ids": _IDS,  # null: the same
        "num_tokens": pa.int32(),
        "is_blank": pa.bool_(),
    }
)
_STEP = pa.struct(
    {
        "written": _WRITTEN,
        "rejected": _WRITTEN,
        "probs": pa.list_(pa.float64()),
        "mass": pa.float64(),
        "score": pa.float64(),
        "accepted": pa.bool_(),
        "round": pa.int64(),
    }
)
_ANSWER = pa.struct({"role": pa.string(), "token_ids": _IDS, "num_tokens": pa.int32(), "ended": pa.string()})
_CHAINS = pa.schema(
    {
        "prompt_id": pa.string(),
        "sample_index": pa.int64(),
        "steps": pa.list_(_STEP),
        "answer": _ANSWER,
        "error": pa.string(),
        "usage": pa.struct(
            {
                "num_grade_prompt_tokens": pa.int64(),
                "num_cached_prompt_tokens": pa.int64(),
                "num_redone_tokens": pa.int64(),
                "active_seconds": pa.float64(),
            }
        ),
    }
)


class Torn(Exception):
    """A checkpoint that cannot be used. The message says why."""


@dataclass(frozen=True, slots=True)
class About:
    """What a checkpoint says of itself."""

    fingerprint: str  # of the run
    source: str  # identity of the input shard
    attempt: int  # that wrote it
    round: int  # the last one
    num_generated_tokens: int  # by that attempt until then
    digests: dict[str, str]  # by file
    schema_version: str = SCHEMA_VERSION


class Saved(NamedTuple):
    """A chain as a restart would find it: steps, answer, error, usage."""

    steps: list[Step]
    answer: WrittenAnswer | None
    error: str | None
    usage: Usage

    @classmethod
    def of(cls, chain: Chain, num_loose_tokens: int = 0) -> "Saved":
        """`num_loose_tokens`: generated for it since its last step, which a restart would generate again."""
        usage = Usage(**{name: getattr(chain.usage, name) for name in Usage.__slots__})
        usage.num_redone_tokens += num_loose_tokens
        return cls(chain.steps, chain.answer, chain.error, usage)

    def restore(self, chain: Chain) -> Chain:
        """The same chain, opened anew, brought to where it was."""
        chain.replay(self.steps)
        chain.usage = self.usage
        if self.error is not None:
            chain.give_up(self.error)
        chain.answer = self.answer
        return chain


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a shard's restart begins with."""

    about: About
    chains: dict[ChainKey, Saved]  # in the order in which they were begun
    rounds: list[dict[str, Any]]


def write_checkpoint(
    root: Path,
    commit: Commit,
    about: Callable[[dict[str, str]], About],
    chains: dict[ChainKey, Saved],
    rounds: Sequence[dict[str, Any]],
    keep: int,
) -> Path:
    """Put a new checkpoint in place and remove all but the newest `keep`. `about`: from the files' digests.

    Raises OSError, and what `commit` raises.
    """
    commit.check()
    newest = next(reversed(_folders(root)), None)
    name = f"checkpoint-{int(newest.name.split('-')[1]) + 1 if newest else 1:07d}"
    staged = commit.staging / name
    try:
        _write(staged, about, chains, rounds)
        (root / FOLDER).mkdir(exist_ok=True)
        commit.commit(staged, root / FOLDER / name)
    except OSError:
        commit.check()  # it may be that the staging folder was taken away
        raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    sync_folder(root / FOLDER)
    for old in _folders(root)[:-keep]:
        commit.remove(old)
    return root / FOLDER / name


def _write(
    folder: Path,
    about: Callable[[dict[str, str]], About],
    chains: dict[ChainKey, Saved],
    rounds: Sequence[dict[str, Any]],
) -> None:
    folder.mkdir()
    tables = (
        _chains_table(chains),
        pa.Table.from_pylist(list(rounds), schema=ROUNDS),
    )
    for file, table in zip(_FILES, tables, strict=True):
        write_table(table, folder / file)
    digests = {file: _digest(folder / file) for file in _FILES}
    write_text(folder / "about.json", json.dumps(asdict(about(digests))))
    sync_folder(folder)


def read_checkpoint(root: Path, fingerprint: str, source: str, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest good one; None if there is none. `warn` is told of each that is passed over."""
    for folder in reversed(_folders(root)):
        try:
            return _read(folder, fingerprint, source)
        except Torn as fault:
            warn(f"{folder.name} cannot be used, the one before it is taken: {fault}")
    return None


def remove_checkpoints(root: Path, commit: Commit) -> None:
    """The shard is finished. Raises OSError, and what `commit` raises."""
    if (root / FOLDER).exists():
        commit.remove(root / FOLDER)


def _folders(root: Path) -> list[Path]:
    """Oldest first."""
    return sorted((root / FOLDER).glob("checkpoint-*"))


def _read(folder: Path, fingerprint: str, source: str) -> Checkpoint:
    try:
        about = About(**json.loads((folder / "about.json").read_text()))
        digests = {file: _digest(folder / file) for file in _FILES}
    except (OSError, ValueError, TypeError) as error:
        raise Torn(str(error)) from error
    if digests != about.digests:
        raise Torn("its content is not what was written")
    if (about.fingerprint, about.source, about.schema_version) != (fingerprint, source, SCHEMA_VERSION):
        raise Torn("it is of another configuration, input or version")
    chains, rounds = (pq.read_table(folder / file).to_pylist() for file in _FILES)
    return Checkpoint(about, dict(map(_saved, chains)), rounds)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


# --- rows ---
# Written column by column: `Table.from_pylist` takes ten times as long, and the engines' chains wait meanwhile.


def _chains_table(chains: dict[ChainKey, Saved]) -> pa.Table:
    saved = list(chains.values())
    steps = _step_array([step for chain in saved for step in chain.steps])
    columns = {
        "prompt_id": [prompt_id for prompt_id, _ in chains],
        "sample_index": [sample_index for _, sample_index in chains],
        "steps": pa.ListArray.from_arrays(_offsets([len(chain.steps) for chain in saved]), steps),
        "answer": pa.array([_answer_row(chain.answer) for chain in saved], _ANSWER),
        "error": [chain.error for chain in saved],
        "usage": pa.array([asdict(chain.usage) for chain in saved], _CHAINS.field("usage").type),
    }
    return pa.table(columns, schema=_CHAINS)


def _step_array(steps: list[Step]) -> pa.StructArray:
    grades = [step.grade for step in steps]
    columns = {
        "written": _written_array([step.written for step in steps]),
        "rejected": _written_array([step.rejected for step in steps]),
        "probs": [grade and grade.probs for grade in grades],
        "mass": [grade and grade.mass for grade in grades],
        "score": [grade and grade.score for grade in grades],
        "accepted": [step.accepted for step in steps],
        "round": [step.round for step in steps],
    }
    return _struct_array(_STEP, columns)


def _written_array(items: list[WrittenStep | None]) -> pa.StructArray:
    base, draft = ([item.bodies[role] if item else None for item in items] for role in (Role.base, Role.draft))
    columns = {
        "author": [item and item.author for item in items],
        "ended_by": [item and item.ended_by for item in items],
        "base_ids": _ids_array(base),
        "draft_ids": _ids_array([None if ids == same else ids for ids, same in zip(draft, base, strict=True)]),
        "num_tokens": [item and item.num_tokens for item in items],
        "is_blank": [item and item.is_blank for item in items],
    }
    return _struct_array(_WRITTEN, columns, [item is None for item in items])


def _struct_array(type: pa.StructType, columns: dict[str, Any], nulls: list[bool] | None = None) -> pa.StructArray:
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column, type.field(name).type)
        for name, column in columns.items()
    ]
    mask = None if nulls is None else pa.array(nulls, pa.bool_())
    return pa.StructArray.from_arrays(arrays, fields=list(type), mask=mask)


def _ids_array(lists: list[tuple[int, ...] | None]) -> pa.ListArray:
    flat = array("i")
    for ids in lists:
        flat.extend(ids or ())
    values = pa.Array.from_buffers(pa.int32(), len(flat), [None, pa.py_buffer(flat)])
    mask = pa.array([ids is None for ids in lists], pa.bool_())
    return pa.ListArray.from_arrays(_offsets([len(ids or ()) for ids in lists]), values, mask=mask)


def _offsets(lengths: Iterable[int]) -> pa.Array:
    return pa.array(accumulate(lengths, initial=0), pa.int32())


def _answer_row(answer: WrittenAnswer | None) -> dict[str, Any] | None:
    return None if answer is None else {name: getattr(answer, name) for name in WrittenAnswer.__slots__}


def _saved(row: dict[str, Any]) -> tuple[ChainKey, Saved]:
    key = row["prompt_id"], row["sample_index"]
    return key, Saved(list(_steps(row["steps"])), _answer(row["answer"]), row["error"], Usage(**row["usage"]))


def _steps(rows: list[dict[str, Any]]) -> Iterator[Step]:
    for row in rows:
        grade = None if row["probs"] is None else Grade(tuple(row["probs"]), row["mass"], row["score"])
        rejected = None if row["rejected"] is None else _written(row["rejected"])
        yield Step(_written(row["written"]), rejected, grade, row["accepted"], row["round"])


def _written(row: dict[str, Any]) -> WrittenStep:
    base = tuple(row["base_ids"])
    draft = base if row["draft_ids"] is None else tuple(row["draft_ids"])
    return WrittenStep(
        author=Role(row["author"]),
        ended_by=EndedBy(row["ended_by"]),
        bodies={Role.draft: draft, Role.base: base},
        num_tokens=row["num_tokens"],
        is_blank=row["is_blank"],
    )


def _answer(row: dict[str, Any] | None) -> WrittenAnswer | None:
    if row is None:
        return None
    return WrittenAnswer(Role(row["role"]), tuple(row["token_ids"]), row["num_tokens"], AnswerEnd(row["ended"]))
