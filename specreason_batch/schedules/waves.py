"""Waves: continuous, but for the drafts. They wait until many want to draft, then start together.

A draft pass costs nearly the same for three chains as for sixty, and where both engines share a device it is the base
that pays: continuous drafting, three chains at a time, takes a quarter of it. Grades and rewrites never wait; the base
is the engine that must not. Found by simulation (docs/performance.md).
"""

from collections.abc import Iterator
from functools import partial

from specreason_batch.rounds import RoundReport
from specreason_batch.schedules.driver import Driver
from specreason_batch.schedules.gates import EVERY_PHASE, Traffic, run_gated
from specreason_batch.types import Phase

JOIN_SHARE = 1 / 3  # of a wave: with so many still drafting, others join them at once


def waves(driver: Driver, wave: float = 0.3) -> Iterator[RoundReport]:
    """Run all chains; yields a report for every slice of time.

    `wave`: share of the active chains that starts drafting together, 0 to 1; 0 is continuous.
    """
    return run_gated(driver, partial(gate, wave=wave))


def gate(traffic: Traffic, wave: float) -> frozenset[Phase]:
    """Drafts go when a wave has gathered, or a part of one is under way."""
    size = wave * traffic.num_active
    if traffic.waiting[Phase.draft] >= size or traffic.drafting >= JOIN_SHARE * size:
        return EVERY_PHASE
    return EVERY_PHASE - {Phase.draft}
