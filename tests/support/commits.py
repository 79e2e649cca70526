"""The right to commit, for tests of what is committed: nobody contends for it."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Uncontended:
    """A lease without a lease."""

    root: Path

    @property
    def staging(self) -> Path:
        folder = self.root / ".staging"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def check(self) -> None:
        pass

    def commit(self, staged: Path, path: Path) -> None:
        os.replace(staged, path)

    def remove(self, path: Path) -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
