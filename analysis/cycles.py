"""Whether a path goes round: lines in its spectrum, and returns to where it was."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from trajstore.analysis.longrun import line_of

__all__ = ["lines_of", "return_of"]

Floats = NDArray[np.float64]
_LOWEST, _BESIDE, _ABOUT = 3, 10, 2
"""Cycles in a window at the least; frequencies on either side that a line is compared with, and those that belong to
it."""
_LEFT, _SOON, _LONGEST = 0.2, 0.25, 0.75
"""It has left where it was once its autocorrelation is below that, in so much of the window; so much of it may lie
between returns."""


def lines_of(points: Floats, strong: float) -> tuple[float, float]:
    """Return the share of the variance about a line that is at single frequencies, and the period of these.

    A frequency is a line if it is `strong` times as strong as those beside it. Of cycles with fewer than about five
    returns the harmonics lie so close that nothing is beside them: `return_of` sees these.
    """
    n = len(points)
    rest = line_of(points)[2]
    if not rest.any():
        return 0.0, np.nan
    power = (np.abs(np.fft.rfft(rest * np.hanning(n + 1)[:n, None], axis=0)) ** 2).sum(1)
    seen = power[_LOWEST:]
    padded = np.pad(seen, _BESIDE, mode="reflect")
    beside = np.delete(
        np.lib.stride_tricks.sliding_window_view(padded, 2 * _BESIDE + 1),
        np.arange(_BESIDE - _ABOUT, _BESIDE + _ABOUT + 1),
        axis=1,
    )
    usual = np.maximum(np.median(beside, axis=1) / np.log(2), np.finfo(float).eps * power.max())
    around = np.pad(power, 1)
    peaks = ((power >= around[:-2]) & (power >= around[2:]))[_LOWEST:]  # the slope of a slow curve has none
    lines = _LOWEST + np.flatnonzero(peaks & (seen > strong * usual))
    if not len(lines):
        return 0.0, np.nan
    near = np.unique(np.clip(lines[:, None] + np.arange(-_ABOUT, _ABOUT + 1), 0, len(power) - 1))
    return float(power[near].sum() / power.sum()), _period(power, lines, n)


def _period(power: Floats, lines: NDArray[np.int64], n: int) -> float:
    """Return the smallest whole number of steps that all lines come back in, or else the period of the strongest."""
    strong = lines[power[lines] > 0.01 * power[lines].max()]
    for period in range(2, n // (2 * _LOWEST) + 1):
        turns = strong * period / n
        if (np.abs(turns - turns.round()) <= 0.6 * period / n).all():
            return float(period)
    return float(n / lines[power[lines].argmax()])


def return_of(along: Floats, same: float) -> tuple[float, float]:
    """Return the largest autocorrelation of a series after it has left where it was, and the first lag above `same`.

    It has left at the first lag, in a quarter of the series, at which the autocorrelation of either sign is low; the
    later ones are looked at up to three quarters, each for as many pairs as it has. NaN: it never left, as some cycles
    of a few steps do not, or does not return.
    """
    n, centred = len(along), along - along.mean()
    if not centred.any():
        return np.nan, np.nan
    centred = centred / np.abs(centred).max()
    products = np.fft.irfft(np.abs(np.fft.rfft(centred, 2 * n)) ** 2, 2 * n)[:n]
    alike = products[: int(_LONGEST * n)] / products[0]
    alike *= n / (n - np.arange(len(alike)))
    low = np.flatnonzero(np.abs(alike[: int(_SOON * n)]) < _LEFT)
    if not len(low):
        return np.nan, np.nan
    before = alike[: low[0]]
    away = np.flatnonzero(before < (same + _LEFT) / 2)
    if len(away) and before[away[0] :].max() > same:  # it swings: a short cycle, or noise that changes sign
        return np.nan, np.nan
    again = alike[low[0] :]
    returns = np.flatnonzero(again > same)
    if not len(returns):
        return float(again.max()), np.nan
    first = int(returns[0])
    near = again[first : first + max(1, (low[0] + first) // 2)]  # before the second return
    return float(again.max()), float(low[0] + first + near.argmax())
