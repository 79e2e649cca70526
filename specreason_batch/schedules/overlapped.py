"""Overlapped: drafts and grades in batches, as in lockstep, but nobody waits for a rewrite. Rewrites ride along with
later rounds' grades, and their chains rejoin at the next drafting.

With two cohorts one is drafted while the other is graded. It pays where the engines have devices of their own.
"""

from collections.abc import Iterator
from functools import partial

from specreason_batch.rounds import RoundReport
from specreason_batch.schedules.driver import Driver
from specreason_batch.schedules.gates import Traffic, run_gated
from specreason_batch.types import Phase

BASE_WRITES = frozenset((Phase.rewrite, Phase.answer))


def overlapped(driver: Driver, cohorts: int = 1) -> Iterator[RoundReport]:
    """Run all chains; yields a report for every slice of time. `cohorts`: 1 or 2."""
    return run_gated(driver, partial(gate, cohorts=cohorts))


def gate(traffic: Traffic, cohorts: int) -> frozenset[Phase]:
    """A batch of grades goes when its drafts are all there; the next drafts when the grades are, or by turns."""
    if traffic.drafting:
        return BASE_WRITES
    if cohorts == 1 and (traffic.grading or traffic.waiting[Phase.grade]):
        return BASE_WRITES | {Phase.grade}
    return BASE_WRITES | {Phase.grade, Phase.draft}
