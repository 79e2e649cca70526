"""Paired bootstrap over prompts: 95 % intervals of what is made of sums over them. Pure, but for a fixed seed.

A unit is a prompt with all its samples in every run compared: what belongs together is drawn together.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Statistic = Callable[[Array], Array]  # sums by column, in the last axis, to numbers

NUM_RESAMPLES = 4000
MAX_UNITS = 5_000  # more prompts than this are first thrown together at random: drawing a million anew takes minutes
_CHUNK = 4_000_000  # draws at a time
_NOTHING = 1e-12  # a difference that is rounding


def interval(values: Array, statistic: Statistic, seed: int = 0) -> tuple[float, float]:
    """Percentiles 2.5 and 97.5 of the statistic over resamples of the rows.

    NaN where a resample has no statistic, and where all have the same one: a single row, or rows that are all alike,
    tell nothing of how much others differ.
    """
    drawn = statistic(resampled_sums(_units(values, seed), NUM_RESAMPLES, seed))
    with np.errstate(invalid="ignore"):  # a ratio to nothing
        low, high = np.quantile(drawn, (0.025, 0.975))
    return (math.nan, math.nan) if math.isclose(low, high, abs_tol=_NOTHING) else (float(low), float(high))


def resampled_sums(units: Array, num_resamples: int, seed: int) -> Array:
    """Sums of each column over as many rows drawn with replacement: (num_resamples, columns)."""
    random, size = np.random.default_rng(seed), len(units)
    step = max(1, _CHUNK // size)
    chunks = [min(step, num_resamples - start) for start in range(0, num_resamples, step)]
    return np.concatenate([_drawn(random, size, number) @ units for number in chunks])


def _drawn(random: np.random.Generator, size: int, number: int) -> Array:
    """How often each of `size` rows comes in each of `number` resamples."""
    rows = random.integers(size, size=(number, size)) + size * np.arange(number)[:, None]
    return np.bincount(rows.ravel(), minlength=number * size).reshape(number, size).astype(np.float64)


def _units(values: Array, seed: int) -> Array:
    """The rows, or sums over random groups of them, equal in size but for one row."""
    if len(values) <= MAX_UNITS:
        return values
    order = np.random.default_rng(seed).permutation(len(values))
    starts = np.linspace(0, len(values), MAX_UNITS, endpoint=False).astype(np.int64)
    return np.add.reduceat(values[order], starts, axis=0)
