"""The folders of a training: the model, whole or not at all, and the hidden one beside it that a restart goes on from.

models/draft-sft/                weights of this training; every other file as in the model that was trained
models/draft-sft/README.md       the card
models/draft-sft/finetune.json   the record: made from what, by which settings, its log
models/.draft-sft.training/      checkpoints and encoded rows; gone once the model is there

Does not know: how a model is trained.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specreason_batch.store.attempts import LeaseHeld
from specreason_batch.store.durable import replace_text, sync_folder
from specreason_batch.store.manifest import flatten, model_identity
from specreason_batch.types import InvalidInput

RECORD, CARD = "finetune.json", "README.md"
SETTINGS = "settings.json"
_TRAINER_STATE = "trainer_state.json"  # the last file that transformers writes of a checkpoint
_WEIGHTS = re.compile(r".+\.(safetensors|bin|pth?|gguf|h5|msgpack)(\.index\.json)?")
_TRAINER_ARGUMENTS = "training_args.bin"  # a pickle of the trainer's, no weights


def is_finetuned(output: Path, made_from: dict[str, Any]) -> bool:
    """Whether the folder holds just this already. Raises InvalidInput, by name, if it holds anything else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / RECORD).is_file():
        raise InvalidInput(f"output: {output} is there already; allowed: a folder that does not exist yet")
    record = _read_json(output / RECORD, "what jobs.finetune has written")
    if differing := _first_difference(record.get("made_from", {}), made_from):
        raise InvalidInput(f"output: {output} was trained otherwise ({differing}); use another folder")
    if record.get("model") != model_identity(str(output)):
        raise InvalidInput(f"output: {output} is not as it was written; remove it and run this again")
    return True


class WorkFolder:
    """Where a training that is not finished lives; a folder's name is that of its output."""

    def __init__(self, output: Path):
        self.output = output
        self.path = output.parent / f".{output.name}.training"

    @contextmanager
    def claimed(self, made_from: dict[str, Any]) -> Iterator[None]:
        """Meanwhile no other process trains into this output.

        Raises LeaseHeld if one does, InvalidInput if what is there was begun otherwise.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise LeaseHeld(f"{self.path} is another process's, which trains {self.output}") from error
            self._begin(made_from)
            yield

    def _begin(self, made_from: dict[str, Any]) -> None:
        path = self.path / SETTINGS
        if not path.exists():
            write_json(path, made_from)
        begun = _read_json(path, "what jobs.finetune has written")
        if differing := _first_difference(begun, made_from):
            raise InvalidInput(
                f"output: {self.path} holds a training that was begun otherwise ({differing}); run that command again, "
                "remove the folder, or use another output"
            )

    @property
    def weights(self) -> Path:
        """Where the trainer saves them, to be put in place."""
        return self.path / "model"

    @property
    def checkpoint(self) -> Path | None:
        """The newest whole one."""
        found = [path.parent for path in self.path.glob(f"checkpoint-*/{_TRAINER_STATE}") if _is_json(path)]
        return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def commit(self, parent: Path, record: dict[str, Any], card: str) -> None:
        """Put the model in place: the new weights, the parent's other files, record and card. Raises OSError."""
        for path in self.weights.iterdir():
            if not _is_weights(path):
                path.unlink()
        for path in parent.iterdir():
            if path.is_file() and not _is_weights(path):
                shutil.copyfile(path, self.weights / path.name)
        (self.weights / CARD).write_text(card)
        write_json(self.weights / RECORD, record | {"model": model_identity(str(self.weights))})
        for path in self.weights.iterdir():
            shutil.copymode(self.path / SETTINGS, path)  # safetensors' are its owner's alone
            _sync(path)
        sync_folder(self.weights)
        if self.output.exists():
            self.output.rmdir()  # empty (is_finetuned)
        self.weights.rename(self.output)
        sync_folder(self.output.parent)
        shutil.rmtree(self.path)


def _is_weights(path: Path) -> bool:
    return _WEIGHTS.fullmatch(path.name) is not None and path.name != _TRAINER_ARGUMENTS


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all, and on disk."""
    replace_text(path, json.dumps(content, indent=1))


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"output: {path} is not {what}: {error}") from error
    return content


def _is_json(path: Path) -> bool:
    """Whole, that is."""
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _first_difference(then: dict[str, Any], now: dict[str, Any]) -> str:
    old, new = flatten(then), flatten(json.loads(json.dumps(now)))
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return f"{names[0]}: {_short(old.get(names[0]))}, now {_short(new.get(names[0]))}" if names else ""


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
