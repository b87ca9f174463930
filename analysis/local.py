"""How many times one order varies more than another in a typical block: a ratio for curves that have not settled.

`variance_ratio` is the ratio of two variances of stationary processes. A learning curve is often none: it descends,
and a few bursts make most of its variance, so that there is no interval. Here the window is cut into blocks, the
variance of each is taken about its own line, and the ratio is the geometric mean of those of the blocks: that of a
typical block. Bursts weigh as much as other blocks, a slow descent nothing, and the interval holds for heavy tails.

Blocks that depend on each other, as where bursts outlast them, look like independent ones if there are few. So the
interval is that of a mixture of waves, short and long, weak and strong, each as likely as the blocks make it.

Of an order that rests no more is known than that it varies by less than rounding, and of a ratio to it only a bound.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from trajstore.analysis.mixtures import Fits, fits_of, interval_of
from trajstore.analysis.rounding import Precision, of_moves, of_steps, scale_of
from trajstore.analysis.variance import CONTRIBUTIONS, Kind, check_kind, pairs_of
from trajstore.analysis.windows import window_of

__all__ = ["Bound", "local_variance_ratio"]

Floats = NDArray[np.float64]
Bound = Literal["", "lower", "upper"]
_SHORTEST, _MOST = 8, 32
"""Recorded steps of a block, and blocks."""
_FEWEST = 24
"""Blocks: fewer have no interval."""
_KNOWN = 12
"""Blocks that do not rest, of which a bound can be the mean."""
_WAVES = tuple(product((1, 4, 16, 64, 256), (0.3, 1, 3, 10, 30, 100)))
"""Of blocks that depend on each other: in how many that falls to 1/e, and the variance of the waves over that of what
is independent. They reach far beyond the window, as bursts may."""
_TRENDS = (3, 30, 300)
"""The variance of a line over that of what is independent about it: an order that settles at a steady rate."""
_INDEPENDENT, _FEW_INDEPENDENT = 0.7, 0.5
"""How likely it is beforehand that blocks do not, of `_MOST` or more, and of fewer, which tell less. Less makes
intervals wider where they do not, more too short where weak waves hide; `docs/analysis.md` has how often they hold."""


class _Found(NamedTuple):
    """A ratio with its interval, which is open to the side that is not known."""

    ratio: float
    low: float
    high: float
    bound: Bound
    why: str


def local_variance_ratio(
    ds: xr.Dataset,
    metric: str,
    window: int | None = None,
    kind: Kind = "tail",
    level: float = 0.95,
    orders: tuple[str, str] = ("forward", "backward"),
) -> xr.Dataset:
    """Return how many times the first order varies more than the second in a typical block, for each seed.

    `metric` is a recorded metric, `window` how many recorded steps at the end are looked at: at least 192, by default
    the last half. They are cut into about 32 blocks of 8 steps or more. `kind` is what variance means in a block:
    ``tail`` about a line, ``level`` about the mean, ``step`` of successive differences. `level` is that of the
    interval, and `orders` are the two that are compared.

    ``low`` and ``high`` are the interval of the geometric mean over blocks, wider where bursts last so long that blocks
    depend on each other; ``why`` says why there is none. A block in which an order varies by no more than rounding, or
    than a metric of few values is known (1/12N² for an accuracy of N images), bounds the ratio from one side, and
    ``bound`` says from which: ``lower``, where the second order rests, and then ``ratio`` and ``low`` are what it is at
    least and ``high`` is infinite; ``upper``, where the first does, and then ``low`` is 0. Blocks in which both
    rest say nothing and are left out.
    """
    check_kind(kind)
    seen = window_of(ds, metric, window, least=_FEWEST * _SHORTEST)
    found = [_ratio(above, below, kind, level, orders, seen.precision) for above, below in pairs_of(seen, orders)]
    columns = zip(_Found._fields, zip(*found, strict=True), strict=True)
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
    above: Floats, below: Floats, kind: Kind, level: float, orders: tuple[str, str], precision: Precision
) -> _Found:
    if not (np.isfinite(above).all() and np.isfinite(below).all()):
        return _none("diverged")
    lost = of_steps(np.append(above, below)) / np.sqrt(12)
    one, two = (_log_variances(values, kind) for values in (above, below))
    little, less = _least(above, below, precision, lost)
    over, under = one <= little, two <= less
    told, blocks = ~(over & under), len(one)
    if not told.any():
        return _none("neither varies, but by rounding")
    if told.sum() < _FEWEST:
        few = f"{told.sum()} of {blocks} blocks vary by more than rounding, and an interval takes {_FEWEST}"
        return _none(few)
    if (over & ~under).any() and (under & ~over).any():
        each = " and ".join(f"{order} in {rest.sum()}" for order, rest in zip(orders, (over, under), strict=True))
        return _none(f"of {blocks} blocks, {each} vary by no more than rounding: that bounds no ratio from either side")
    logs = (np.maximum(one, little) - np.maximum(two, less))[told]
    resting = (over | under)[told]
    if not resting.any():
        return _found(_interval(logs, level))
    if under.any():
        return _found(_least_of(logs, resting, level), "lower", _rests(orders[1], under, blocks))
    least, low, high = _least_of(-logs, resting, level)
    return _found((-least, -high, -low), "upper", _rests(orders[0], over, blocks))


def _none(why: str) -> _Found:
    return _Found(np.nan, np.nan, np.nan, "", why)


def _rests(order: str, where: NDArray[np.bool_], blocks: int) -> str:
    return f"{order} varies by no more than rounding in {where.sum()} of {blocks} blocks"


def _found(logarithms: tuple[float, float, float], bound: Bound = "", why: str = "") -> _Found:
    with np.errstate(over="ignore"):
        ratio, low, high = (float(np.exp(value)) for value in logarithms)
    return _Found(ratio, low, high, bound, why)


def _least_of(logs: Floats, resting: NDArray[np.bool_], level: float) -> tuple[float, float, float]:
    """Return what a mean is at the least, with an interval that is open above; of those resting only bounds are known.

    Where some blocks rest and some do not, how far off rounding lies need not be in the interval: if no bound is less
    than the mean of those that do not, that mean is another bound, and the one that tells more is taken.
    """
    found, known = [_interval(logs, level)], logs[~resting]
    if len(known) >= _KNOWN and logs[resting].min() >= known.mean():
        found.append(_interval(known, level))
    mean, low, _ = max(found, key=lambda one: one[1])
    return mean, low, np.inf


def _interval(logs: Floats, level: float) -> tuple[float, float, float]:
    """Return the mean of what may depend on each other, and its interval."""
    plain = _INDEPENDENT if len(logs) >= _MOST else _FEW_INDEPENDENT
    _, low, high = interval_of(logs, _waves(len(logs)), plain, level)
    mean = float(logs.mean())
    return mean, min(low, mean), max(high, mean)


@cache
def _waves(blocks: int) -> Fits:
    """Return the fits of a mean of so many blocks, that are independent, on waves of some kind, or about a line."""
    places = np.arange(blocks, dtype=np.float64)
    apart, alone = np.abs(places[:, None] - places), np.eye(blocks)
    line = (places - places.mean()) / places.std()
    waves = (alone + strength * np.exp(-apart / long) for long, strength in _WAVES)
    trends = (alone + steep * np.outer(line, line) for steep in _TRENDS)
    return fits_of((alone, *waves, *trends), np.ones((blocks, 1)), 0)


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


def _least(above: Floats, below: Floats, precision: Precision, lost: float) -> tuple[Floats, Floats]:
    """Return the logarithm of what each block of two orders varies by at the least, `lost` of a metric of few values.

    Each has that of its own values, so that one value far off blurs its own block and no other. Nothing is known of how
    0 is rounded: it counts as the values of the other order are.
    """
    one, other = (np.maximum(of_moves(_in_blocks(v), precision).max(-1), lost) for v in (above, below))
    one, other = np.where(one > 0, one, other), np.where(other > 0, other, one)
    little, less = (2 * np.log(np.maximum(rounding, np.finfo(float).tiny)) for rounding in (one, other))
    return little, less
