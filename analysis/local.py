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
from trajstore.analysis.longrun import TERMS, effective_size, line_of, quantile, standard_error
from trajstore.analysis.rounding import Precision, of_moves, of_steps, scale_of
from trajstore.analysis.variance import CONTRIBUTIONS, Kind, check_kind, pairs_of
from trajstore.analysis.windows import window_of

__all__ = ["local_variance_ratio"]

Floats = NDArray[np.float64]
_SHORTEST, _MOST = 8, 32
"""Recorded steps of a block, and blocks."""
_FEWEST = 24
"""Blocks: with fewer, the interval holds less often than it says."""
_TERMS = ((0.7, TERMS), (0.35, 4), (0.0, 2))
"""Of so many blocks that are worth this share of independent ones, so many cosines: the fewer, the longer the waves."""
_NOTHING = 1e-9


def local_variance_ratio(
    ds: xr.Dataset,
    metric: str,
    window: int | None = None,
    kind: Kind = "tail",
    level: float = 0.95,
    orders: tuple[str, str] = ("forward", "backward"),
) -> xr.Dataset:
    """Return how many times the first order varies more than the second in a typical block, for each seed.

    The window is cut into about 32 blocks of 8 recorded steps or more. ``low`` and ``high`` are the interval of the
    geometric mean over blocks, wider where bursts last so long that blocks depend on each other; ``why`` says why there
    is none. A variance below that of rounding counts as that of rounding, and that of a metric of few values, such as
    an accuracy of N images, at least as 1/12N²: so the ratio to what has come to rest is a lower bound.
    """
    check_kind(kind)
    seen = window_of(ds, metric, window, least=_FEWEST * _SHORTEST)
    found = [_ratio(above, below, kind, level, seen.precision) for above, below in pairs_of(seen, orders)]
    columns = zip(("ratio", "low", "high", "why"), zip(*found, strict=True), strict=True)
    return xr.Dataset(
        {name: ("seed", np.array(column)) for name, column in columns},
        {"seed": seen.coords["seed"]},
        {**seen.attrs, "kind": kind, "level": level, "orders": ", ".join(orders), "blocks": _blocks(len(seen))[0]},
    )


def _blocks(steps: int) -> tuple[int, int]:
    """Return how many blocks there are, and how long they are."""
    long = max(_SHORTEST, steps // _MOST)
    return steps // long, long


def _ratio(
    above: Floats, below: Floats, kind: Kind, level: float, precision: Precision
) -> tuple[float, float, float, str]:
    if not (np.isfinite(above).all() and np.isfinite(below).all()):
        return np.nan, np.nan, np.nan, "diverged"
    lost = of_steps(np.append(above, below)) / np.sqrt(12)
    one, two = (_log_variances(values, kind) for values in (above, below))
    little, less = (_least(values, precision, lost) for values in (above, below))
    still = (one <= little) & (two <= less)
    if still.all():
        return np.nan, np.nan, np.nan, "neither varies, but by rounding"
    logs = np.where(still, 0.0, np.maximum(one, little) - np.maximum(two, less))
    mean, terms = float(logs.mean()), _terms(logs)
    reach = quantile(level, terms) * float(standard_error(logs - mean, terms))
    return float(np.exp(mean)), float(np.exp(mean - reach)), float(np.exp(mean + reach)), ""


def _terms(logs: Floats) -> int:
    """Return how many cosines an interval is made from: fewer where bursts outlast the blocks.

    A ratio that grows evenly, as that to an order which settles at a steady rate, is no burst.
    """
    rest = line_of(logs[:, None])[2][:, 0]
    if np.abs(rest).max() <= _NOTHING * np.abs(logs).max():
        return TERMS
    worth = effective_size(rest) / len(logs)
    return next(terms for least, terms in _TERMS if worth >= least)


def _in_blocks(values: Floats) -> Floats:
    count, long = _blocks(len(values))
    return values[-count * long :].reshape(count, long)


def _log_variances(values: Floats, kind: Kind) -> Floats:
    """Return the logarithm of the variance in each block."""
    blocks = _in_blocks(values)
    scale = np.array([[scale_of(block)] for block in blocks])
    parts, lost = CONTRIBUTIONS[kind](blocks / scale)
    with np.errstate(divide="ignore"):  # of what stands still it is −∞
        return np.asarray(np.log(parts.sum(-1) / (parts.shape[-1] - lost)) + 2 * np.log(scale[:, 0]))


def _least(values: Floats, precision: Precision, lost: float) -> Floats:
    """Return the logarithm of what each block varies by at the least.

    Each has that of its own values, so that one value far off blurs its own block and no other.
    """
    deviations = np.maximum(of_moves(_in_blocks(values), precision).max(-1), lost)
    return np.asarray(2 * np.log(np.maximum(deviations, np.finfo(float).tiny)))
