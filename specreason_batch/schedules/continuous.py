"""Continuous: no barriers. A chain's next request enters its engine as soon as its last one has ended.

The baselines run here, so that none is held back by lockstep's waiting.
"""

from collections.abc import Iterator

from specreason_batch.rounds import RoundReport
from specreason_batch.schedules.driver import Driver
from specreason_batch.schedules.gates import EVERY_PHASE, run_gated


def continuous(driver: Driver) -> Iterator[RoundReport]:
    """Run all chains; yields a report for every slice of time."""
    return run_gated(driver, lambda _: EVERY_PHASE)
