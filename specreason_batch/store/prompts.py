"""Prompt shards: Parquet files in, prompts out; a row that cannot be used becomes a reject, never an exception."""

from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from specreason_batch.types import InvalidInput, Prompt

_BATCH_ROWS = 1024
_OWN_COLUMNS = ("prompt_id", "prompt", "gold_answer")


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
        except (OSError, pa.ArrowException) as error:
            raise InvalidInput(f"input.path: {path} is not a readable Parquet file: {error}") from error
        shard = cls(path, file.schema_arrow, file.metadata.num_rows)
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
            gold = row.get("gold_answer")
            extra = {name: value for name, value in row.items() if name not in _OWN_COLUMNS}
            yield Prompt(
                prompt_id=prompt_id,
                prompt=row["prompt"],
                row=index,
                gold_answer=None if gold is None else str(gold),
                extra=extra,
            )

    def _rows(self) -> Iterator[dict[str, Any]]:
        for batch in pq.ParquetFile(self.path).iter_batches(_BATCH_ROWS):
            yield from batch.to_pylist()

    def _check_columns(self) -> None:
        names = self.schema.names
        for column in ("prompt_id", "prompt"):
            if column not in names:
                raise InvalidInput(f"{self.path}: no column {column!r}; it has {', '.join(names)}")
            type = self.schema.field(column).type
            text = pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type)
            if not text and not (column == "prompt_id" and pa.types.is_integer(type)):
                allowed = "string or integer" if column == "prompt_id" else "string"
                raise InvalidInput(f"{self.path}: column {column!r} is {type}; allowed: {allowed}")


def _fault(row: dict[str, Any], seen: set[str]) -> str | None:
    if row["prompt_id"] is None or row["prompt_id"] == "":
        return "prompt_id is null or empty"
    if str(row["prompt_id"]) in seen:
        return "prompt_id was used by an earlier row"
    if row["prompt"] is None or not row["prompt"].strip():
        return "prompt is null or empty"
    return None


def _id_text(prompt_id: object) -> str | None:
    return None if prompt_id is None else str(prompt_id)
