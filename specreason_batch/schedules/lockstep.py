"""Lockstep: the namesake and the reference. Every round, all active chains draft, all are graded, the rejected are
rewritten; then finished chains leave and new ones take their places.
"""

import time
from collections.abc import Iterator

from specreason_batch.chain import Chain
from specreason_batch.rounds import RoundReport
from specreason_batch.schedules.driver import Driver, Walk
from specreason_batch.types import Phase, Role

# Base-written answers ride in the batch of the rewrites: both are decoding by the base.
ROUND = (
    (Phase.draft, (Phase.draft,)),
    (Phase.grade, (Phase.grade,)),
    (Phase.rewrite, (Phase.rewrite, Phase.answer)),
)


def lockstep(driver: Driver, chains: Iterator[Chain], active_size: int) -> Iterator[RoundReport]:
    """Run all chains, at most `active_size` at a time; yields a report after each round."""
    active: list[Walk] = []
    while True:
        driver.refill(active, chains, active_size)
        if not active:
            return
        driver.begin_round(active)
        for name, phases in ROUND:
            driver.stats.phase_seconds[name] = _run_batch(driver, active, phases)
        yield driver.end_round()


def _run_batch(driver: Driver, active: list[Walk], phases: tuple[Phase, ...]) -> float:
    """One batch to its end; seconds."""
    began = time.monotonic()
    driver.submit(active, phases)
    for role in driver.engines:
        seconds = driver.drain(role)
        if role is Role.draft:
            driver.stats.draft_busy_seconds += seconds
        else:
            driver.stats.base_busy_seconds += seconds
    return time.monotonic() - began
