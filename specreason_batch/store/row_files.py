"""Parquet files that grow by rows, and folders of them. Does not know: what a row is."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

GROUP_ROWS = 1024  # rows held back before they are written


class RowFile:
    """A Parquet file that grows by rows; it exists once there is a row, and is on disk once it is closed."""

    def __init__(self, path: Path, schema: pa.Schema, level: int | None = None):
        self._path, self._schema, self._level = path, schema, level
        self._waiting: list[pa.Table] = []
        self._file: Any = None
        self._writer: pq.ParquetWriter | None = None
        self.num_rows = 0

    def add(self, table: pa.Table) -> None:
        self._waiting.append(table)
        self.num_rows += table.num_rows
        if sum(waiting.num_rows for waiting in self._waiting) >= GROUP_ROWS:
            self._write()

    def close(self) -> None:
        if self.num_rows and self._waiting:
            self._write()
        if self._writer is not None:
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def _write(self) -> None:
        table = pa.concat_tables(self._waiting)
        self._waiting = []
        if self._writer is None:
            self._path.parent.mkdir(exist_ok=True)
            self._file = self._path.open("wb")
            self._writer = pq.ParquetWriter(self._file, self._schema, compression="zstd", compression_level=self._level)
        if table.num_rows:
            self._writer.write_table(table)


def even_sizes(num_rows: int, num_files: int) -> list[int]:
    """Rows of each file, within one of each other."""
    return [num_rows * (file + 1) // num_files - num_rows * file // num_files for file in range(num_files)]


def file_sizes(folder: Path) -> dict[str, int]:
    """Of the Parquet files, by their names from the folder."""
    found = sorted(path for path in folder.rglob("*.parquet"))
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
