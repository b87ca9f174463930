"""How uncertain a mean of autocorrelated values is.

The long-run variance is estimated from the first few cosine coefficients of the series (equal-weighted cosines:
Müller 2007, Lazarus, Lewis, Stock and Watson 2018). With K of them, (mean − expectation) / standard error has nearly
Student's t distribution with K degrees of freedom, so that the error of the error is part of the interval. Few
coefficients mean long waves only: correlations much shorter than the series do not matter.

Where the series is so correlated that it is worth fewer than `ENOUGH` independent values, no interval holds, and none
is given. `docs/analysis.md` has the calibration.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import fdtrc, stdtrit

__all__ = ["ENOUGH", "TERMS", "effective_size", "line_of", "quantile", "slowness", "standard_error"]

TERMS = 8
"""Cosine coefficients, and degrees of freedom."""
ENOUGH = 50
"""A series worth fewer independent values has no interval."""

Floats = NDArray[np.float64]


def standard_error(values: Floats, terms: int = TERMS) -> Floats:
    """Return the standard error of the mean along the last axis."""
    waves = _cosines(values.shape[-1], terms)
    return np.asarray(np.sqrt(((values @ waves.T) ** 2).mean(axis=-1) / values.shape[-1]))


@cache
def quantile(level: float, terms: int = TERMS) -> float:
    """Return how many standard errors a two-sided interval reaches to either side."""
    return float(stdtrit(terms, (1 + level) / 2))


def effective_size(values: Floats) -> float:
    """Return how many independent values a series is worth; 0 where it does not vary."""
    if not np.isfinite(values).all() or np.ptp(values) == 0:
        return 0.0
    from arviz_stats.base import array_stats  # brings pandas and scipy along: half a second

    return float(array_stats.ess(values, chain_axis=None, draw_axis=-1, method="mean"))


def line_of(points: Floats) -> tuple[Floats, Floats, Floats]:
    """Fit a line to each column; return the slopes per row, their standard errors, and what is left."""
    n = len(points)
    x = (np.arange(n) - (n - 1) / 2)[:, None]
    centred = points - points.mean(0)
    slope = (x * centred).sum(0) / (x**2).sum()
    residual = centred - slope * x
    return slope, n * standard_error((x * residual).T) / (x**2).sum(), residual


def slowness(values: Floats, slow: int = 4, faster: int = 20) -> float:
    """Return how likely the first cosines are as strong as here, beside the next ones, if all are equally so.

    They are if a series is correlated only over times much shorter than itself; those of a walk or of a wave as long
    as the series, in whatever noise, are stronger. NaN if the series is too short, or does not vary beside them.
    """
    if len(values) <= slow + faster:
        return np.nan
    squares = (_cosines(len(values), slow + faster) @ values) ** 2
    usual = squares[slow:].mean()
    return float(fdtrc(slow, faster, squares[:slow].mean() / usual)) if usual > 0 else np.nan


@cache
def _cosines(n: int, terms: int) -> Floats:
    """Return the first cosines over n values, orthonormal and orthogonal to constants."""
    places = (np.arange(n) + 0.5) / n
    return np.asarray(np.sqrt(2 / n) * np.cos(np.pi * np.outer(np.arange(1, terms + 1), places)))
