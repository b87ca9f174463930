"""How fast moves shrink: a geometric rate, with an interval.

The moves are averaged over some eighty blocks, by their roots, and a line is fitted to the logarithms. What remains
about the line is white noise (backward SGD on a quadratic), a random walk (products of random matrices, whose
logarithms add up), or some of both; which, the data decide: every mixture in a row of them is fitted by generalized
least squares and weighted by its restricted likelihood, so that the interval is as wide as it must be. Least squares
alone would be far too sure.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from trajstore.analysis.longrun import line_of, quantile
from trajstore.analysis.mixtures import Fits, fits_of, interval_of

__all__ = ["BLOCKS", "LEAST", "Rate", "fit_rate"]

BLOCKS = 80
LEAST = 12
"""Blocks that a fit needs."""
_MIXTURES = (0.0, *np.geomspace(0.05, 50, 7).tolist())
"""Variance of the random walk's steps from block to block over that of the white noise."""
_PLAIN = 0.5
"""How likely it is beforehand that there is no walk. Less makes intervals too wide on white noise, more too short where
a walk hides in it; `docs/analysis.md` has how often they hold."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rate:
    """A fit of moves ≈ C·factorⁿ, n counted in steps."""

    factor: float
    low: float
    high: float
    fall: float
    """What the fitted line changes by over the window, as a natural logarithm."""
    fall_low: float
    fall_high: float
    noisy_low: float
    """The interval of the same if there is stationary noise about the line and no walk."""
    noisy_high: float
    changes: float
    """How many standard errors it changes by, if that is so."""
    r2: float
    bend: float
    """The slope of the second half less that of the first, over its standard error: beyond ±3 no line fits."""


def fit_rate(moves: Floats, per_step: int = 1, level: float = 0.95) -> Rate | None:
    """Fit a rate to successive distances, or return None where there are too few that are not zero.

    `per_step` is how many steps lie between two recorded ones.
    """
    length = max(1, len(moves) // BLOCKS)
    while len(moves) // length >= LEAST and not _blocks(moves, length).any(axis=1).all():
        length += max(1, length // 4)
    blocks = _blocks(moves, length)
    count = len(blocks)
    if count < LEAST:
        return None
    # A metric of few values stands still most of the time: it is how often it moves that shrinks.
    # Of noise, the mean of roots varies less than that of logarithms, and hardly more for heavy tails.
    y = 2 * np.log(np.sqrt(blocks).mean(1)) if blocks.all() else 0.5 * np.log((blocks**2).mean(1))
    slope, low, high = _slope(y, level)
    steps, reach = length * per_step, len(moves) / length
    (plain,), (error,), rest = line_of(y[:, None])
    # Of eight waves some errors come out too small by chance: not less than if noise was white.
    white = np.sqrt((rest**2).sum() / (count - 2) * 12 / (count**3 - count))
    off = max(float(error), float(white))
    noise = quantile(level) * off
    line = y.mean() + slope * (np.arange(count) - (count - 1) / 2)
    unexplained, spread = float(((y - line) ** 2).sum()), float(((y - y.mean()) ** 2).sum())
    return Rate(
        factor=float(np.exp(slope / steps)),
        low=float(np.exp(low / steps)),
        high=float(np.exp(high / steps)),
        fall=slope * reach,
        fall_low=low * reach,
        fall_high=high * reach,
        noisy_low=float(plain - noise) * reach,
        noisy_high=float(plain + noise) * reach,
        changes=abs(float(plain)) / off if off > 0 else np.inf if plain else 0.0,
        r2=1 - unexplained / spread if spread > 0 else 1.0,
        bend=_bend(y),
    )


def _blocks(moves: Floats, length: int) -> Floats:
    """Return the last moves in blocks, a row each; what does not fill one is left out at the beginning."""
    count = len(moves) // length
    return moves[len(moves) - count * length :].reshape(count, length)


def _slope(y: Floats, level: float) -> tuple[float, float, float]:
    """Return the slope per block, and its interval."""
    return interval_of(y, _mixtures(len(y)), _PLAIN, level)


def _bend(y: Floats) -> float:
    half = len(y) // 2
    first, second = (_line(part) for part in (y[:half], y[-half:]))
    error = float(np.hypot(first[1], second[1]))
    return (second[0] - first[0]) / error if error > 0 else 0.0


def _line(y: Floats) -> tuple[float, float]:
    """Return a slope and its standard error, the residuals taken for a mixture as likely as any."""
    slope, low, high = _slope(y, 0.68)
    return slope, (high - low) / 2


@cache
def _mixtures(q: int) -> Fits:
    """Return the fits of a slope over so many blocks, under each mixture of white noise and a random walk."""
    places = np.arange(q, dtype=np.float64)
    design = np.column_stack([np.ones(q), places - places.mean()])
    # Averages of a random walk over blocks of length one: its steps within a block count in part.
    walk = np.minimum.outer(places, places) + 0.5 - np.eye(q) / 6
    return fits_of((np.eye(q) + share * walk for share in _MIXTURES), design, 1)
