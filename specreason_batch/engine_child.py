"""What an engine's own processes do for the job that started them.

Owns: the folder that a job and one engine's processes share, seen from their side. They die with the process that
started them, let the signals pass that go to the whole job (a terminal's Ctrl-C, Slurm's), because the job saves first
and closes its engines after, and leave word of why they failed. It enters each of them twice: `begin` is the first
thing that the process does, and `install` comes, as a plugin of vLLM, after vLLM has set up its own signal handlers.
The job's side is `engine_processes`. Does not know: vLLM, what an engine does.
"""

import ctypes
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from multiprocessing import spawn, util
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

MARK = "SPECREASON_ENGINE_CHILD"  # environment variable: "<pid of the job>:<folder>"
SHIELD = "shield"  # a file of the folder: the signals are ignored as long as it is there
SHIELDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
MAX_WORDS = 100  # kept of one process
MAX_MESSAGE = 2000  # characters
LAST = -100  # among what multiprocessing does at a process's end
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class Beginning:
    """Travels with what multiprocessing tells a process that it spawns, and begins there as soon as it is read."""

    def __reduce__(self) -> tuple[Callable[[int], None], tuple[int]]:
        return begin, (os.getpid(),)


def begin(parent: int) -> None:
    """Before vLLM is imported, which takes seconds: signals and the parent's death must not wait for that."""
    die_with(parent)
    if folder := _shared_folder():
        raise_shield(folder / SHIELD)
        send_beginnings()


def send_beginnings() -> Any:
    """From now on, processes that this one spawns `begin`; what `multiprocessing.spawn` did before."""
    before = spawn.get_preparation_data

    def with_beginning(name: str) -> dict[str, Any]:
        return before(name) | {"specreason_beginning": Beginning()}

    spawn.get_preparation_data = with_beginning
    return before


def install() -> None:
    """The plugin; called in the main thread. vLLM loads it in the job too, where it does nothing."""
    folder = _shared_folder()
    if folder is None:
        return
    raise_shield(folder / SHIELD)
    logging.getLogger("vllm").addHandler(LastWords(word_file(folder, os.getpid())))
    util.Finalize(None, leave_at_once, (folder / SHIELD,), exitpriority=LAST)
    word_file(folder, os.getpid()).touch()  # says that this process is shielded


def _shared_folder() -> Path | None:
    """None in the job itself, and where no engine is being started."""
    owner, _, folder = os.environ.get(MARK, "").partition(":")
    return Path(folder) if folder and int(owner) != os.getpid() else None


def word_file(folder: Path, pid: int) -> Path:
    """Where this process leaves word, a JSON object a line."""
    return folder / f"{pid}.jsonl"


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends, be it by kill -9.

    Raises OSError. Elsewhere than on Linux this does nothing.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it was gone before
        os.kill(os.getpid(), signal.SIGKILL)


def raise_shield(shield: Path) -> None:
    """Ignore SHIELDED while that file is there; then pass them on to whoever handled them before."""
    for number in SHIELDED:
        before = signal.getsignal(number)

        def handle(number: int, frame: FrameType | None, before: Any = before) -> None:
            if not shield.exists():
                _pass_on(before, number, frame)

        signal.signal(number, handle)


def _pass_on(handler: Any, number: int, frame: FrameType | None) -> None:
    if callable(handler):
        handler(number, frame)
    elif handler == signal.SIG_DFL:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def leave_at_once(shield: Path) -> None:
    """When the job closes the engine: all is put away, and the interpreter would take seconds to take itself apart."""
    if not shield.exists():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class LastWords(logging.Handler):
    """Writes each error that is logged to a file, with what is known of its exception and of dead child processes."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.ERROR)
        self._path = path
        self._words = 0
        self._children: set[BaseProcess] = set()  # as the first word of a death comes before its status

    def emit(self, record: logging.LogRecord) -> None:
        if self._words >= MAX_WORDS:
            return
        self._words += 1
        self._children.update(_children())
        error = record.exc_info[1] if record.exc_info else None
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(word(record.getMessage(), error, self._children)) + "\n")
        except OSError:
            self.handleError(record)


def word(message: str, error: BaseException | None, children: Collection[BaseProcess] = ()) -> dict[str, Any]:
    """One line of a process's words: plain values only."""
    return {
        "pid": os.getpid(),
        "process": multiprocessing.current_process().name,
        "time": time.time(),
        "message": message[:MAX_MESSAGE],
        "error": f"{class_name(type(error))}: {error}"[:MAX_MESSAGE] if error else None,
        "classes": class_names(error),
        "exits": {child.name: child.exitcode for child in children if child.exitcode},
    }


def class_name(kind: type) -> str:
    """With its module; built-in ones without."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def class_names(error: BaseException | None) -> list[str]:
    """Of everything that this exception is, and of those that led to it."""
    return [class_name(kind) for link in _chain(error) for kind in type(link).__mro__]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _children() -> set[BaseProcess]:
    """Child processes, dead ones too: `multiprocessing.active_children` forgets those before they can be asked."""
    return set(getattr(multiprocessing.process, "_children", ()))
