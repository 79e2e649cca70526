"""Schedules: drivers of the policies' coroutines. One decides when requests run, never what they are.

A chain's rows do not depend on the schedule: lockstep is the reference, and every other must give the same.
"""

from collections.abc import Callable, Iterator

from specreason_batch.rounds import RoundReport
from specreason_batch.schedules.admission import Admission, Capacity
from specreason_batch.schedules.continuous import continuous
from specreason_batch.schedules.driver import Driver, Stopped
from specreason_batch.schedules.lockstep import lockstep
from specreason_batch.schedules.overlapped import overlapped
from specreason_batch.schedules.waves import waves

Schedule = Callable[[Driver], Iterator[RoundReport]]

SCHEDULES: dict[str, Schedule] = {
    "lockstep": lockstep,
    "overlapped": overlapped,
    "continuous": continuous,
    "waves": waves,
}

__all__ = [
    "SCHEDULES",
    "Admission",
    "Capacity",
    "Driver",
    "Schedule",
    "Stopped",
    "continuous",
    "lockstep",
    "overlapped",
    "waves",
]
