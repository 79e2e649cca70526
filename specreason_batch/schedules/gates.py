"""The loop of every schedule without rounds: after each completion, a gate says which phases may go on.

A chain at a closed gate waits; the others pass it by. What the gate closes over is the whole of such a schedule.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from specreason_batch.rounds import RoundReport
from specreason_batch.schedules.driver import Driver
from specreason_batch.schedules.walk import Walk
from specreason_batch.types import Phase, Role

SLICE_SECONDS = 1.0  # one `rounds` row stands for about this long
EVERY_PHASE = frozenset(Phase)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a gate looks at."""

    num_active: int  # chains
    waiting: Counter[Phase]  # asks that wait for their gate
    drafting: int  # requests at the draft engine
    grading: int  # grades at the base engine


Gate = Callable[[Traffic], Collection[Phase]]


def run_gated(driver: Driver, gate: Gate) -> Iterator[RoundReport]:
    """Run all chains; yields a report for every slice of time. With nothing on its way, every gate is open."""
    held = driver.refill([])
    while held or driver.has_outstanding:
        driver.begin_round()
        slice_end = driver.clock.now() + SLICE_SECONDS
        while (held or driver.has_outstanding) and driver.clock.now() < slice_end:
            driver.submit(held, gate(_traffic(driver, held)) if driver.has_outstanding else EVERY_PHASE)
            left = [walk for walk in held if walk.unsent(EVERY_PHASE)]
            moved = driver.take()
            held = driver.refill([walk for walk in left if not walk.is_over] + moved)
        yield driver.end_round()


def _traffic(driver: Driver, held: list[Walk]) -> Traffic:
    return Traffic(
        num_active=len(driver.admission.active),
        waiting=Counter(walk.asks[place].phase for walk in held for place in walk.unsent(EVERY_PHASE)),
        drafting=driver.num_outstanding(Role.draft),
        grading=driver.num_in_phase(Phase.grade),
    )
