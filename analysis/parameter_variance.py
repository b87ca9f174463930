"""Variance of the parameters themselves over the last stored iterates, as statistics that stream.

The variance of each parameter along the window, averaged over parameters, or over each layer's with `PerLayer`. What
the two are called is what `analysis.variance` calls them for metrics: `level` is raw, `tail` is about a line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trajstore.errors import StatisticError
from trajstore.reading.iterates import Slab
from trajstore.reading.streaming import Block, Need

__all__ = ["ParameterLevelVariance", "ParameterTailVariance"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Of some iterates: how many, and over parameters the mean and the sum of squares about it."""

    count: int
    mean: Floats
    squares: Floats


@dataclass(frozen=True)
class ParameterLevelVariance:
    """Sample variance of each parameter over the last `window` stored iterates, averaged over parameters."""

    window: int = 100
    name = "parameter_level_variance"
    dims = ()

    @property
    def attrs(self) -> Mapping[str, Any]:
        """What the result says of itself."""
        return {"description": "sample variance along the window, averaged over parameters", "window": self.window}

    def need(self, slab: Slab) -> Need:
        """The window."""
        return _window(slab, self.window, 2)

    def block(self, block: Block) -> Moments:
        """Take mean and squares about it."""
        mean = block.values.mean(axis=0)
        rest = np.subtract(block.values, mean, out=block.scratch)
        return Moments(len(block.steps), mean, _squares(rest))

    def merge(self, earlier: Moments, later: Moments) -> Moments:
        """Add the squares between the two means to those about each: nothing cancels."""
        count, gap = earlier.count + later.count, later.mean - earlier.mean
        between = gap**2 * (earlier.count * later.count / count)
        return Moments(count, earlier.mean + gap * (later.count / count), earlier.squares + later.squares + between)

    def close(self, part: Moments) -> Floats:
        """Add up the variances."""
        return np.asarray((part.squares / (part.count - 1)).sum())

    def finish(self, total: Floats, parameters: int) -> Floats:
        """Average them."""
        return np.asarray(total / parameters)


@dataclass(frozen=True)
class Line:
    """Of some iterates: the least-squares line of each parameter along steps, and what is left about it."""

    count: int
    time: float
    """Mean step."""
    spread: float
    """Sum of squares of steps about it."""
    mean: Floats
    slope: Floats
    squares: Floats
    """Sum of squares about the line."""


@dataclass(frozen=True)
class ParameterTailVariance:
    """Residual variance of each parameter about a line along the last `window` stored iterates, averaged.

    The sum of squares is divided by the number of iterates less two, for the line's two coefficients.
    """

    window: int = 100
    name = "parameter_tail_variance"
    dims = ()

    @property
    def attrs(self) -> Mapping[str, Any]:
        """What the result says of itself."""
        what = "residual variance about a line along the window, averaged over parameters"
        return {"description": what, "window": self.window}

    def need(self, slab: Slab) -> Need:
        """The window."""
        return _window(slab, self.window, 3)

    def block(self, block: Block) -> Line:
        """Fit a line."""
        time = float(block.steps.mean())
        steps = block.steps - time
        spread, mean = float(steps @ steps), block.values.mean(axis=0)
        slope = np.einsum("s,sp->p", steps, block.values) / spread if spread else np.zeros_like(mean)
        line = np.multiply(steps[:, None], slope, out=block.scratch)
        line += mean
        return Line(len(steps), time, spread, mean, slope, _squares(np.subtract(block.values, line, out=line)))

    def merge(self, earlier: Line, later: Line) -> Line:
        """Fit the line of both; what is left about it is a sum of squares, so nothing cancels."""
        count = earlier.count + later.count
        weight, gap, lag = earlier.count * later.count / count, later.mean - earlier.mean, later.time - earlier.time
        spread = earlier.spread + later.spread + weight * lag**2
        slope = (earlier.spread * earlier.slope + later.spread * later.slope + weight * lag * gap) / spread
        squares = earlier.squares + later.squares + weight * (gap - lag * slope) ** 2
        for one in (earlier, later):
            squares += one.spread * (one.slope - slope) ** 2
        share = later.count / count
        return Line(count, earlier.time + lag * share, spread, earlier.mean + gap * share, slope, squares)

    def close(self, part: Line) -> Floats:
        """Add up the variances."""
        return np.asarray((part.squares / (part.count - 2)).sum())

    def finish(self, total: Floats, parameters: int) -> Floats:
        """Average them."""
        return np.asarray(total / parameters)


def _squares(rest: Floats) -> Floats:
    return np.asarray(np.einsum("sp,sp->p", rest, rest))


def _window(slab: Slab, window: int, least: int) -> Need:
    """Return the last iterates, and refuse a slab that does not have them all."""
    if window < least:
        raise StatisticError(f"window is {window}; this variance needs at least {least} iterates")
    if len(slab.grid) < window:
        raise StatisticError(f"{slab.where}: {len(slab.grid)} iterates are stored, fewer than the window of {window}")
    tail = slab.grid[-window:]
    missing = np.setdiff1d(tail, slab.steps)
    if len(missing):
        raise StatisticError(
            f"{slab.where}: no iterate of step {missing[0]} is stored; "
            "finish the recording, or select the orders and seeds that are complete"
        )
    stored = len(slab.steps)
    return Need(range(stored - window, stored))
