"""The mean over seeds with an interval for it: seeds are independent, what belongs to one of them is not."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

__all__ = ["DECIDES", "FEWEST", "over_seeds"]

FEWEST = 3
"""Seeds: fewer have no interval."""
DECIDES = 0.99
"""The level at which a few seeds decide a claim: where their law is skewed, intervals of 95% are wrong too often."""

Floats = NDArray[np.float64]


def over_seeds(values: Floats, level: float) -> tuple[Floats, Floats, Floats]:
    """Return the mean along the last axis, and the ends of its interval from Student's t.

    `values` have one value a seed along that axis, and `level` is how often the interval is to hold the mean of the law
    by which seeds differ. Of fewer than three seeds it is NaN.
    """
    count, mean = values.shape[-1], np.asarray(values.mean(axis=-1))
    if count < FEWEST:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    reach = stdtrit(count - 1, (1 + level) / 2) * values.std(axis=-1, ddof=1) / np.sqrt(count)
    return mean, np.asarray(mean - reach), np.asarray(mean + reach)
