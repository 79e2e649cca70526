"""Continuous: no barriers. A chain's next request enters its engine as soon as its last one has ended.

The baselines run here, so that none is held back by lockstep's waiting.
"""

import time
from collections.abc import Iterator

from specreason_batch.chain import Chain
from specreason_batch.rounds import RoundReport
from specreason_batch.schedules.driver import POLL_SECONDS, Driver, Walk
from specreason_batch.types import Role

SLICE_SECONDS = 1.0  # one `rounds` row stands for about this long
SHARED_POLL_SECONDS = 0.002  # a wait on one engine while the other has work too


def continuous(driver: Driver, chains: Iterator[Chain], active_size: int) -> Iterator[RoundReport]:
    """Run all chains, at most `active_size` at a time; yields a report for every slice of time."""
    active: list[Walk] = []
    driver.submit(driver.refill(active, chains, active_size))
    while active:
        driver.begin_round(active)
        slice_end = time.monotonic() + SLICE_SECONDS
        while active and time.monotonic() < slice_end:
            driver.submit(walk for walk in _poll_all(driver) if not walk.is_over)
            driver.submit(driver.refill(active, chains, active_size))
        yield driver.end_round()


def _poll_all(driver: Driver) -> list[Walk]:
    """One poll of each engine that has work; the walks that moved on."""
    busy = [role for role, engine in driver.engines.items() if engine.num_outstanding]
    began = time.monotonic()
    moved = [
        walk for role in busy for walk in driver.take(role, SHARED_POLL_SECONDS if len(busy) > 1 else POLL_SECONDS)
    ]
    seconds = time.monotonic() - began
    driver.stats.draft_busy_seconds += seconds * (Role.draft in busy)
    driver.stats.base_busy_seconds += seconds * (Role.base in busy)
    return moved
