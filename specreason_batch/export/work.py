"""The hidden folder beside the output in which an export grows, and from which the same command goes on.

.dataset.exporting/made_from.json       runs and choices: a folder begun by others is begun anew
.dataset.exporting/survey/000000.parquet ...   a line a chain, a file a part of the runs (survey)
.dataset.exporting/dataset/             becomes the output once it is whole

Does not know: what is in these files.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from specreason_batch.store.attempts import LeaseHeld
from specreason_batch.store.durable import sync_folder, write_text
from specreason_batch.types import InvalidInput

_MADE_FROM, _LOCK = "made_from.json", "lock"


class WorkFolder:
    """Named after its output; of one process at a time."""

    def __init__(self, output: Path):
        self.output = output
        self.path = output.parent / f".{output.name}.exporting"

    @property
    def dataset(self) -> Path:
        return self.path / "dataset"

    @property
    def sketches(self) -> Path:
        """Of this attempt alone."""
        return self.path / "sketches.bin"

    def survey(self, number: int) -> Path:
        """Of one part of the runs."""
        return self.path / "survey" / f"{number:06d}.parquet"

    @contextmanager
    def claimed(self, made_from: dict[str, Any]) -> Iterator[None]:
        """Meanwhile no other process exports to this output. What InvalidInput ends is removed; all else is kept.

        Raises LeaseHeld if one does, OSError.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / _LOCK).open("w") as lock:
            self._take(lock)
            self._begin(made_from)
            try:
                yield
            except InvalidInput:
                shutil.rmtree(self.path)
                raise

    def _take(self, lock: IO[str]) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LeaseHeld(f"{self.path} is another process's, which exports to {self.output}") from error
        if not os.fstat(lock.fileno()).st_nlink:
            raise LeaseHeld(f"{self.path} was another process's, which has just exported to {self.output}")

    def _begin(self, made_from: dict[str, Any]) -> None:
        """Keep what was begun from the same; remove any other."""
        path, text = self.path / _MADE_FROM, json.dumps(made_from, indent=1)
        if not path.exists() or path.read_text() != text:
            path.unlink(missing_ok=True)  # first: without it, nothing here counts
            for folder in (self.survey(0).parent, self.dataset):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
            write_text(path, text)

    def commit(self) -> None:
        """Put the data set in place. Raises OSError."""
        if self.output.exists():
            self.output.rmdir()  # empty (is_exported)
        sync_folder(self.dataset)
        self.dataset.rename(self.output)
        sync_folder(self.output.parent)
        shutil.rmtree(self.path)
