"""What is rounding and what is not, and numbers so large or small that their squares are not numbers any more."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["of_moves", "of_size", "scale_of"]

_UNITS = 4.0
"""Differences below so many units in the last place are rounding, not training."""
_ORDINARY = 1e100

Floats = NDArray[np.float64]


def of_moves(values: Floats, dtype: np.dtype[np.floating] | None = None) -> Floats:
    """Return below what the difference of each two successive values is rounding.

    Values that are all float32 were computed as such, unless another `dtype` is given.
    """
    sizes = np.abs(values)
    return of_size(np.maximum(sizes[1:], sizes[:-1]), _dtype(values) if dtype is None else dtype)


def of_size(sizes: Floats, dtype: np.dtype[np.floating]) -> Floats:
    """Return below what a difference of numbers so large is rounding."""
    return np.asarray(_UNITS * float(np.finfo(dtype).eps) * sizes)


def scale_of(values: Floats) -> float:
    """Return what to divide by so that squares neither overflow nor vanish; 1 for all ordinary numbers."""
    largest = float(np.abs(values).max(initial=0.0))
    return largest if largest > _ORDINARY or 0 < largest < 1 / _ORDINARY else 1.0


def _dtype(values: Floats) -> np.dtype[np.floating]:
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    whole = bool((values == np.round(values)).all())  # counts, and metrics of few values, say nothing
    return np.dtype(np.float32 if not whole and bool((single == values).all()) else np.float64)
