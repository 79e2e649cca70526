"""Several jobs side by side on one node: started, told of signals, waited for. None outlives this process.

Each runs in a session of its own, so that a terminal's signals reach it from here only. Slurm may still send them to
every process of a job; for jobs a second SIGINT means to end at once, so none is passed on: see `_passed_on`.
Does not know: Slurm, what the jobs do, what their exit statuses mean.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
_LOOK_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1


@dataclass(slots=True)
class Received:
    """The stop signals that came, in order."""

    numbers: list[int] = field(default_factory=list)

    def install(self) -> None:
        """Remember them from here on."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def ignore(self) -> None:
        """From here on they mean nothing any more, to this process and to those that it starts."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    @property
    def any(self) -> bool:
        return bool(self.numbers)

    @property
    def by_a_person(self) -> bool:
        """Slurm sends no SIGINT by itself: `scancel --signal=INT`, or Ctrl-C."""
        return signal.SIGINT in self.numbers

    @property
    def at_once(self) -> bool:
        """A second SIGINT: nobody wants to wait."""
        return self.numbers.count(signal.SIGINT) > 1

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.numbers.append(number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One job to run."""

    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)  # beside this process's own
    log: Path | None = None  # its output is appended there; None: to this process's


def run_side_by_side(
    commands: Sequence[Command], received: Received, ends_all: Callable[[int], bool] = lambda status: False
) -> list[int]:
    """Exit statuses in the commands' order (negative: ended by that signal). Signals are passed on as they come.

    `ends_all`: the status of one job with which the others are stopped too.
    """
    jobs = [_start(command) for command in commands]
    told = 0
    stopping = False
    while any(job.poll() is None for job in jobs):
        for number in received.numbers[told:]:
            _tell(jobs, _passed_on(number, again=number in received.numbers[:told]))
            told += 1
        if not stopping and any(job.returncode is not None and ends_all(job.returncode) for job in jobs):
            stopping = True
            _tell(jobs, signal.SIGTERM)
        time.sleep(_LOOK_SECONDS)
    return [job.returncode for job in jobs]


def _passed_on(number: int, again: bool) -> int:
    """What a job gets: the first SIGINT asks it to stop as any other signal, a second one ends it."""
    if number != signal.SIGINT:
        return number
    return signal.SIGKILL if again else signal.SIGTERM


def _tell(jobs: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for job in jobs:
        if job.poll() is None:
            job.send_signal(number)


def _start(command: Command) -> subprocess.Popen[bytes]:
    log = command.log.open("ab") if command.log else None
    try:
        return subprocess.Popen(
            command.words,
            env={**os.environ, **command.environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log and subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=dying_with(os.getpid()),  # noqa: PLW1509 (this process has no threads of its own)
        )
    finally:
        if log:
            log.close()


def dying_with(parent: int) -> Callable[[], None] | None:
    """Run in the new process: the kernel kills it when its parent ends, however that comes."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl

    def arrange() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended meanwhile
            os._exit(1)

    return arrange
