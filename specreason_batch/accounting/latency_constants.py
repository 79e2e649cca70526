"""What one stream costs on some machine: the constants of the paper's latency formula, and where they are from."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from specreason_batch.types import InvalidInput

_MISSING: Any = "???"  # OmegaConf's: a value that must be given


@dataclass(kw_only=True)
class LatencyConstants:
    """Of one chain alone, in seconds. Raises InvalidInput that lists every field out of range.

    Grading goes by `grade_seconds` where it is given, else by `base_prefill_seconds_per_token`.
    """

    base_seconds_per_token: float = _MISSING  # generated
    draft_seconds_per_token: float = _MISSING  # generated
    grade_seconds: float | None = None  # a grade: one prefill of the drafted step and the grading turn
    base_prefill_seconds_per_token: float | None = None  # computed, those found in the prefix cache not counted
    time_to_first_token_seconds: float = 0.0  # of the base, on the prompt
    source: str = _MISSING  # where they are from, and whether they were measured

    def __post_init__(self) -> None:
        if problems := list(self.problems()):
            raise InvalidInput("\n".join(problems))

    def problems(self, path: str = "latency") -> Iterator[str]:
        for name in _NUMBERS:
            value = getattr(self, name)
            if value is None and name in _EITHER:
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
                yield f"{path}.{name}: {value!r}; allowed: seconds, at least 0"
        if self.source in ("", _MISSING):
            yield f"{path}.source: {self.source!r}; allowed: a text that says where the constants are from"
        if all(getattr(self, name) is None for name in _EITHER):
            yield f"{path}: neither {_EITHER[0]} nor {_EITHER[1]} is given; one of them is needed"


_NUMBERS = tuple(field.name for field in fields(LatencyConstants) if field.name != "source")
_EITHER = ("grade_seconds", "base_prefill_seconds_per_token")


def read_calibration(path: Path) -> LatencyConstants:
    """The constants that `python -m jobs.calibrate` measured. Raises InvalidInput."""
    try:
        written = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"latency: {str(path)!r} cannot be read as a calibration: {error}") from error
    constants = written.get("constants") if isinstance(written, dict) else None
    if not isinstance(constants, dict):
        raise InvalidInput(
            f"latency: {str(path)!r} holds no `constants`; allowed: a file of `python -m jobs.calibrate`"
        )
    try:
        return LatencyConstants(
            **{name: constants[name] for name in _NUMBERS if name in constants},
            source=f"measured by jobs.calibrate ({path.name}){_told(written.get('machine'))}",
        )
    except InvalidInput as error:
        raise InvalidInput(f"{path}:\n{error}") from error


def _told(machine: Any) -> str:
    """The machine in words."""
    if not isinstance(machine, dict):
        return ""
    return " on " + ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)
