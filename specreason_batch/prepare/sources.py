"""Input files: what columns they have, and their rows in batches. Does not know: what the columns mean.

Parquet says its columns' types. JSONL is read once to check every line and to find the types, and once more for the
rows; a column whose values have no common type is carried as JSON text.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from itertools import islice
from os.path import commonpath
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from specreason_batch.types import InvalidInput

PARQUET = (".parquet",)
JSONL = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
BATCH_ROWS = 1024
_READ_BUFFER = 1 << 20  # bytes
_BATCH_BYTES = 1 << 24  # of JSON text

Columns = dict[str, pa.DataType | None]  # None: values without a common type


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file of the input."""

    path: Path
    name: str  # as rejects call it: from the folder that all files are in

    @property
    def is_parquet(self) -> bool:
        return self.path.name.endswith(PARQUET)

    def fingerprint(self) -> dict[str, Any]:
        """Name, size and a hash of the whole content. Raises InvalidInput."""
        try:
            with self.path.open("rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
            return {"file": self.name, "bytes": self.path.stat().st_size, "blake2b": digest}
        except OSError as error:
            raise InvalidInput(f"input: {self.path} cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class Scan:
    """What a file holds."""

    file: InputFile
    columns: Columns
    num_rows: int


@dataclass(frozen=True, slots=True)
class Carried:
    """The columns that are carried through."""

    names: Mapping[str, str]  # in the output, by their names in the input
    schema: pa.Schema  # of the output's columns
    as_json: frozenset[str]  # input columns whose values have no common type


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows of a file."""

    file: str
    rows: list[int]  # positions from 0; of JSONL, the line's number less one
    values: dict[str, list[Any]]  # of the columns that are read row by row
    carried: list[pa.Array]  # the columns that are carried through, in their order


def list_inputs(given: str) -> list[InputFile]:
    """A file, a folder's files, or a glob (`**` too), in name order. Raises InvalidInput if there is none."""
    path = Path(given)
    if path.is_dir():
        found = [item for item in path.iterdir() if item.name.endswith(PARQUET + JSONL) and item.name[0] != "."]
    else:
        found = [path] if path.is_file() else [Path(name) for name in glob(given, recursive=True)]
    found = sorted(item for item in found if item.is_file())
    if not found:
        raise InvalidInput(f"input: no file at {given!r}; allowed: a file, a folder or a glob of {_endings()}")
    if other := [item for item in found if not item.name.endswith(PARQUET + JSONL)]:
        raise InvalidInput(f"input: {other[0]} is of no known kind; allowed: {_endings()}")
    top = commonpath([item.parent.resolve() for item in found])
    return [InputFile(item, (item.parent.resolve() / item.name).relative_to(top).as_posix()) for item in found]


def _endings() -> str:
    return ", ".join(PARQUET + JSONL)


# --- what there is ---


def scan(file: InputFile, progress: Callable[[str, int], None]) -> Scan:
    """`progress` is told the file's name and how many rows were checked.

    Raises InvalidInput if the file cannot be read; of JSONL, with the line.
    """
    return _scan_parquet(file) if file.is_parquet else _scan_jsonl(file, progress)


def _scan_parquet(file: InputFile) -> Scan:
    parquet = _open_parquet(file)
    schema = parquet.schema_arrow
    if doubled := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise InvalidInput(f"input: {file.path} has two columns named {doubled[0]!r}")
    return Scan(file, {field.name: _written_as(field.type) for field in schema}, parquet.metadata.num_rows)


def _written_as(type: pa.DataType) -> pa.DataType:
    """The plain form of types that are another way of holding the same values."""
    if pa.types.is_dictionary(type):
        return _written_as(type.value_type)
    return pa.string() if pa.types.is_string_view(type) else type


def _open_parquet(file: InputFile) -> pq.ParquetFile:
    try:
        parquet = pq.ParquetFile(file.path)
        _ = parquet.schema_arrow  # names that are no text come up here
        return parquet
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise InvalidInput(f"input: {file.path} is not a readable Parquet file: {error}") from error


def _scan_jsonl(file: InputFile, progress: Callable[[str, int], None]) -> Scan:
    columns: Columns = {}
    num_rows = 0
    for batch in _json_batches(file):
        num_rows += len(batch)
        for name in {name for _, row in batch for name in row}:
            found = _type_of([row.get(name) for _, row in batch])
            columns[name] = _common(columns[name], found) if name in columns else found
        progress(file.name, num_rows)
    if bad := sorted(name for name in columns if not _is_unicode(name)):
        raise InvalidInput(f"input: {file.path} has a column {bad[0]!r}, which is not text")
    return Scan(file, dict(sorted(columns.items())), num_rows)


def _is_unicode(name: str) -> bool:
    return name == name.encode(errors="replace").decode()


def _type_of(values: list[Any]) -> pa.DataType | None:
    try:
        type = pa.array(values).type
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return None
    return None if _has_empty_struct(type) else type


def _has_empty_struct(type: pa.DataType) -> bool:
    """Parquet has none."""
    if pa.types.is_list(type):
        return _has_empty_struct(type.value_type)
    return pa.types.is_struct(type) and (not type.num_fields or any(_has_empty_struct(field.type) for field in type))


def _common(a: pa.DataType | None, b: pa.DataType | None) -> pa.DataType | None:
    """The type that holds the values of both; None if there is none."""
    if a is None or b is None or a == b:
        return a if b is not None else None
    try:
        both = [pa.schema([("values", type)]) for type in (a, b)]
        return pa.unify_schemas(both, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return None


def column_names(scans: Sequence[Scan]) -> list[str]:
    """Of all files, in the order in which they come up."""
    return list(dict.fromkeys(name for found in scans for name in found.columns))


def carry(scans: Sequence[Scan], names: Mapping[str, str]) -> Carried:
    """These columns, with one type each. Raises InvalidInput if Parquet files disagree about it."""
    types = {name: _common_type(scans, name) for name in names}
    schema = pa.schema([(new, _or_text(types[name])) for name, new in names.items()])
    return Carried(names, schema, frozenset(name for name, type in types.items() if type is None))


def _or_text(type: pa.DataType | None) -> pa.DataType:
    return pa.string() if type is None or pa.types.is_null(type) else type


def _common_type(scans: Sequence[Scan], name: str) -> pa.DataType | None:
    having = [found for found in scans if name in found.columns]
    type = having[0].columns[name]
    for found in having[1:]:
        type = _common(type, found.columns[name])
    if type is None and (parquet := next((found for found in having if found.file.is_parquet), None)):
        other = next(found for found in having if _common(found.columns[name], parquet.columns[name]) is None)
        raise InvalidInput(
            f"input: column {name!r} is {parquet.columns[name]} in {parquet.file.path} and "
            f"{other.columns[name] or 'of several types'} in {other.file.path}; allowed: one type"
        )
    return type


# --- rows ---


def read_batches(found: Scan, columns: Collection[str], carried: Carried) -> Iterator[Batch]:
    """All rows in order; of `columns` the values as Python has them. Raises InvalidInput if the file is torn."""
    return (_parquet_rows if found.file.is_parquet else _jsonl_rows)(found, columns, carried)


def _parquet_rows(found: Scan, columns: Collection[str], carried: Carried) -> Iterator[Batch]:
    first = 0
    for batch in _parquet_batches(found, [name for name in found.columns if name in {*columns, *carried.names}]):
        num_rows = batch.num_rows
        try:
            yield Batch(
                file=found.file.name,
                rows=list(range(first, first + num_rows)),
                values={name: _column(batch, name, pa.null()).to_pylist() for name in columns},
                carried=[_column(batch, name, carried.schema.field(new).type) for name, new in carried.names.items()],
            )
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise InvalidInput(f"input: {found.file.path}, after row {first}: {error}") from error
        first += num_rows


def _column(batch: pa.RecordBatch, name: str, type: pa.DataType) -> pa.Array:
    """Of this type, where that is not null; all null where the file has no such column."""
    if name not in batch.schema.names:
        return pa.nulls(batch.num_rows, type)
    array = batch.column(name)
    array.validate(full=True)  # of text: that it is UTF-8
    return array if array.type == type or pa.types.is_null(type) else array.cast(type)


def _parquet_batches(found: Scan, columns: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        file = pq.ParquetFile(found.file.path, buffer_size=_READ_BUFFER)
        yield from file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise InvalidInput(f"input: {found.file.path} is damaged: {error}") from error


def _jsonl_rows(found: Scan, columns: Collection[str], carried: Carried) -> Iterator[Batch]:
    for batch in _json_batches(found.file):
        yield Batch(
            file=found.file.name,
            rows=[row for row, _ in batch],
            values={name: [row.get(name) for _, row in batch] for name in columns},
            carried=[_json_array([row.get(name) for _, row in batch], name, carried, found) for name in carried.names],
        )


def _json_array(values: list[Any], name: str, carried: Carried, found: Scan) -> pa.Array:
    type = carried.schema.field(carried.names[name]).type
    if name in carried.as_json:
        values = [None if value is None else json.dumps(value) for value in values]
    elif pa.types.is_floating(type):
        values = [None if value is None else float(value) for value in values]
    try:
        return pa.array(values, type)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise InvalidInput(f"input: {found.file.path}: column {name!r} cannot be held as {type}: {error}") from error


def _json_batches(file: InputFile) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Rows with their positions; as many as have `_BATCH_BYTES` of text, at most BATCH_ROWS."""
    lines = _lines(file)
    while batch := list(_some(lines)):
        yield [(number, _object(file, number, line)) for number, line in batch]


def _some(lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    num_bytes = 0
    for number, line in islice(lines, BATCH_ROWS):
        yield number, line
        num_bytes += len(line)
        if num_bytes > _BATCH_BYTES:
            return


def _lines(file: InputFile) -> Iterator[tuple[int, bytes]]:
    """Those that are not blank. Raises InvalidInput if the file is torn."""
    number = 0
    try:
        with gzip.open(file.path) if file.path.suffix == ".gz" else file.path.open("rb") as lines:
            for number, line in enumerate(lines):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidInput(f"input: {file.path} cannot be read after line {number + 1}: {error}") from error


def _object(file: InputFile, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"input: {file.path}, line {number + 1}: not JSON: {error}; {_start(line)}") from error
    if not isinstance(row, dict):
        raise InvalidInput(f"input: {file.path}, line {number + 1}: not a JSON object; {_start(line)}")
    return row


def _start(line: bytes) -> str:
    text = line.decode(errors="replace").strip()
    return f"it starts with {text[:60]!r}; allowed: one object a line"
