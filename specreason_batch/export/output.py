"""The data set's folder: its files, and how it is known again. Does not know: what makes a chain good.

dataset/README.md                        the card
dataset/data/train-00000-of-00004.parquet ...
dataset/data/validation-00000-of-00001.parquet ...
dataset/removed/<filter>.parquet         aside=true: what each filter removed
dataset/export.json                      made from what, by which choices, how many
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from specreason_batch.export.filters import Filter
from specreason_batch.store.durable import sync_folder, write_text
from specreason_batch.store.row_files import RowFile, even_sizes, file_sizes
from specreason_batch.types import InvalidInput

MANIFEST, CARD = "export.json", "README.md"
REMOVED = pa.schema(
    [("run", pa.string()), ("prompt_id", pa.string()), ("sample_index", pa.int64()), ("reason", pa.string())]
)

Rows = list[dict[str, Any]]


class Split:
    """One split's files, each filled to its size; sizes are within one of each other.

    Files that an earlier attempt has finished are left: as many rows as they hold are passed over.
    """

    def __init__(self, folder: Path, name: str, schema: pa.Schema, num_rows: int, rows_per_file: int):
        self.num_rows, self.num_files = num_rows, -(-num_rows // rows_per_file)
        self._schema = schema
        sizes = even_sizes(num_rows, self.num_files) if num_rows else []
        paths = [folder / "data" / f"{name}-{n:05d}-of-{self.num_files:05d}.parquet" for n in range(self.num_files)]
        num_there = sum(path.is_file() for path in paths)  # the first ones: they are written one after the other
        self.num_to_skip = sum(sizes[:num_there])
        self._left = iter(list(zip(paths, sizes, strict=True))[num_there:])
        self._file: RowFile | None = None
        self._path = Path()
        self._room = 0

    def skip(self, num_rows: int) -> None:
        """Rows that need not be made: at most `num_to_skip`."""
        self.num_to_skip -= num_rows

    def add(self, rows: Rows) -> None:
        skipped = min(len(rows), self.num_to_skip)
        self.skip(skipped)
        rows = rows[skipped:]
        while rows:
            if not self._room:
                self._next()
            assert self._file is not None
            now, rows = rows[: self._room], rows[self._room :]
            self._file.add(pa.Table.from_pylist(now, schema=self._schema))
            self._room -= len(now)

    def close(self) -> None:
        assert not self._room and not list(self._left), "fewer rows than were counted"
        self._finish()

    def _next(self) -> None:
        self._finish()
        self._path, self._room = next(self._left)
        self._file = RowFile(_growing(self._path), self._schema)

    def _finish(self) -> None:
        if self._file:
            self._file.close()
            _growing(self._path).rename(self._path)
            sync_folder(self._path.parent)


def _growing(path: Path) -> Path:
    """Where a file lies that is not whole yet."""
    return path.with_suffix(".growing")


@dataclass(slots=True)
class Aside:
    """What was removed, a file a filter."""

    folder: Path
    _files: dict[Filter, RowFile] = field(default_factory=dict)

    def add(self, by: Filter, rows: Rows) -> None:
        if by not in self._files:
            self._files[by] = RowFile(self.folder / "removed" / f"{by}.parquet", REMOVED)
        self._files[by].add(pa.Table.from_pylist(rows, schema=REMOVED))

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def write_manifest(folder: Path, made_from: dict[str, Any], counts: dict[str, Any]) -> None:
    """Last: it lists the other files."""
    content = {"made_from": made_from, "counts": counts, "files": file_sizes(folder)}
    write_text(folder / MANIFEST, json.dumps(content, indent=1))


def is_exported(output: Path, made_from: dict[str, Any]) -> bool:
    """Whether the folder holds just this already. Raises InvalidInput, by name, if it holds anything else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / MANIFEST).is_file():
        raise InvalidInput(f"output: {output} is there already; allowed: a folder that does not exist yet")
    then = _read_manifest(output)
    now = json.loads(json.dumps(made_from))
    if differing := sorted(_differences(then["made_from"], now)):
        raise InvalidInput(f"output: {output} was exported from something else ({differing[0]}); use another folder")
    if damaged := sorted(dict(file_sizes(output).items() ^ then["files"].items())):
        raise InvalidInput(
            f"output: {output / damaged[0]} is not as it was written; remove {output} and run this again"
        )
    return True


def _read_manifest(output: Path) -> dict[str, Any]:
    path = output / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        return {name: manifest[name] for name in ("made_from", "files")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InvalidInput(f"output: {path} is not what jobs.export has written: {error!r}") from error


def _differences(then: Any, now: Any, path: str = "") -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for name in {*then, *now}:
            yield from _differences(then.get(name), now.get(name), f"{path}.{name}" if path else name)
    elif then != now:
        yield f"{path}: {_short(then)}, now {_short(now)}"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
