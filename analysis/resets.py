"""What a reset does: at every step where an order begins a new leg, the level of a metric before and after.

A level is the mean over the last half of a leg, with an interval that allows for autocorrelation, or the limit of a
leg that settles to a point. That two levels differ does not say that the reset is why: training goes on, and a curve
may begin to fall later. So it takes something that tells what would have been without it: the same iterates without the
reset in another order, `forward` of the same seed where it stands still over the same steps, or a leg before that had
all but arrived at a point. Where nothing tells, a difference is `undecided`. Orders share no curve: that forward falls
by another amount, or at another time, says nothing of a reset.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from trajstore.analysis.convergence import RULE, judge
from trajstore.analysis.longrun import ENOUGH, effective_size, line_of, quantile, standard_error
from trajstore.analysis.rounding import Precision
from trajstore.analysis.spaces import path_of
from trajstore.analysis.tables import Table
from trajstore.analysis.windows import (
    SLABS,
    ends_early,
    even_tail,
    evenly,
    measured_steps,
    precision_of,
    uneven,
    usual_metric,
    usual_window,
    with_slabs,
)

from trajstore.engine.orders import Order
from trajstore.errors import OrderError, StatisticError
from trajstore.store import StoredExperiment

__all__ = ["Reset", "resets", "tables"]

Floats = NDArray[np.float64]
Steps = NDArray[np.int64]
_FORWARD = "forward"
_LEAST = 16
"""Recorded steps that a level needs."""
_REACH, _SURE = quantile(0.95), quantile(0.99)
_BAND, _EXCURSION = 3.0, 0.05
"""Settled is what stays within so many standard deviations of the level, or within this share of the way to it."""
_STILL = 0.5
"""Forward stands still if what it may have changed by is at most this share of the difference."""


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
    """``elsewhere``, if the levels differ by more than what would have been without the reset; ``not told apart``;
    ``undecided``, if they differ and nothing tells what would have been; ``diverged``; or ``too short``, if a leg
    neither settles to a point nor is worth enough independent values for a level."""
    why: str
    """What tells what would have been, or what is missing."""
    before_from: int
    """The first step of those of which the level before is; the last is the step of the reset."""
    after_from: int
    after_to: int
    settled_after: float
    """Steps from the reset to the first recorded one from which it stays at the new level, which it reached after the
    recorded one before; NaN if it does not within the first three quarters of the new leg."""
    forward_between: float
    """Share of the forward iterates during the new leg that lie between the levels (where these are not recorded
    evenly: over the steps of the level after); NaN where there is no forward."""
    forward_crosses_before: float
    """How often forward crosses the level before, in 100 recorded steps."""
    forward_crosses_after: float


class _Leg(NamedTuple):
    """The recorded steps of one leg, and the values there; NaN where training diverged."""

    start: int
    """Where it starts: the last iterate of the leg before."""
    steps: Steps
    values: Floats


class _Curve(NamedTuple):
    """A slab: its recorded steps, the values there, and the start of the leg of each."""

    steps: Steps
    values: Floats
    starts: Steps

    def legs(self) -> list[_Leg]:
        """Return its legs in order."""
        cuts = [0, *(np.flatnonzero(np.diff(self.starts) > 0) + 1).tolist(), len(self.steps)]
        return [_Leg(int(self.starts[a]), self.steps[a:b], self.values[a:b]) for a, b in pairwise(cuts) if b > a]

    def between(self, first: int, last: int) -> tuple[Steps, Floats]:
        """Return what is recorded from one step to another."""
        there = (self.steps >= first) & (self.steps <= last)
        return self.steps[there], self.values[there]


class _Level(NamedTuple):
    """Where a curve is over some steps; NaN where that is not known."""

    value: float
    reach: float
    """How far off it may be, at 95%."""
    sure: float
    """The same at 99%."""
    steps: Steps
    slope: float = 0.0
    """By how much it changes in a step."""
    slope_reach: float = 0.0
    arrives: bool = False
    """Whether it shrinks to a point so fast that nothing more is to come."""

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return bool(np.isfinite([self.value, self.reach]).all())


def resets(ds: xr.Dataset, metric: str, window: int | None = None) -> xr.Dataset:
    """Return what each reset does to a metric, along the dimension ``reset``; intervals are of 95%.

    `window` counts the recorded steps at the end of each leg that a level is of. Without it, it is the last half of the
    leg, or of an adaptive grid the dense tail that it was recorded with.
    """
    if window is not None and window < _LEAST:
        raise StatisticError(f"window is {window}; a level needs at least {_LEAST} steps")
    curves, precision = _curves(ds, metric), precision_of(ds, metric)
    legs = {slab: curve.legs() for slab, curve in curves.items()}
    changing = {slab: mine for slab, mine in legs.items() if len(mine) > 1}
    if not changing:
        orders = ", ".join(map(str, np.atleast_1d(ds["order"].values)))
        raise StatisticError(
            f"{metric}: no order of {orders} begins a new leg at a recorded step; "
            "record one that does, as in 'backward+backward@1000' or 'backward/100'"
        )
    _refuse_uneven(ds, metric, changing, window)
    found = []
    for slab, mine in changing.items():
        windows = [_window(ds, leg, window) for leg in mine]
        for old, new in pairwise(zip(mine, windows, strict=True)):
            others = {order: curve for (order, seed), curve in curves.items() if seed == slab[1] and order != slab[0]}
            found.append(_reset(slab, old, new, others, precision))
    if all(reset.settles == "too short" and np.isnan([reset.before, reset.after]).any() for reset in found):
        raise StatisticError(
            f"{metric}: a level needs a leg of {2 * _LEAST} recorded steps, and none before or after a "
            "reset is so long; record more steps of each leg"
        )
    columns = {f.name: ("reset", np.array([getattr(r, f.name) for r in found])) for f in fields(Reset)}
    return xr.Dataset(columns, attrs={"metric": metric, "level": 0.95})


def _curves(ds: xr.Dataset, metric: str) -> dict[tuple[str, int], _Curve]:
    """Return what is recorded of each (order, seed): its own steps, which on adaptive grids are not those of others."""
    places, values, known = measured_steps(ds, metric)
    labels, starts = ds["step"].values[places], with_slabs(ds["leg"].isel(step=places)).values
    there = known & (starts >= 0)
    orders, seeds = (np.atleast_1d(ds[dim].values).tolist() for dim in SLABS)
    return {
        (str(order), int(seed)): _Curve(*(a[there[i, k]] for a in (labels, values[i, k], starts[i, k])))
        for i, order in enumerate(orders)
        for k, seed in enumerate(seeds)
    }


def _window(ds: xr.Dataset, leg: _Leg, window: int | None) -> slice:
    """Return which of a leg's steps its level is of."""
    count = len(leg.steps) - ends_early(leg.steps)
    even = even_tail(leg.steps[:count])
    asked = usual_window(ds, leg.steps[:count], even) if window is None else window
    return slice(max(0, count - asked), count)


def _refuse_uneven(ds: xr.Dataset, metric: str, slabs: dict[tuple[str, int], list[_Leg]], window: int | None) -> None:
    """Refuse levels over steps that are not evenly spaced, and say over how many they are in all legs."""
    worst, longest = None, None
    for slab, legs in slabs.items():
        for leg in legs:
            used = leg.steps[_window(ds, leg, window)]
            even = even_tail(leg.steps[: len(leg.steps) - ends_early(leg.steps)])
            if len(used) > even and worst is None:
                worst = slab, leg, used
            long = int(leg.steps[-1]) - leg.start >= 2 * _LEAST  # there is no level of a leg that is too short
            longest = even if longest is None and long else min(longest or even, even) if long else longest
    if worst is None:
        return
    (order, seed), leg, used = worst
    remedy = evenly(ds)
    if longest is not None and longest >= _LEAST:
        remedy += f"; the longest even window at the end of every leg is {longest}"
    raise uneven(ds, f"{metric}, order {order!r}, seed {seed}, leg from step {leg.start}", used, remedy)


def _reset(
    slab: tuple[str, int],
    old: tuple[_Leg, slice],
    new: tuple[_Leg, slice],
    others: dict[str, _Curve],
    precision: Precision,
) -> Reset:
    (leg, _), (renewed, window) = old, new
    before, after = (_level_of_leg(*side, precision) for side in (old, new))
    difference = after.value - before.value, float(np.hypot(before.reach, after.reach))
    settles, why = _settles(slab[0], old[0], new[0], before, after, others, precision)
    between = crosses_before = crosses_after = np.nan
    during = _during(others.get(_FORWARD), renewed, after)
    if len(during) > 1 and np.isfinite(difference[0]):
        low, high = sorted((before.value, after.value))
        between = float(((during >= low) & (during <= high)).mean())
        crosses_before, crosses_after = (_crossings(during, at.value) for at in (before, after))
    return Reset(
        *slab, renewed.start,
        *_interval(before.value, before.reach), *_interval(after.value, after.reach), *_interval(*difference),
        settles=settles, why=why, before_from=int(before.steps[0]) if len(before.steps) else leg.start,
        after_from=int(after.steps[0]) if len(after.steps) else renewed.start, after_to=int(renewed.steps[-1]),
        settled_after=_settled(renewed, window, after.value),
        forward_between=between, forward_crosses_before=crosses_before, forward_crosses_after=crosses_after,
    )  # fmt: skip


def _settles(
    order: str, old: _Leg, new: _Leg, before: _Level, after: _Level, others: dict[str, _Curve], precision: Precision
) -> tuple[str, str]:
    """Return what a reset of an order comes to, and what tells so."""
    if not (np.isfinite(old.values).all() and np.isfinite(new.values).all()):
        return "diverged", ""
    if not (before.known and after.known):
        return "too short", "a leg neither settles to a point nor is worth enough independent values for a level"
    difference = after.value - before.value
    if abs(difference) <= np.hypot(before.reach, after.reach):
        return "not told apart", "the interval of the difference contains 0"
    if not _beyond_trend(before, after, difference):
        return "not told apart", "the leg before would have come so far along its line"
    if (twin := _without_reset(order, old, new, others)) is not None:
        name, curve = twin
        unchanged = _level(*curve.between(int(after.steps[0]), int(after.steps[-1])), precision)
        if unchanged.known and np.array_equal(unchanged.steps, after.steps):
            apart = abs(after.value - unchanged.value) > np.hypot(after.sure, unchanged.sure)
            return "elsewhere" if apart else "not told apart", f"{name}, which is the same without the reset"
    return _by_forward(before, after, others.get(_FORWARD), precision)


def _by_forward(before: _Level, after: _Level, forward: _Curve | None, precision: Precision) -> tuple[str, str]:
    """Return what forward over the same steps, and how the leg before ended, tell of a difference."""
    sides = []
    for level in (before, after):
        seen = (
            None if forward is None else _level(*forward.between(int(level.steps[0]), int(level.steps[-1])), precision)
        )
        sides.append(seen if seen is not None and seen.known and np.array_equal(seen.steps, level.steps) else None)
    one, other = sides
    if one is not None and other is not None:
        change, sure = other.value - one.value, float(np.hypot(one.sure, other.sure))
        if abs(change) > sure:
            return "undecided", "forward changes over the same steps as well, and orders need not change alike"
        difference, unsure = abs(after.value - before.value), float(np.linalg.norm([before.sure, after.sure, sure]))
        if sure <= _STILL * difference and difference - abs(change) > unsure:
            return "elsewhere", "forward stands still over the same steps"
    if before.arrives:
        return "elsewhere", "the leg before shrinks to a point"
    if one is not None and other is not None:
        return "undecided", "forward may change as much over the same steps"
    lack = "is not recorded" if forward is None else "has no level over the same steps"
    return "undecided", f"the levels differ, but what would have been without the reset nothing tells: forward {lack}"


def _without_reset(order: str, old: _Leg, new: _Leg, others: dict[str, _Curve]) -> tuple[str, _Curve] | None:
    """Return the order that by definition is the same up to the reset, and goes on with that leg after it.

    That a metric is the same there does not say so: an accuracy may rest at that of guessing in any order.
    """
    try:
        mine = Order.parse(order)
    except OrderError:  # a curve of another name: nothing says what it shares with others
        return None
    for name, curve in others.items():
        after = curve.starts[(curve.steps > new.start) & (curve.steps <= new.steps[-1])]
        if not len(after) or (after != old.start).any():
            continue
        try:
            same = mine.same_until(Order.parse(name), new.start)
        except OrderError:
            continue
        if same >= new.start:
            return name, curve
    return None


def _beyond_trend(before: _Level, after: _Level, difference: float) -> bool:
    """Tell whether a difference is more than the leg before would have come to, had it gone on along its line."""
    between = float(after.steps.mean() - before.steps.mean())
    beyond = difference - before.slope * between
    reach = float(np.linalg.norm([before.reach, after.reach, before.slope_reach * between]))
    return bool(np.sign(beyond) == np.sign(difference) and abs(beyond) > reach)


def _level_of_leg(leg: _Leg, window: slice, precision: Precision) -> _Level:
    """Return the level of a leg. It arrives at a point also where it has long been there."""
    level = _level(leg.steps[window], leg.values[window], precision)
    if level.arrives or not level.known or even_tail(leg.steps) < len(leg.steps):
        return level
    return level._replace(arrives=judge(path_of(leg.steps, leg.values, precision)).shrinks_low >= RULE.settled)


def _level(steps: Steps, values: Floats, precision: Precision) -> _Level:
    """Return the level of a curve over some steps.

    The mean, if they are worth enough independent values for an interval; where it settles to a point, the last value,
    and all that it still moved in the last half of them. NaN where it is neither.
    """
    if len(values) < _LEAST or not np.isfinite(values).all():
        return _Level(np.nan, np.nan, np.nan, steps)
    mean = float(values.mean())
    if effective_size(values) >= ENOUGH:
        error, gap = float(standard_error(values - mean)), int(steps[1] - steps[0])
        slope, off, _ = line_of(values[:, None])
        return _Level(mean, _REACH * error, _SURE * error, steps, float(slope[0]) / gap, _REACH * float(off[0]) / gap)
    path = path_of(np.arange(len(values)), values, precision)
    judged = judge(path)
    if judged.verdict == "point":
        rest = values[len(values) // 2 :]
        reach = max(float(np.abs(rest - values[-1]).max()), float(path.rounding.max()))
        return _Level(float(values[-1]), reach, reach, steps, arrives=judged.shrinks_low >= RULE.settled)
    return _Level(mean, np.nan, np.nan, steps)


def _during(forward: _Curve | None, leg: _Leg, after: _Level) -> Floats:
    """Return forward over the steps of a new leg, or over those of its level where it is not recorded evenly."""
    if forward is None:
        return np.array([])
    steps, values = forward.between(leg.start + 1, int(leg.steps[-1]))
    if even_tail(steps) < len(steps) - ends_early(steps) and len(after.steps):
        steps, values = forward.between(int(after.steps[0]), int(after.steps[-1]))
        if even_tail(steps) < len(steps):
            return np.array([])
    return values[np.isfinite(values)]


def _interval(value: float, reach: float) -> tuple[float, float, float]:
    return value, value - reach, value + reach


def _settled(leg: _Leg, window: slice, level: float) -> float:
    if not np.isfinite(level):
        return np.nan
    away = np.abs(leg.values - level)
    band = max(_BAND * float(leg.values[window].std()), _EXCURSION * float(away.max()))
    outside = np.flatnonzero(away > band)
    settled = int(outside[-1]) + 1 if len(outside) else 0
    if settled == len(leg.steps):
        return np.nan
    after = float(leg.steps[settled] - leg.start)
    return after if after <= 0.75 * float(leg.steps[-1] - leg.start) else np.nan


def _crossings(values: Floats, level: float) -> float:
    above = values > level
    return 100 * float((above[1:] != above[:-1]).sum()) / (len(values) - 1)


def tables(stored: StoredExperiment, metric: str | None = None, window: int | None = None) -> list[Table]:
    """Return what `trajstore analyze` shows."""
    ds = stored.dataset()
    found = resets(ds, metric or usual_metric(ds), window)
    pairs = {name: (f"{name}_low", f"{name}_high") for name in ("before", "after", "difference")}
    shown = (
        "order", "seed", "step", "before", "after", "difference", "settles", "why", "settled_after",
        "forward_between", "forward_crosses_before", "forward_crosses_after",
    )  # fmt: skip
    return [Table(f"resets: {found.attrs['metric']}", found, shown, pairs)]
