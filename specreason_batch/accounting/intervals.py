"""95 % confidence intervals. Pure; the only randomness is a bootstrap with a fixed seed."""

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959963984540054  # 97.5 % of a standard normal distribution lie below
_NUM_RESAMPLES = 2000
_SEED = 0


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Of a rate, from independent trials (E. B. Wilson, 1927). (0, 1) where there are none."""
    if not trials:
        return 0.0, 1.0
    rate, z2 = successes / trials, Z * Z
    middle = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z / (1 + z2 / trials) * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_mean(values: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Of the mean of units of which `counts` have each of these values: percentiles over resampled units.

    Drawing n units anew and drawing how many of each value come is the same, and quick for a million units.
    """
    counted = np.asarray(counts, dtype=np.int64)
    total = int(counted.sum())
    drawn = np.random.default_rng(_SEED).multinomial(total, counted / total, size=_NUM_RESAMPLES)
    low, high = np.quantile(drawn @ np.asarray(values, dtype=np.float64) / total, (0.025, 0.975))
    return float(low), float(high)


def clustered_rate(rate: float, sum_of_squares: float, total: int) -> tuple[float, float]:
    """Of a rate over all members of clusters: members of one cluster are alike, so the clusters are the units.

    `sum_of_squares`: of each cluster's successes minus `rate` times its size; `total`: members of all clusters.
    """
    half = Z * math.sqrt(sum_of_squares) / total
    return max(0.0, rate - half), min(1.0, rate + half)
