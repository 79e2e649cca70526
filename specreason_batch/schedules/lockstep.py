"""Lockstep: the namesake and the reference. Every round, all active chains draft, all are graded, the rejected are
rewritten; then finished chains leave and new ones take their places.
"""

from collections.abc import Iterator

from specreason_batch.rounds import RoundReport
from specreason_batch.schedules.driver import Driver
from specreason_batch.schedules.walk import Walk
from specreason_batch.types import Phase

# Base-written answers ride in the batch of the rewrites: both are decoding by the base.
ROUND = (
    (Phase.draft, (Phase.draft,)),
    (Phase.grade, (Phase.grade,)),
    (Phase.rewrite, (Phase.rewrite, Phase.answer)),
)


def lockstep(driver: Driver) -> Iterator[RoundReport]:
    """Run all chains; yields a report after each round."""
    active: list[Walk] = []
    while active := driver.refill(active):
        driver.begin_round()
        driver.stats.phase_seconds = dict.fromkeys((name for name, _ in ROUND), 0.0)
        for name, phases in ROUND:
            began = driver.clock.now()
            try:
                driver.submit(active, phases)
                driver.drain()
            finally:  # a round that is cut short has its row too
                driver.stats.phase_seconds[name] = driver.clock.now() - began
        yield driver.end_round()
