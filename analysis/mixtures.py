"""A coefficient of a linear fit whose residuals are correlated, no one knows how: every way in a list is tried.

Each way is a covariance. The fit by generalized least squares is made for all of them, each is weighted by its
restricted likelihood, and the interval is that of the mixture: as wide as it must be where the data do not tell
them apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import stdtr

__all__ = ["Fits", "fits_of", "interval_of"]

Floats = NDArray[np.float64]


class Fits(NamedTuple):
    """What each covariance makes of values, worked out before there are any."""

    residuals: Floats
    """(covariance, place, value): what makes the residuals, white."""
    estimates: Floats
    """(covariance, value): what makes the coefficient."""
    variances: Floats
    """Of the coefficient, where that of the white residuals is 1."""
    constants: Floats
    """What the logarithm of the likelihood has besides the residuals."""
    free: int


def fits_of(covariances: Iterable[Floats], design: Floats, which: int) -> Fits:
    """Work out the fits of one coefficient of a design, (value, coefficient), under each covariance.

    `which` is its place among the columns of the design.
    """
    found = []
    for covariance in covariances:
        root = np.linalg.cholesky(covariance)
        whiten = np.linalg.inv(root)
        white = whiten @ design
        gram = white.T @ white
        solve = np.linalg.inv(gram) @ white.T @ whiten
        constant = -np.log(np.diag(root)).sum() - 0.5 * np.linalg.slogdet(gram)[1]
        found.append((whiten - white @ solve, solve[which], np.linalg.inv(gram)[which, which], constant))
    residuals, estimates, variances, constants = (np.array(column) for column in zip(*found, strict=True))
    return Fits(residuals, estimates, variances, constants, len(design) - design.shape[1])


def interval_of(values: Floats, fits: Fits, plain: float, level: float) -> tuple[float, float, float]:
    """Return the coefficient and its interval at a level.

    `plain` is how likely the first covariance is before the values are known; all others are equally so.
    """
    squares = np.maximum(((fits.residuals @ values) ** 2).sum(1), np.finfo(float).tiny)
    at, scale = fits.estimates @ values, np.sqrt(squares / fits.free * fits.variances)
    evidence = fits.constants - 0.5 * fits.free * np.log(squares)
    weights = np.exp(evidence - evidence.max())
    weights[0] *= plain / (1 - plain) * (len(weights) - 1)
    weights /= weights.sum()
    middle = float(weights @ at)
    if not scale.min() > 0:
        return middle, middle, middle
    widest = 1e3 * (float(np.abs(at - middle).max()) + float(scale.max()))

    def mixed(p: float) -> float:
        above = lambda x: float(weights @ stdtr(fits.free, (x - at) / scale)) - p  # noqa: E731
        return float(brentq(above, middle - widest, middle + widest))

    return middle, mixed((1 - level) / 2), mixed((1 + level) / 2)
