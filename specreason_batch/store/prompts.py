"""Prompt shards: Parquet files in, prompts out; a row that cannot be used becomes a reject, never an exception."""

from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from specreason_batch.types import InvalidInput, Message, Prompt

_BATCH_ROWS = 1024
_OWN_COLUMNS = ("prompt_id", "prompt", "gold_answer")
MESSAGE_ROLES = ("system", "user", "assistant")
# Where the input has them: a row's whole conversation in place of its prompt, and its own system prompt.
CONVERSATION_COLUMNS = {
    "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
    "system_prompt": pa.string(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """An input row, or a chain, that could not be used."""

    prompt_id: str | None
    sample_index: int | None  # None: the whole row
    file: str
    row: int | None  # counted from 0 in the file; None: not a matter of a row
    reason: str

    def as_row(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("prompt_id", "sample_index", "file", "row", "reason")}


def list_shards(path: str) -> list[Path]:
    """A file, a folder's *.parquet, or a glob, in name order. Raises InvalidInput if there is none."""
    given = Path(path)
    if given.is_dir():
        shards = sorted(given.glob("*.parquet"))
    else:
        shards = sorted(Path(name) for name in ([path] if given.is_file() else glob(path)))
    if not shards:
        raise InvalidInput(
            f"input.path: no Parquet file at {path!r}; allowed: a file, a folder with *.parquet, or a glob"
        )
    names = [shard.stem for shard in shards]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise InvalidInput(f"input.path: two shards have the name {sorted(doubled)[0]!r}; their output would collide")
    return shards


@dataclass(slots=True)
class PromptShard:
    """One input file. Rows are read in batches; `rejects` fills while `prompts` is walked."""

    path: Path
    schema: pa.Schema
    num_rows: int

    @classmethod
    def open(cls, path: Path) -> "PromptShard":
        """Raises InvalidInput if the file is no Parquet, or a needed column is missing or of the wrong type."""
        try:
            file = pq.ParquetFile(path)
            shard = cls(path, file.schema_arrow, file.metadata.num_rows)
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise InvalidInput(f"input.path: {path} is not a readable Parquet file: {error}") from error
        shard._check_columns()
        return shard

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def has_gold_answer(self) -> bool:
        return "gold_answer" in self.schema.names

    @property
    def extra_schema(self) -> pa.Schema:
        """The columns that are carried through, by their own names."""
        return pa.schema([column for column in self.schema if column.name not in _OWN_COLUMNS])

    def prompts(self, limit: int | None = None) -> Iterator[Prompt | Reject]:
        """Every row in file order, as a prompt or as a reject; the first `limit` rows."""
        seen: set[str] = set()
        for index, row in zip(range(limit or self.num_rows), self._rows(), strict=False):
            if reason := _fault(row, seen):
                yield Reject(
                    prompt_id=_id_text(row["prompt_id"]),
                    sample_index=None,
                    file=self.path.name,
                    row=index,
                    reason=reason,
                )
                continue
            seen.add(prompt_id := str(row["prompt_id"]))
            messages = row.get("messages") or ()
            gold = row.get("gold_answer")
            extra = {name: value for name, value in row.items() if name not in _OWN_COLUMNS}
            yield Prompt(
                prompt_id=prompt_id,
                prompt=row["prompt"],
                messages=tuple(Message(turn["role"], turn["content"]) for turn in messages),
                system_prompt=row.get("system_prompt"),
                row=index,
                gold_answer=None if gold is None else str(gold),
                extra=extra,
            )

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Raises InvalidInput where the file is damaged."""
        try:
            for batch in pq.ParquetFile(self.path).iter_batches(_BATCH_ROWS):
                yield from batch.to_pylist()
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise InvalidInput(f"input.path: {self.path} is damaged: {error}") from error

    def _check_columns(self) -> None:
        names = self.schema.names
        for column in ("prompt_id", "prompt"):
            if column not in names:
                raise InvalidInput(f"{self.path}: no column {column!r}; it has {', '.join(names)}")
            type = self.schema.field(column).type
            if not _is_like(type, pa.string()) and not (column == "prompt_id" and pa.types.is_integer(type)):
                allowed = "string or integer" if column == "prompt_id" else "string"
                raise InvalidInput(f"{self.path}: column {column!r} is {type}; allowed: {allowed}")
        for column, expected in CONVERSATION_COLUMNS.items():
            if column in names and not _is_like(type := self.schema.field(column).type, expected):
                raise InvalidInput(f"{self.path}: column {column!r} is {type}; allowed: {expected} (or another name)")


def _fault(row: dict[str, Any], seen: set[str]) -> str | None:
    if row["prompt_id"] is None or row["prompt_id"] == "":
        return "prompt_id is null or empty"
    if str(row["prompt_id"]) in seen:
        return "prompt_id was used by an earlier row"
    if row["prompt"] is None or not row["prompt"].strip():
        return "prompt is null or empty"
    return _messages_fault(row.get("messages") or [])


def _messages_fault(messages: list[dict[str, Any] | None]) -> str | None:
    for number, turn in enumerate(messages):
        if turn is None or turn["role"] not in MESSAGE_ROLES:
            found = repr(turn and turn["role"])
            return f"messages[{number}].role is {found}; allowed: {', '.join(MESSAGE_ROLES)}"
        if not turn["content"]:
            return f"messages[{number}].content is null or empty"
        if turn["role"] == "system" and number:
            return f"messages[{number}] is a system turn; allowed: as the first one only"
    if messages and messages[-1]["role"] != "user":  # type: ignore[index]
        return "messages: the last turn is not the user's"
    return None


def _is_like(type: pa.DataType, expected: pa.DataType) -> bool:
    """The same, large and view variants aside."""
    if pa.types.is_list(expected):
        is_list = pa.types.is_list(type) or pa.types.is_large_list(type)
        return is_list and _is_like(type.value_type, expected.value_type)
    if pa.types.is_struct(expected):
        if not pa.types.is_struct(type):
            return False
        fields = {field.name: field.type for field in type}
        return all(field.name in fields and _is_like(fields[field.name], field.type) for field in expected)
    return bool(pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type))


def _id_text(prompt_id: object) -> str | None:
    return None if prompt_id is None else str(prompt_id)
