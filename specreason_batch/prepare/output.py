"""The output folder: whole or not at all, and known again. Does not know: what makes a row good.

prompts/shard-00000.parquet ...      what jobs.generate reads
prompts/holdout/holdout.parquet      in folders of their own, so that input.path=prompts/ passes over them
prompts/rejects/rejects.parquet
prompts/prepare.json                 made from what, by which choices, how many
"""

import heapq
import json
import os
import shutil
import socket
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from specreason_batch.store.durable import sync_folder, write_text
from specreason_batch.store.row_files import GROUP_ROWS, RowFile, file_sizes
from specreason_batch.types import InvalidInput

MANIFEST = "prepare.json"
HOLDOUT = "holdout/holdout.parquet"
REJECTS = "rejects/rejects.parquet"
_SPOOL_COMPRESSION_LEVEL = 1


# --- the kept rows, divided ---


def chosen(hashes: "array[int]", holdout: float) -> set[int]:
    """Positions of the rows that are put aside: those of the smallest hashes (63 bits), or under the share."""
    if holdout >= 1:
        return {row for _, row in heapq.nsmallest(int(holdout), zip(hashes, range(len(hashes)), strict=True))}
    return {row for row, hash in enumerate(hashes) if hash < holdout * (1 << 63)}


def num_shards_of(num_rows: int, num_shards: int | None, shard_rows: int) -> int:
    """Raises InvalidInput if there are more shards than rows."""
    if num_shards is not None and num_shards > num_rows:
        raise InvalidInput(f"num_shards: {num_shards} is out of range; allowed: at most the {num_rows} prompts kept")
    return num_shards or -(-num_rows // shard_rows)


def divide(spool: Path, folder: Path, held_out: set[int], sizes: Sequence[int]) -> None:
    """Write the spool's rows to the holdout and, in their order, to shards of these sizes."""
    source = pq.ParquetFile(spool)
    schema = source.schema_arrow
    holdout = RowFile(folder / HOLDOUT, schema)
    shards = _Shards(folder, schema, sizes)
    first = 0
    for batch in source.iter_batches(GROUP_ROWS, use_threads=False):
        table = pa.Table.from_batches([batch])
        is_held = [row in held_out for row in range(first, first + len(table))]
        first += len(table)
        if any(is_held):
            holdout.add(table.filter(pa.array(is_held)))
            table = table.filter(pa.array([not held for held in is_held]))
        shards.add(table)
    holdout.close()
    shards.close()


class _Shards:
    """One file after the other, each filled to its size."""

    def __init__(self, folder: Path, schema: pa.Schema, sizes: Sequence[int]):
        width = max(5, len(str(len(sizes) - 1)))
        files = (RowFile(folder / f"shard-{number:0{width}d}.parquet", schema) for number in range(len(sizes)))
        self._left = iter(zip(files, sizes, strict=True))
        self._file, self._size = next(self._left)

    def add(self, table: pa.Table) -> None:
        while table.num_rows:
            if self._file.num_rows == self._size:
                self._file.close()
                self._file, self._size = next(self._left)
            room = self._size - self._file.num_rows
            self._file.add(table.slice(0, room))
            table = table.slice(room)

    def close(self) -> None:
        assert self._file.num_rows == self._size and not list(islice(self._left, 1))
        self._file.close()


# --- the folder ---


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output`, which takes its place if all goes well and is removed if not."""
    new = [parent for parent in output.parents if not parent.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.parent / f".{output.name}.preparing-{socket.gethostname()}-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        sync_folder(folder)
        folder.rename(output)
        sync_folder(output.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in new:
            if not any(parent.iterdir()):
                parent.rmdir()


def left_behind(output: Path) -> list[Path]:
    """Hidden folders of preparations that were killed, or are under way in another process."""
    return sorted(output.parent.glob(f".{escape(output.name)}.preparing-*"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """prepare.json."""

    made_from: dict[str, Any]  # inputs and choices: two equal ones make the same files
    counts: dict[str, Any]
    files: dict[str, int]  # sizes in bytes

    def write(self, folder: Path) -> None:
        content = {"made_from": self.made_from, "counts": self.counts, "files": self.files}
        write_text(folder / MANIFEST, json.dumps(content, indent=1))


def is_prepared(output: Path, made_from: dict[str, Any]) -> bool:
    """Whether the folder holds just this already. Raises InvalidInput, by name, if it holds anything else."""
    if not output.exists():
        return False
    if not output.is_dir():
        raise InvalidInput(f"output: {output} is a file; allowed: a folder that does not exist yet")
    names = sorted(path.name for path in output.iterdir())
    if not names:
        return False
    if MANIFEST not in names:
        raise InvalidInput(f"output: {output} holds {names[0]!r} already; allowed: a folder that does not exist yet")
    manifest = _read_manifest(output)
    if differing := _first_difference(manifest.made_from, made_from):
        raise InvalidInput(f"output: {output} was prepared from something else ({differing}); use another folder")
    if damaged := sorted(dict(file_sizes(output).items() ^ manifest.files.items())):
        raise InvalidInput(
            f"output: {output / damaged[0]} is not as it was written; remove {output} and run this again"
        )
    return True


def _read_manifest(output: Path) -> Manifest:
    path = output / MANIFEST
    try:
        return Manifest(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InvalidInput(f"output: {path} is not what jobs.prepare has written: {error!r}") from error


def _first_difference(then: dict[str, Any], now: dict[str, Any]) -> str:
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            if isinstance(then.get(name), dict) and isinstance(now.get(name), dict):
                return f"{name}.{_first_difference(then[name], now[name])}"
            return f"{name}: {_short(then.get(name))}, now {_short(now.get(name))}"
    return ""


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def write_rejects(rows: list[dict[str, Any]], file: RowFile, schema: pa.Schema) -> None:
    if rows:
        file.add(pa.Table.from_pylist(rows, schema=schema))
