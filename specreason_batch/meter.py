"""What this process uses, and on what hardware: seconds and joules that no attempt has on its record yet.

Owns: the seconds before a shard's work (interpreter, planning, loading models), so that accounts have no gap.
Does not know: where it is written down, who counts the joules.
"""

import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from specreason_batch.types import Hardware

JoulesCounter = Callable[[], float | None]  # only ever grows; None: nobody counts


class Meter:
    """Runs from `since` (seconds of the monotonic clock; None: now), and from zero joules."""

    def __init__(self, since: float | None = None) -> None:
        self._since = time.monotonic() if since is None else since
        self._counter: JoulesCounter = lambda: None
        self._joules = 0.0  # on the counter when this last began

    def count_joules(self, counter: JoulesCounter) -> None:
        self._counter = counter

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._since

    @property
    def joules(self) -> float | None:
        now = self._counter()
        return None if now is None else now - self._joules

    def restart(self) -> None:
        """All so far is on an attempt's record."""
        self._since = time.monotonic()
        self._joules = self._counter() or 0.0


def process_start() -> float:
    """When this process began, on the monotonic clock; now, where the system does not tell."""
    now = time.monotonic()
    with suppress(OSError, AttributeError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
        return now - max(0.0, since_boot - ticks / os.sysconf("SC_CLK_TCK"))
    return now


def find_hardware(devices: tuple[str, ...] = ()) -> Hardware:
    """This machine as the process may use it. `devices`: names of the GPUs that its engines run on."""
    has_affinity = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return Hardware(devices=devices, num_cores=num_cores, cpu=_cpu_name())


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
