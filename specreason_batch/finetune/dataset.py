"""An export's folder as something to train on. Does not know: tokens, trainers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from specreason_batch.finetune.config import Stage
from specreason_batch.store.manifest import file_identity
from specreason_batch.types import InvalidInput, Row

MANIFEST = "export.json"
_STAGES = {
    "sft_messages": Stage.sft,
    "prompt_completion": Stage.sft,
    "text": Stage.sft,
    "step_preferences": Stage.dpo,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What `jobs.export` has written, whole."""

    folder: Path
    format: str
    is_conversational: bool
    train: list[Path]
    validation: list[Path]  # empty: there is no such split
    made_from: dict[str, Any]  # as its manifest says

    @property
    def stage(self) -> Stage:
        return _STAGES[self.format]

    @property
    def first_row(self) -> Row:
        row: Row = next(pq.ParquetFile(self.train[0]).iter_batches(1)).to_pylist()[0]
        return row

    def identity(self) -> dict[str, Any]:
        """What tells this data from any other, and where it came from."""
        files = {path.name: file_identity(path) for path in (*self.train, *self.validation)}
        return {"format": self.format, "files": files, "made_from": self.made_from}


def open_export(data: str, stage: Stage) -> Export:
    """Raises InvalidInput if it is no export, is damaged, or is not for this stage."""
    folder = Path(data)
    manifest = _read_manifest(folder)
    _check_format(data, manifest["format"], stage)
    for name, size in manifest["files"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise InvalidInput(f"data: {folder / name} is not as it was exported; export it again")
    train = sorted(folder.glob("data/train-*.parquet"))
    if not sum(pq.read_metadata(path).num_rows for path in train):
        raise InvalidInput(f"data: {data} has no rows to train on; allowed: an export with a train split")
    return Export(
        folder=folder,
        format=manifest["format"],
        is_conversational=not pa.types.is_string(pq.read_schema(train[0]).field(0).type),
        train=train,
        validation=sorted(folder.glob("data/validation-*.parquet")),
        made_from=manifest["made_from"],
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InvalidInput(f"data: there is no folder {str(folder)!r}; allowed: the output of python -m jobs.export")
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        return {
            "format": str(manifest["made_from"]["choices"]["format"]),
            "made_from": dict(manifest["made_from"]),
            "files": dict(manifest["files"]),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"data: {path} is not what jobs.export has written: {error!r}") from error


def _check_format(data: str, format: str, stage: Stage) -> None:
    fitting = [name for name, needed in _STAGES.items() if stage in (Stage.auto, needed)]
    if format not in fitting:
        raise InvalidInput(f"data: {data} has the format {format}; allowed for stage={stage}: {', '.join(fitting)}")
