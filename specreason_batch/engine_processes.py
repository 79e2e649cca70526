"""The processes of one engine, from the side of the job that started it: `engine_child` is the other side.

Owns: the folder that they share, the shield against the job's signals, what was said of a failure, and the end of every
process that the engine started. Does not know: vLLM, requests.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker, spawn
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from specreason_batch.engine import DeathCause
from specreason_batch.engine_child import MARK, SHIELD, class_name, class_names, send_beginnings, word_file
from specreason_batch.types import InvalidInput

PROC = Path("/proc")
KILL_SECONDS = 5.0  # that killed processes get to be gone; those in a driver's hands may take long
RECENT_SECONDS = 60.0  # words older than this before the last one are of something that was survived
OUT_OF_MEMORY = {"MemoryError", "torch.OutOfMemoryError"}
DEVICE_ERROR = {"torch.AcceleratorError"}


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an engine failed, as far as anybody said."""

    cause: DeathCause = DeathCause.died
    reason: str | None = None  # one line

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """What an exception of this process tells."""
        return cls(_cause(class_names(error)), _first_line(f"{class_name(type(error))}: {error}"))


class EngineProcesses:
    """Started within `starting`; ended by `lower_shield` and then vLLM's own way, or by `kill`; `end` comes last."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="specreason-engine-"))
        self._shield = self._folder / SHIELD
        self._shield.touch()
        self._mark = f"{os.getpid()}:{self._folder}"
        self._started: set[BaseProcess] = set()
        self._going: set[int] = set()  # pids that were found, and have not been seen to end

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Meanwhile, child processes of this one become the engine's. If it fails they are killed, whatever was raised.

        Start it from a thread that lives as long as the engine: the processes end with that thread.
        Raises InvalidInput if they came up without `engine_child`.
        """
        _start_resource_tracker()
        before = set(multiprocessing.active_children())
        os.environ[MARK] = self._mark
        preparation = send_beginnings()
        try:
            yield
            self._started = _children_but(before)
            self._check_shielded()
        except BaseException:
            self._started = _children_but(before)
            self.kill()
            raise
        finally:
            spawn.get_preparation_data = preparation
            del os.environ[MARK]

    def _check_shielded(self) -> None:
        for child in self._started:
            if not word_file(self._folder, child.pid or 0).exists():
                raise InvalidInput(
                    f"{child.name} came up without the plugin specreason_engine_child, so a signal to the job would "
                    "end it: install this project anew, and name the plugin in VLLM_PLUGINS where that is set"
                )

    def lower_shield(self) -> None:
        """From now on they hear signals, vLLM's own SIGTERM among them."""
        self._going = self._found()
        self._shield.unlink(missing_ok=True)

    def failure(self) -> Failure:
        """What they said of it, and how they ended. The first of the last words is nearest to the root."""
        words = self._recent_words()
        errors = [word["error"] for word in words if word["error"]]
        said = [_first_line(text) for text in (errors or [word["message"] for word in words])[:1]]
        exits = {name: code for word in words for name, code in word["exits"].items()}
        exits |= {child.name: child.exitcode for child in self._started if child.exitcode}
        killed = [f"{name} ended by {_signal_name(-code)}" for name, code in exits.items() if code < 0]
        left = [f"{name} ended with status {code}" for name, code in exits.items() if code > 0]
        reason = "; ".join([*killed, *said, *left])
        return Failure(_cause(name for word in words for name in word["classes"]), reason or None)

    def kill(self) -> bool:
        """End all of them at once, stopped and hung ones too; whether they were gone within KILL_SECONDS."""
        deadline = time.monotonic() + KILL_SECONDS
        while self.alive():
            for pid in self._found():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def alive(self) -> set[int]:
        """Pids of the engine's processes that have not ended; orphans of one that was killed are among them."""
        self._going = {pid for pid in self._going | self._found() if not _has_ended(pid)}
        return self._going

    def _found(self) -> set[int]:
        """Those that can be told; of one that is about to end, nothing can be told, and it may hold memory yet."""
        own = {child.pid for child in self._started if child.pid is not None and child.is_alive()}
        return own | _marked(self._mark)

    def end(self) -> None:
        """Kill what is left, and remove what was said. May be called twice."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _recent_words(self) -> list[dict[str, Any]]:
        lines = [line for path in self._folder.glob("*.jsonl") for line in path.read_text().splitlines(keepends=True)]
        words = sorted((json.loads(line) for line in lines if line.endswith("\n")), key=lambda word: word["time"])
        return [word for word in words if words[-1]["time"] - word["time"] <= RECENT_SECONDS]


def _start_resource_tracker() -> None:
    """Before an engine's first process would bring it up: it serves all. It ignores signals of the job but SIGUSR2."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        resource_tracker.ensure_running()  # what is blocked here stays so in it
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _children_but(others: set[BaseProcess]) -> set[BaseProcess]:
    return set(multiprocessing.active_children()) - others


def _cause(classes: Iterable[str]) -> DeathCause:
    names = set(classes)
    if names & OUT_OF_MEMORY:
        return DeathCause.out_of_memory
    return DeathCause.device if names & DEVICE_ERROR else DeathCause.died


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _signal_name(number: int) -> str:
    known = {known.value: known.name for known in signal.Signals}
    return known.get(number, f"signal {number}")


def _marked(mark: str) -> set[int]:
    """Pids of living processes, this one apart, that were started with this mark in their environment."""
    if sys.platform != "linux":
        return set()
    entry = f"{MARK}={mark}".encode()
    pids = (int(path.name) for path in PROC.iterdir() if path.name.isdigit())
    return {pid for pid in pids if pid != os.getpid() and entry in _environment(pid)}


def _has_ended(pid: int) -> bool:
    """Whether nothing is left of it but perhaps its exit status."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _environment(pid: int) -> list[bytes]:
    """As it was when the process began; empty if it is somebody else's, or has ended."""
    try:
        return (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except (PermissionError, FileNotFoundError, ProcessLookupError):
        return []
