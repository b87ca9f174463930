"""How many times one order varies more than another in a typical block: a ratio for curves that have not settled.

`variance_ratio` is the ratio of two variances of stationary processes. A learning curve is often none: it descends,
and a few bursts make most of its variance, so that there is no interval. Here the window is cut into blocks, the
variance of each is taken about its own line, and the ratio is the geometric mean of those of the blocks: that of a
typical block. Bursts weigh as much as other blocks, a slow descent nothing, and the interval holds for heavy tails.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from trajstore.analysis.longrun import quantile, standard_error
from trajstore.analysis.rounding import of_moves, scale_of
from trajstore.analysis.variance import CONTRIBUTIONS, Kind, check_kind, pairs_of
from trajstore.analysis.windows import window_of

__all__ = ["local_variance_ratio"]

Floats = NDArray[np.float64]
_SHORTEST, _MOST = 8, 32
"""Recorded steps of a block, and blocks."""
_FEWEST = 24
"""Blocks: with fewer, the interval holds less often than it says."""


def local_variance_ratio(
    ds: xr.Dataset,
    metric: str,
    window: int | None = None,
    kind: Kind = "tail",
    level: float = 0.95,
    orders: tuple[str, str] = ("forward", "backward"),
) -> xr.Dataset:
    """Return how many times the first order varies more than the second in a typical block, for each seed.

    The window is cut into up to 32 blocks of 8 recorded steps or more. ``low`` and ``high`` are the interval of the
    geometric mean over blocks, which allows for blocks that depend on each other; ``why`` says why there is none. A
    variance below that of rounding counts as that of rounding, so that the ratio to what has come to rest is a bound.
    """
    check_kind(kind)
    seen = window_of(ds, metric, window, least=_FEWEST * _SHORTEST)
    found = [_ratio(above, below, kind, level) for above, below in pairs_of(seen, orders)]
    columns = zip(("ratio", "low", "high", "why"), zip(*found, strict=True), strict=True)
    return xr.Dataset(
        {name: ("seed", np.array(column)) for name, column in columns},
        {"seed": seen.coords["seed"]},
        {**seen.attrs, "kind": kind, "level": level, "orders": list(orders), "blocks": _blocks(len(seen))[0]},
    )


def _blocks(steps: int) -> tuple[int, int]:
    """Return how many blocks there are, and how long they are."""
    long = max(_SHORTEST, steps // _MOST)
    return steps // long, long


def _ratio(above: Floats, below: Floats, kind: Kind, level: float) -> tuple[float, float, float, str]:
    if not (np.isfinite(above).all() and np.isfinite(below).all()):
        return np.nan, np.nan, np.nan, "diverged"
    (one, least), (two, other) = (_variances(values, kind) for values in (above, below))
    least = max(least, other)
    if (one <= least).all() and (two <= least).all():
        return np.nan, np.nan, np.nan, "neither varies, but by rounding"
    logs = np.log(np.maximum(one, least)) - np.log(np.maximum(two, least))
    mean, reach = float(logs.mean()), quantile(level) * float(standard_error(logs - logs.mean()))
    return float(np.exp(mean)), float(np.exp(mean - reach)), float(np.exp(mean + reach)), ""


def _variances(values: Floats, kind: Kind) -> tuple[Floats, float]:
    """Return the variance in each block, and below what it is rounding."""
    count, long = _blocks(len(values))
    scale = scale_of(values)
    parts, lost = CONTRIBUTIONS[kind](values[-count * long :].reshape(count, long) / scale)
    found = parts.sum(-1) / (parts.shape[-1] - lost) * scale**2
    return np.asarray(found), float(of_moves(values).max() ** 2)
