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
from scipy.fft import dct
from scipy.special import fdtrc, stdtrit

__all__ = ["ENOUGH", "TERMS", "effective_size", "line_of", "quantile", "slowness", "standard_error"]

TERMS = 8
"""Cosine coefficients, and degrees of freedom."""
ENOUGH = 50
"""A series worth fewer independent values has no interval."""
_SLOW, _BESIDE = (4, 8), 5
"""So many first cosines are compared with so many times as many next ones."""

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


def slowness(values: Floats) -> float:
    """Return how likely the first cosines of a series are as strong as here, if it varies no more slowly than it shows.

    The first four are compared with the next 20, and the first eight with the next 40, which are about as strong in
    what is correlated only over times much shorter than the series; those of a walk or of a wave as long as it, in
    whatever noise, are stronger. A walk is seen in eight of them where the first four are small by chance, a wave in
    four. NaN if the series is too short, or does not vary beside them.
    """
    squares, chances = dct(values, norm="ortho") ** 2, []
    for slow in _SLOW:
        first, beside = squares[1 : slow + 1], squares[slow + 1 : (1 + _BESIDE) * slow + 1]
        usual = float(beside.mean()) if len(beside) == _BESIDE * slow else 0.0
        if usual > 0:
            chances.append(float(fdtrc(slow, _BESIDE * slow, float(first.mean()) / usual)))
    if not chances:
        return np.nan
    return min(chances[0], *(2 * chance for chance in chances[1:]), 1.0)  # nearly the chance that either is so small


@cache
def _cosines(n: int, terms: int) -> Floats:
    """Return the first cosines over n values, orthonormal and orthogonal to constants."""
    places = (np.arange(n) + 0.5) / n
    return np.asarray(np.sqrt(2 / n) * np.cos(np.pi * np.outer(np.arange(1, terms + 1), places)))
