"""What is rounding and what is not, and numbers so large or small that their squares are not numbers any more."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["UNKNOWN", "Precision", "of_moves", "of_size", "of_steps", "of_zero", "scale_of"]

_UNITS = 4.0
"""Differences below so many units in the last place are rounding, not training."""
_ORDINARY = 1e100
_WHOLE = 1e-3
"""How far from a whole number a multiple may be by rounding."""
_FEW, _RECURS = 8, 3
"""Fewer gaps than that tell of steps only between values that recur so often: one outlier makes a gap as well."""
_NEARLY_ALL = 0.95
"""Of the gaps: so many must be multiples of the smallest, since an outlier's need not."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Precision:
    """What is known of how values were computed."""

    dtype: np.dtype[np.floating] | None = None
    """That of the states from which they were computed; None if it is not known."""
    start: float = 0.0
    """Their size before training, 0 if it is not known; of a series that begins with a jump, that of what comes next.

    A loss near 0 is a sum of squares of residuals, and a residual is a difference of numbers y, so it is rounded like
    them: ‖δr‖ = ε‖y‖, and the loss ‖r‖² like ε‖y‖√L, which is much more than εL. Before training the outputs say
    nothing, so that the loss is about ‖y‖².
    """


UNKNOWN = Precision()


def of_moves(values: Floats, precision: Precision = UNKNOWN) -> Floats:
    """Return below what the difference of each two successive values, along the last axis, is rounding.

    Values that are all float32 were computed as such. Of float32 states float64 losses know no more than float32 ones.
    A value below that at the start is rounded like the geometric mean of the two.
    """
    sizes = np.abs(values)
    largest = np.maximum(sizes[..., 1:], sizes[..., :-1])
    start = precision.start if np.isfinite(precision.start) else 0.0
    return of_size(np.sqrt(largest) * np.sqrt(np.maximum(largest, start)), _coarser(values, precision))


def of_zero(values: Floats, precision: Precision = UNKNOWN) -> float:
    """Return below what a loss is 0: the square of what its residuals are rounded by."""
    start = precision.start if np.isfinite(precision.start) else 0.0
    return (_UNITS * float(np.finfo(_coarser(values, precision)).eps)) ** 2 * start


def of_size(sizes: Floats, dtype: np.dtype[np.floating]) -> Floats:
    """Return below what a difference of numbers so large is rounding."""
    return np.asarray(_UNITS * float(np.finfo(dtype).eps) * sizes)


def scale_of(values: Floats) -> float:
    """Return what to divide by so that squares neither overflow nor vanish; 1 for all ordinary numbers."""
    largest = float(np.abs(values).max(initial=0.0))
    return largest if largest > _ORDINARY or 0 < largest < 1 / _ORDINARY else 1.0


def of_steps(values: Floats) -> float:
    """Return what all differences are multiples of: 1/N for an accuracy of N images, 0 for other values.

    >>> of_steps(np.array([3, 5, 4, 4, 3, 5, 4, 3, 5]) / 8)
    0.125
    >>> of_steps(np.array([0.6, 0.6, 0.6, 0.6, 2000.0, 0.6]))
    0.0
    """
    there, often = np.unique(values, return_counts=True)
    if len(there) <= _FEW:
        there = there[often >= _RECURS]
    gaps, rounding = np.diff(there), of_moves(there, Precision(np.dtype(np.float32)))
    apart = gaps[gaps > rounding]
    if not len(apart):
        return 0.0
    step = float(apart.min())
    multiples, blurred = apart / step, rounding[gaps > rounding] / step
    telling = blurred < 0.1  # of numbers so large that steps are lost, a gap says nothing
    off = np.abs(multiples - multiples.round()) <= np.maximum(_WHOLE, blurred)
    return step if telling.any() and off[telling].mean() >= _NEARLY_ALL else 0.0


def _coarser(values: Floats, precision: Precision) -> np.dtype[np.floating]:
    """Return the precision of the states or of the values, whichever is less."""
    known = _dtype(values)
    dtype = precision.dtype
    return dtype if dtype is not None and np.finfo(dtype).eps > np.finfo(known).eps else known


def _dtype(values: Floats) -> np.dtype[np.floating]:
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    whole = bool((values == np.round(values)).all())  # counts, and metrics of few values, say nothing
    return np.dtype(np.float32 if not whole and bool((single == values).all()) else np.float64)
