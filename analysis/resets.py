"""What a reset does: at every step where an order begins a new leg, the level of a metric before and after.

A level is the mean over the last half of a leg, with an interval that allows for autocorrelation, or the limit of a
leg that settles to a point. What the leg before was doing anyway is no effect of the reset: the level after has to
differ from the level before, and from where a straight line through the last half of that leg would have come to.
`forward` of the same seed is looked at over the steps of the new leg: how much of it lies between the two levels, and
how often it crosses them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from trajstore.analysis.convergence import judge
from trajstore.analysis.longrun import ENOUGH, effective_size, line_of, quantile, standard_error
from trajstore.analysis.rounding import Precision
from trajstore.analysis.spaces import path_of
from trajstore.analysis.windows import SLABS, measured_steps, precision_of, with_slabs

from trajstore.errors import StatisticError

__all__ = ["Reset", "resets"]

Floats = NDArray[np.float64]
_LEAST = 16
"""Recorded steps of a leg that a level needs."""
_REACH = quantile(0.95)
_BAND, _EXCURSION = 3.0, 0.05
"""Settled is what stays within so many standard deviations of the level, or within this share of the way to it."""


@dataclass(frozen=True)
class Reset:
    """One change of legs."""

    order: str
    seed: int
    step: int
    """Where the new leg starts: the last iterate of the old one."""
    before: float
    before_low: float
    before_high: float
    after: float
    after_low: float
    after_high: float
    difference: float
    """The level after less the level before."""
    difference_low: float
    difference_high: float
    settles: str
    """``elsewhere``, if the interval of the difference does not hold 0 and the trend before the reset does not explain
    it; ``not told apart``; ``diverged``; or ``too short``, if a leg neither settles to a point nor is worth enough
    independent values for a level."""
    settled_after: float
    """Steps from the reset until it stays at the new level; NaN if it does not within the first three quarters."""
    forward_between: float
    """Share of the forward iterates during the new leg that lie between the levels; NaN where there is no forward."""
    forward_crosses_before: float
    """How often forward crosses the level before, in 100 recorded steps."""
    forward_crosses_after: float


def resets(ds: xr.Dataset, metric: str) -> xr.Dataset:
    """Return what each reset does to a metric, along the dimension ``reset``; intervals are of 95%."""
    steps, values, known = measured_steps(ds, metric)
    legs = with_slabs(ds["leg"].isel(step=steps)).values
    labels = ds["step"].values[steps]
    orders, seeds = (np.atleast_1d(ds[dim].values) for dim in SLABS)
    found, precision = [], precision_of(ds, metric)
    for i, order in enumerate(map(str, orders)):
        for k, seed in enumerate(seeds.tolist()):
            there = (legs[i, k] >= 0) & known[i, k]
            forward = values[list(orders).index("forward"), k] if "forward" in orders and order != "forward" else None
            for first, begin, end in _changes(np.where(there, legs[i, k], -1)):
                start = int(legs[i, k, begin])
                found.append(_reset(order, seed, labels, values[i, k], (first, begin, end), start, forward, precision))
    if found and all(reset.settles == "too short" and np.isnan([reset.before, reset.after]).any() for reset in found):
        raise StatisticError(
            f"{metric}: a level needs a leg of {2 * _LEAST} recorded steps, and none before or after a "
            "reset is so long; record more steps of each leg"
        )
    if not found:
        raise StatisticError(
            f"{metric}: no order of {', '.join(map(str, orders))} begins a new leg at a recorded step; "
            "record one that does, as in 'backward+backward@1000' or 'backward/100'"
        )
    columns = {f.name: ("reset", np.array([getattr(r, f.name) for r in found])) for f in fields(Reset)}
    return xr.Dataset(columns, attrs={"metric": metric, "level": 0.95})


def _changes(legs: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Return (first place of a leg, first place of the next one, first place after that) for each change of legs."""
    there = np.flatnonzero(legs >= 0)
    if not len(there):
        return []
    starts = [int(there[0]), *(there[1:][np.diff(legs[there]) > 0].tolist()), int(there[-1]) + 1]
    return list(zip(starts, starts[1:], starts[2:], strict=False))


def _reset(
    order: str,
    seed: int,
    labels: NDArray[np.int64],
    values: Floats,
    places: tuple[int, int, int],
    start: int,
    forward: Floats | None,
    precision: Precision,
) -> Reset:
    first, begin, end = places
    before, after = _level(values[first:begin], precision), _level(values[begin:end], precision)
    difference = after.value - before.value, float(np.hypot(before.reach, after.reach))
    low, high = sorted((before.value, after.value))
    between = crosses_before = crosses_after = np.nan
    during = np.array([]) if forward is None else forward[begin:end][np.isfinite(forward[begin:end])]
    if len(during) > 1 and np.isfinite(difference[0]):
        between = float(((during >= low) & (during <= high)).mean())
        crosses_before, crosses_after = (_crossings(during, at.value) for at in (before, after))
    return Reset(
        order, seed, start,
        *_interval(before.value, before.reach), *_interval(after.value, after.reach), *_interval(*difference),
        settles=_settles(values[first:end], difference, _beyond_trend(before, after, difference[0])),
        settled_after=_settled(labels[begin:end] - start, values[begin:end], after.value),
        forward_between=between, forward_crosses_before=crosses_before, forward_crosses_after=crosses_after,
    )  # fmt: skip


class _Level(NamedTuple):
    """Where a leg ends up; NaN where that is not known."""

    value: float
    reach: float
    """How far off it may be."""
    steps: int
    """Recorded steps of the leg."""
    slope: float = 0.0
    """By how much it changes in a recorded step."""
    slope_reach: float = 0.0


def _beyond_trend(before: _Level, after: _Level, difference: float) -> bool:
    """Tell whether a difference is more than the leg before would have come to, had it gone on along its line."""
    between = before.steps / 4 + 3 * after.steps / 4  # from the middle of one last half to that of the other
    beyond = difference - before.slope * between
    reach = float(np.linalg.norm([before.reach, after.reach, before.slope_reach * between]))
    return bool(np.sign(beyond) == np.sign(difference) and abs(beyond) > reach)


def _settles(legs: Floats, difference: tuple[float, float], beyond_trend: bool) -> str:
    if not np.isfinite(legs).all():
        return "diverged"
    if not np.isfinite(difference).all():
        return "too short"
    return "elsewhere" if abs(difference[0]) > difference[1] and beyond_trend else "not told apart"


def _level(leg: Floats, precision: Precision) -> _Level:
    """Return the level of a leg.

    The mean of its last half, if that is worth enough independent values for an interval; where it settles to a point,
    its last value, and all that it still moved in the last quarter. NaN where it is neither.
    """
    half = leg[len(leg) // 2 :]
    if len(half) < _LEAST or not np.isfinite(half).all():
        return _Level(np.nan, np.nan, len(leg))
    if effective_size(half) >= ENOUGH:
        off = half - half.mean()
        slope, error, _ = line_of(half[:, None])
        return _Level(
            float(half.mean()), _REACH * float(standard_error(off)), len(leg), float(slope[0]), _REACH * float(error[0])
        )
    path = path_of(np.arange(len(half)), half, precision)
    if judge(path).verdict == "point":
        tail = half[-max(2, len(leg) // 4) :]
        reach = max(float(np.abs(tail - half[-1]).max()), float(path.rounding.max()))
        return _Level(float(half[-1]), reach, len(leg))
    return _Level(float(half.mean()), np.nan, len(leg))


def _interval(value: float, reach: float) -> tuple[float, float, float]:
    return value, value - reach, value + reach


def _settled(since: NDArray[np.int64], leg: Floats, level: float) -> float:
    if not np.isfinite(level):
        return np.nan
    away = np.abs(leg - level)
    band = max(_BAND * float(leg[len(leg) // 2 :].std()), _EXCURSION * float(away.max()))
    outside = np.flatnonzero(away > band)
    settled = int(outside[-1]) + 1 if len(outside) else 0
    return float(since[settled]) if settled <= 3 * len(leg) // 4 else np.nan


def _crossings(values: Floats, level: float) -> float:
    above = values > level
    return 100 * float((above[1:] != above[:-1]).sum()) / (len(values) - 1)
