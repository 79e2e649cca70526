"""The stop signal: a run that is asked to stop saves everything and leaves, within a stated time.

Three ways lead out, each for when the one before cannot: the flag that the loop looks at between polls; an exception
out of whatever the main thread is at, where there is nothing to save (`at_once`); and a thread that ends the process,
for when the main thread does not come back from a call, or the user is in a hurry.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from specreason_batch.schedules import Stopped

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)  # NCCL catches SIGUSR1
STATUS_INTERRUPTED = 130
STATUS_STOPPED = 75


@dataclass(slots=True)
class StopSignal:
    """Set by a signal, looked at between polls. `seconds`: from the signal to the process's end, at most."""

    seconds: float = 60.0
    number: int | None = None
    _at_once: bool = False
    _handlers: dict[int, object] = field(default_factory=dict)

    def check(self) -> None:
        """Raises Stopped once a signal has come."""
        if self.number is not None:
            raise Stopped(f"signal {signal.Signals(self.number).name}")

    def sleep(self, seconds: float) -> None:
        """Wait so long. Raises Stopped as soon as a signal has come."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, 0.1))
        self.check()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Meanwhile a signal raises Stopped wherever the main thread is: models load for minutes and lose nothing."""
        self.check()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False
        self.check()

    @contextmanager
    def installed(self) -> Iterator["StopSignal"]:
        """Catch the stop signals meanwhile (main thread only)."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before: dict[signal.Signals, Any] = {}
        try:
            before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
            with self._watched():
                yield self
        except Stopped:
            before = dict.fromkeys(STOP_SIGNALS, signal.SIG_IGN)  # Slurm repeats itself; the exit status must stand
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        first, self.number = self.number is None, number
        if first and self._at_once:
            self.check()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """A thread learns of signals even while the main thread is inside a call that never comes back."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._watch, args=(reader,), name="stop signal", daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            writer.close()
            thread.join()
            reader.close()

    def _watch(self, reader: socket.socket) -> None:
        deadline: float | None = None
        interrupts = 0
        while True:
            reader.settimeout(None if deadline is None else max(0.001, deadline - time.monotonic()))
            received = b""
            with suppress(TimeoutError):
                received = reader.recv(64)
                if not received:  # uninstalled
                    return
            numbers = [number for number in received if number in STOP_SIGNALS]
            interrupts += numbers.count(signal.SIGINT)
            if interrupts > 1:
                _leave("interrupted at once; what is saved is safe", STATUS_INTERRUPTED)
            if numbers and deadline is None:
                deadline = time.monotonic() + self.seconds
            if deadline is not None and time.monotonic() >= deadline:
                _leave(
                    f"not out {self.seconds:.0f} s after the signal: ended; the last checkpoint holds", STATUS_STOPPED
                )


def _leave(message: str, status: int) -> None:
    """End the process, whatever its other threads are at. Engines' processes die with it (engine_child)."""
    show_cursor = "\x1b[?25h" if os.isatty(2) else ""  # a live display has hidden it
    with suppress(OSError):
        os.write(2, f"{show_cursor}\n{message}\n".encode())
    os._exit(status)
