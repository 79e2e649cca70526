"""Schedules: drivers of the policies' coroutines. One decides when requests run, never what they are.

A chain's rows do not depend on the schedule: lockstep is the reference, and every other must give the same.
"""

from specreason_batch.schedules.continuous import continuous
from specreason_batch.schedules.driver import Driver, Stopped
from specreason_batch.schedules.lockstep import lockstep

SCHEDULES = {"lockstep": lockstep, "continuous": continuous}

__all__ = ["SCHEDULES", "Driver", "Stopped", "continuous", "lockstep"]
