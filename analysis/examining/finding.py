"""What is found of a claim in one place of a store, and how an interval decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import xarray as xr

__all__ = ["FAILS", "HOLDS", "OPEN", "Finding", "Number", "Verdict", "by_interval", "number_of"]

Verdict = Literal["holds", "does not hold", "not decidable here"]
HOLDS: Verdict = "holds"
FAILS: Verdict = "does not hold"
OPEN: Verdict = "not decidable here"


@dataclass(frozen=True)
class Finding:
    """One number, what it is of, and what it says of the claim."""

    verdict: Verdict
    about: str
    """Of what in the experiment: a seed, a metric, a step."""
    statistic: str
    value: float = np.nan
    low: float = np.nan
    """Its interval, of 95% where the evidence names no other level; NaN where the number is exact, or has none. Where
    only a bound is known, the other end is infinite, or 0 of what is positive."""
    high: float = np.nan
    evidence: str = ""


Number = tuple[float, float, float]
"""A value and its interval."""


def by_interval(threshold: float, about: str, statistic: str, number: Number, why: str = "") -> Finding:
    """Find that a number is above a threshold, if its whole interval is, or that it is not, if all of it is below.

    `about` and `statistic` are those of the finding, and `why` says why there is no interval. One that is open to a
    side decides by its other end.
    """
    value, low, high = number
    if not np.isfinite([low, high]).any():
        return Finding(OPEN, about, statistic, value, low, high, why or "it has no interval")
    if low > threshold:
        return Finding(HOLDS, about, statistic, value, low, high, f"the interval is above {threshold:g}")
    if high < threshold:
        return Finding(FAILS, about, statistic, value, low, high, f"the interval is below {threshold:g}")
    return Finding(OPEN, about, statistic, value, low, high, f"the interval contains {threshold:g}")


def number_of(found: xr.Dataset, name: str, low: str | None = None, high: str | None = None) -> Number:
    """Return a value of a result with its interval, by default ``name_low`` and ``name_high``."""
    return float(found[name]), float(found[low or f"{name}_low"]), float(found[high or f"{name}_high"])
