"""What tells the time and waits: the wall clock here, a virtual one in `simulated_engine`."""

import threading
import time
from typing import Protocol


class Clock(Protocol):
    """Shared by the two engines of a run and by the schedule that drives them."""

    def now(self) -> float:
        """Seconds since some fixed moment; never goes back."""
        ...

    def wait(self, timeout: float) -> None:
        """Return once an engine may have something for `poll`, after `timeout` seconds at the latest."""
        ...

    def ring(self) -> None:
        """An engine's word that its `poll` may have something; from any thread."""
        ...


class WallClock:
    """Real time. A ring that nobody waits for yet is kept for the next `wait`."""

    def __init__(self) -> None:
        self._rung = threading.Event()

    def now(self) -> float:
        return time.monotonic()

    def wait(self, timeout: float) -> None:
        self._rung.wait(timeout)
        self._rung.clear()

    def ring(self) -> None:
        self._rung.set()
