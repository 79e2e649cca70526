"""Comparisons in worker processes, which are killed where one hangs and replaced where one dies.

Comparisons travel in batches. A batch that runs out of time, or whose worker dies, is taken apart and each of its
comparisons made alone, so that only the culprit is without a result. Does not know: chains, verdicts, files.
"""

import logging
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType

from pebble import ProcessExpired, ProcessPool

from specreason_batch.store.verdicts import AnswerKind
from specreason_batch.verify.compare import Comparison, Outcome, compare

TIMED_OUT = "timed out"
KILLED = "killed the worker"
_BATCH = 16  # comparisons of about 3 ms; what a hanging one makes the others wait for stays small
_PATIENCE = 0.2  # seconds until the caller looks at signals again
_OUT_OF_MEMORY = 78  # exit status of a worker
# Made before the clock runs: the first one builds the parser, 0.3 s of work that a busy machine may stretch to many.
_FIRST = Comparison(kind=AnswerKind.math, expected="x^2", extracted="2x")
# Of the limit: a comparison that took more, and found nothing equal, may have failed for want of it.
_MEMORY_SHARE = 0.25
_ALARM_SECONDS = 2.0  # after the pool should have killed a worker: it does so itself, for its job may be gone
_FROM_OUTSIDE = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGUSR2)  # exit codes: a signal that went to all processes


@dataclass(eq=False, slots=True)
class Pending:
    """Comparisons under way."""

    num_wanted: int
    outcomes: dict[Comparison, Outcome] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return len(self.outcomes) == self.num_wanted


@dataclass(frozen=True, slots=True)
class _Batch:
    pending: Pending
    comparisons: Sequence[Comparison]


class Workers:
    """A pool of them, for as long as the context is entered."""

    def __init__(self, num_workers: int, timeout_seconds: float, memory_gib: float, check: Callable[[], None]):
        """`check`: raises where the caller is to stop."""
        self.num_timeouts = 0
        self.num_deaths = 0
        self._timeout = timeout_seconds
        self._memory_bytes = int(memory_gib * 2**30)
        self._check = check
        self._batches: dict[Future[list[Outcome]], _Batch] = {}
        context = multiprocessing.get_context("forkserver")  # this process has threads; spawned ones would import SymPy
        context.set_forkserver_preload([__name__])
        self._pool = ProcessPool(
            max_workers=num_workers,
            initializer=_begin,
            initargs=(self._memory_bytes,),
            context=context,
        )

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()

    def submit(self, comparisons: Iterable[Comparison]) -> Pending:
        """`comparisons`: each once."""
        wanted = list(comparisons)
        pending = Pending(len(wanted))
        left = iter(wanted)
        while batch := list(islice(left, _BATCH)):
            self._schedule(_Batch(pending, batch))
        return pending

    def step(self) -> None:
        """Wait for a batch to end, for a moment at most, and note what came of it. Raises what `check` does."""
        self._check()
        done, _ = wait(self._batches, timeout=_PATIENCE, return_when=FIRST_COMPLETED)
        self._check()
        for future in done:
            self._note(future, self._batches.pop(future))

    def _schedule(self, batch: _Batch) -> None:
        future = self._pool.schedule(
            _compare_all, args=(batch.comparisons, self._memory_bytes, self._timeout), timeout=self._timeout
        )
        self._batches[future] = batch

    def _note(self, future: Future[list[Outcome]], batch: _Batch) -> None:
        try:
            outcomes = future.result()
        except TimeoutError:
            self._take_apart(batch, self._timed_out)
        except ProcessExpired as error:
            if error.exitcode in _FROM_OUTSIDE:
                self._schedule(batch)
            elif error.exitcode == -signal.SIGALRM:
                self._take_apart(batch, self._timed_out)
            else:
                self._take_apart(batch, f"{KILLED}, {_cause(error.exitcode)}")
        else:
            batch.pending.outcomes.update(zip(batch.comparisons, outcomes, strict=True))

    @property
    def _timed_out(self) -> str:
        return f"{TIMED_OUT} after {self._timeout:g} s"

    def _take_apart(self, batch: _Batch, reason: str) -> None:
        if len(batch.comparisons) > 1:
            for comparison in batch.comparisons:
                self._schedule(_Batch(batch.pending, [comparison]))
            return
        self.num_timeouts += reason.startswith(TIMED_OUT)
        self.num_deaths += reason.startswith(KILLED)
        outcome = Outcome(same=None, reason=reason, seconds=self._timeout if reason.startswith(TIMED_OUT) else 0.0)
        batch.pending.outcomes[batch.comparisons[0]] = outcome


def _cause(exitcode: int | None) -> str:
    if exitcode == _OUT_OF_MEMORY:
        return "which ran out of memory"
    return f"which ended with status {exitcode}"


# --- in a worker ---


def _begin(memory_bytes: int) -> None:
    """SIGTERM and the alarm end a worker at once, even inside a call that takes for ever."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off
    compare(_FIRST)
    limit = _status_bytes("VmSize") + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.set_int_max_str_digits(0)


def _compare_all(comparisons: Sequence[Comparison], memory_bytes: int, timeout_seconds: float) -> list[Outcome]:
    with _alarm(timeout_seconds + _ALARM_SECONDS):
        return [_compare_or_die(comparison, memory_bytes) for comparison in comparisons]


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """End this process if it takes longer: nobody else does once the job was ended by kill -9."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _compare_or_die(comparison: Comparison, memory_bytes: int) -> Outcome:
    """SymPy swallows a MemoryError and goes on: a comparison that failed for want of memory looks like a plain no."""
    try:
        outcome = compare(comparison)
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    left_at_peak = resource.getrlimit(resource.RLIMIT_AS)[0] - _status_bytes("VmPeak")
    if outcome.same is not True and left_at_peak < (1 - _MEMORY_SHARE) * memory_bytes:
        os._exit(_OUT_OF_MEMORY)
    return outcome


def _status_bytes(name: str) -> int:
    """VmSize: the address space of this process; VmPeak: the most that it ever had. 0 where the system does not say."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0
