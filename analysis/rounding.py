"""What is rounding and what is not, and numbers so large or small that their squares are not numbers any more."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Precision", "of_moves", "of_size", "of_variance", "scale_of"]

_UNITS = 4.0
"""Differences below so many units in the last place are rounding, not training."""
_ORDINARY = 1e100
_WHOLE = 1e-3
"""How far from a whole number a multiple may be by rounding."""

Floats = NDArray[np.float64]
Precision = np.dtype[np.floating] | None
"""That of the states from which values were computed; None if it is not known."""


def of_moves(values: Floats, dtype: Precision = None) -> Floats:
    """Return below what the difference of each two successive values is rounding.

    Values that are all float32 were computed as such. `dtype` is that of the states they were computed from: of float32
    states float64 losses know no more than float32 ones.
    """
    sizes, known = np.abs(values), _dtype(values)
    coarser = dtype if dtype is not None and np.finfo(dtype).eps > np.finfo(known).eps else known
    return of_size(np.maximum(sizes[1:], sizes[:-1]), coarser)


def of_variance(values: Floats, dtype: Precision = None) -> float:
    """Return below what a variance of some of these values is that of rounding, or of a metric of few values."""
    return max(float(of_moves(values, dtype).max()) ** 2, _quantum(values) ** 2 / 12)


def of_size(sizes: Floats, dtype: np.dtype[np.floating]) -> Floats:
    """Return below what a difference of numbers so large is rounding."""
    return np.asarray(_UNITS * float(np.finfo(dtype).eps) * sizes)


def scale_of(values: Floats) -> float:
    """Return what to divide by so that squares neither overflow nor vanish; 1 for all ordinary numbers."""
    largest = float(np.abs(values).max(initial=0.0))
    return largest if largest > _ORDINARY or 0 < largest < 1 / _ORDINARY else 1.0


def _quantum(values: Floats) -> float:
    """Return what all differences are multiples of: 1/N for an accuracy of N images, 0 for other values."""
    there = np.unique(values)
    gaps = np.diff(there)
    apart = gaps[gaps > of_size(np.abs(there).max(), np.dtype(np.float32))]
    if not len(apart):
        return 0.0
    multiples = (there - there[0]) / apart.min()
    return float(apart.min()) if bool((np.abs(multiples - multiples.round()) < _WHOLE).all()) else 0.0


def _dtype(values: Floats) -> np.dtype[np.floating]:
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    whole = bool((values == np.round(values)).all())  # counts, and metrics of few values, say nothing
    return np.dtype(np.float32 if not whole and bool((single == values).all()) else np.float64)
