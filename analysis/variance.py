"""Variance of a metric over recorded steps, each slab by itself.

Three meanings, which differ by orders of magnitude on the same curve, so each has its name:

``level``  raw: descent and noise together
``tail``   about a line fitted by least squares: what is left once the trend is taken out
``step``   half the variance of successive differences: the part from step to step

Nothing is averaged over seeds. `variance_ratio` says how much less one order varies than another, and how sure that is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import xarray as xr
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from trajstore.analysis.longrun import ENOUGH, effective_size, quantile, standard_error
from trajstore.analysis.rounding import Precision, of_moves, scale_of
from trajstore.analysis.tables import Table, window_told
from trajstore.analysis.windows import SLABS, Window, resets_within, usual_metric, window_of

from trajstore.engine.orders import Order
from trajstore.errors import ConfigurationError, OrderError, StatisticError, choices
from trajstore.store import StoredExperiment

__all__ = [
    "Kind",
    "level_variance",
    "rolling_variance",
    "step_variance",
    "tables",
    "tail_variance",
    "variance",
    "variance_ratio",
]

Floats = NDArray[np.float64]
Kind = Literal["level", "tail", "step"]
_ROLLING_BYTES = 2**20
"""Of windows that are worked on together: they stay in the cache."""
SMOOTH = 10
"""A window worth fewer independent values shows a curve, not a piece of a stationary process."""
UNEVEN = 4
"""Nor does one whose halves differ so much: that is a curve too, or still settling."""


def _level(values: Floats) -> tuple[Floats, int]:
    return (values - values.mean(-1, keepdims=True)) ** 2, 1


def _tail(values: Floats) -> tuple[Floats, int]:
    x = np.arange(values.shape[-1]) - (values.shape[-1] - 1) / 2
    y = values - values.mean(-1, keepdims=True)
    return (y - (y @ x / (x @ x))[..., None] * x) ** 2, 2


def _step(values: Floats) -> tuple[Floats, int]:
    difference = np.diff(values)
    return (difference - difference.mean(-1, keepdims=True)) ** 2 / 2, 1


CONTRIBUTIONS: Mapping[Kind, Callable[[Floats], tuple[Floats, int]]] = {"level": _level, "tail": _tail, "step": _step}
"""Evenly spaced values along the last axis → what each adds to the sum, and the degrees of freedom that are lost."""


def level_variance(ds: xr.Dataset, metric: str, window: int = 100) -> xr.DataArray:
    """Return the sample variance over the last `window` recorded steps."""
    return _of_window(window_of(ds, metric, window), "level")


def tail_variance(ds: xr.Dataset, metric: str, window: int = 100) -> xr.DataArray:
    """Return the residual variance about a linear trend over the last `window` recorded steps.

    The sum of squares is divided by the number of steps less two, for the line's two coefficients.
    """
    return _of_window(window_of(ds, metric, window), "tail")


def step_variance(ds: xr.Dataset, metric: str, window: int = 100) -> xr.DataArray:
    """Return half the sample variance of successive differences over the last `window` recorded steps."""
    return _of_window(window_of(ds, metric, window), "step")


def rolling_variance(ds: xr.Dataset, metric: str, window: int = 100, kind: Kind = "tail") -> xr.DataArray:
    """Return the variance over the `window` recorded steps that end at each step, (order, seed, step)."""
    check_kind(kind)
    whole = window_of(ds, metric, "all", least=window)
    rows = whole.values.reshape(-1, len(whole))
    out = np.full(rows.shape, np.nan)
    at_once = max(1, _ROLLING_BYTES // (8 * window))

    def roll(row: Floats, rolled: Floats) -> None:
        windows = sliding_window_view(row, window)
        for begin in range(0, len(windows), at_once):
            seen = windows[begin : begin + at_once]
            rolled[begin + window - 1 : begin + window - 1 + len(seen)] = _variance(seen, kind)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy lets them run at once
        list(pool.map(roll, rows, out))
    return xr.DataArray(
        out.reshape(whole.values.shape),
        dims=(*SLABS, "step"),
        coords={**whole.coords, "step": whole.steps},
        name=f"rolling_{kind}_variance",
        attrs={**whole.attrs, "window": window},
    )


@dataclass(frozen=True)
class _Estimate:
    """A number with its interval; NaN where there is none, and why."""

    value: float
    low: float
    high: float
    effective: float
    why: str
    settling: bool = False
    """Whether the window is no piece of a stationary process."""


def variance(
    ds: xr.Dataset, metric: str, window: int | None = None, kind: Kind = "tail", level: float = 0.95
) -> xr.Dataset:
    """Return the variance in a window with an interval for that of the stationary process it is a piece of.

    Without a `window` it is the last half of what is recorded. ``effective`` is how many independent values the
    window is worth; below 50, or where the variance changes over the window, there is no interval, and ``why`` says so.
    """
    seen = window_of(ds, metric, window, least=8)
    check_kind(kind)
    slabs = [[_estimate(slab, kind, level, seen.precision) for slab in slabs] for slabs in seen.values]
    table = _table(seen, SLABS, seen.coords, slabs, kind, level)
    return table.assign(resets=(SLABS, resets_within(ds, seen.steps)))


def variance_ratio(
    ds: xr.Dataset,
    metric: str,
    window: int | None = None,
    kind: Kind = "tail",
    level: float = 0.95,
    orders: tuple[str, str] = ("forward", "backward"),
) -> xr.Dataset:
    """Return how many times the first order varies more than the second, for each seed, with an interval.

    The two share their batches, so the interval is made from the series of both together. Where the second has no
    stationary variance to speak of, since it is still settling, its variance in this window is taken as the number
    that it is; ``basis`` then says so, and the interval covers the uncertainty of the first order only.
    """
    seen = window_of(ds, metric, window, least=8)
    check_kind(kind)
    made = [_ratio(pair, kind, level, orders, seen.precision) for pair in pairs_of(seen, orders)]
    table = _table(seen, ("seed",), {"seed": seen.coords["seed"]}, [estimate for estimate, _ in made], kind, level)
    table["basis"] = ("seed", np.array([basis for _, basis in made]))
    return table.assign_attrs(orders=", ".join(orders)).rename(variance="ratio")


def pairs_of(seen: Window, orders: tuple[str, str]) -> list[tuple[Floats, Floats]]:
    """Return the values of two orders, seed by seed."""
    names = [str(name) for name in seen.coords["order"]]
    for order in orders:
        if order not in names:
            raise StatisticError(f"a ratio needs the orders {orders[0]!r} and {orders[1]!r}; {choices(order, names)}")
    same = _same_until(orders, int(seen.steps[-1]))
    if seen.steps[0] <= same > 0:
        raise StatisticError(
            f"{seen.metric}: orders {orders[0]!r} and {orders[1]!r} are the same up to step {same}, and the window of "
            f"{len(seen)} recorded steps begins at step {seen.steps[0]}: it would compare iterates with themselves"
        )
    above, below = (seen.values[names.index(order)] for order in orders)
    return list(zip(above, below, strict=True))


def _same_until(orders: tuple[str, str], last: int) -> int:
    """Return the step up to which two orders are one by definition; a loop calls its orders as it likes."""
    try:
        one, other = map(Order.parse, orders)
    except OrderError:
        return 0
    return one.same_until(other, last) if one != other else 0


def _of_window(seen: Window, kind: Kind) -> xr.DataArray:
    return seen.over_slabs(_variance(seen.values, kind), f"{kind}_variance")


def _variance(values: Floats, kind: Kind) -> Floats:
    with np.errstate(invalid="ignore"):  # what diverged has no variance
        parts, lost = CONTRIBUTIONS[kind](values)
        found = parts.sum(-1) / (parts.shape[-1] - lost)
        # Even the mean of equal numbers may be off by a rounding error, whose square is no variance.
        return np.asarray(np.where(found <= (4 * np.finfo(float).eps * np.abs(values).max(-1)) ** 2, 0.0, found))


def _estimate(values: Floats, kind: Kind, level: float, precision: Precision) -> _Estimate:
    if not np.isfinite(values).all():
        return _Estimate(np.nan, np.nan, np.nan, np.nan, "diverged")
    scale = scale_of(values)
    parts, _ = CONTRIBUTIONS[kind](values / scale)
    found, size = float(_variance(values / scale, kind)) * scale**2, _worth(parts)
    rests = bool((np.abs(np.diff(values)) <= of_moves(values, precision)).all())
    if rests or found == 0:
        return _Estimate(0.0, np.nan, np.nan, size, "does not vary, but by rounding")
    halves = sorted((float(parts[: len(parts) // 2].sum()), float(parts[len(parts) // 2 :].sum())))
    if halves[1] > UNEVEN * halves[0]:
        told = "is still settling: one half of the window holds nearly all of its variance"
        return _Estimate(found, np.nan, np.nan, size, told, settling=True)
    if size < ENOUGH:
        return _Estimate(found, np.nan, np.nan, size, _too_short(size, len(values)), settling=size < SMOOTH)
    return _interval(found, parts / parts.mean(), size, level)


def _worth(parts: Floats) -> float:
    """Return how many independent values contributions are worth, fewer where a few of them are most of the sum.

    Squares of normal deviates have a mean square of three times their squared mean; beyond that, tails are heavy.
    """
    squares = float((parts**2).sum())
    heavy = min(1.0, 3 * float(parts.sum()) ** 2 / (len(parts) * squares)) if squares > 0 else 1.0
    return heavy * effective_size(parts)


def _ratio(
    pair: tuple[Floats, Floats], kind: Kind, level: float, names: tuple[str, str], precision: Precision
) -> tuple[_Estimate, str]:
    """Return the ratio of two variances, and what its interval rests on."""
    (above, below), (one, other) = pair, (_estimate(values, kind, level, precision) for values in pair)
    if one.why == "diverged" or other.why == "diverged":
        return _Estimate(np.nan, np.nan, np.nan, np.nan, "diverged"), "none"
    if other.value == 0:
        ratio = np.inf if one.value else np.nan
        return _Estimate(ratio, np.nan, np.nan, one.effective, f"{names[1]} {other.why}"), "none"
    ratio, parts = one.value / other.value, CONTRIBUTIONS[kind](above / scale_of(above))[0]
    for estimate, order in ((one, names[0]), (other, names[1])):
        if estimate.why and (order == names[0] or not estimate.settling):
            return _Estimate(ratio, np.nan, np.nan, estimate.effective, f"{order} {estimate.why}"), "none"
    if other.why:
        return _interval(ratio, parts / parts.mean(), one.effective, level), f"{names[1]} as it is in this window"
    others = CONTRIBUTIONS[kind](below / scale_of(below))[0]
    joint = parts / parts.mean() - others / others.mean()
    return _interval(ratio, joint, min(one.effective, other.effective), level), "both"


def _interval(value: float, relative: Floats, size: float, level: float) -> _Estimate:
    """Return an interval on the logarithm's scale, from the series whose mean the logarithm follows."""
    reach = np.exp(quantile(level) * float(standard_error(relative - relative.mean())))
    return _Estimate(value, value / reach, value * reach, size, "")


def _too_short(size: float, steps: int) -> str:
    needed = f"about {_rounded_up(steps * ENOUGH / size):,} steps" if size >= 1 else "a much longer window"
    return f"is too short: worth {size:.0f} independent values, and {ENOUGH} are needed; that takes {needed}"


def _rounded_up(steps: float) -> int:
    """Round up to two digits: it is an estimate."""
    scale = 10 ** max(0, int(np.log10(steps)) - 1)
    return int(np.ceil(steps / scale) * scale)


def _table(
    seen: Window, dims: tuple[str, ...], coords: dict[str, object], estimates: object, kind: Kind, level: float
) -> xr.Dataset:
    array = np.array(estimates, dtype=object)
    fields = {"variance": "value", "low": "low", "high": "high", "effective": "effective"}
    numbers = {
        name: (dims, np.vectorize(lambda e, field=field: getattr(e, field), otypes=[float])(array))
        for name, field in fields.items()
    }
    why = {"why": (dims, np.vectorize(lambda e: e.why, otypes=[object])(array).astype(str))}
    return xr.Dataset(numbers | why, coords, {**seen.attrs, "kind": kind, "level": level})


def check_kind(kind: str) -> None:
    """Refuse what is no variance."""
    if kind not in get_args(Kind):
        raise ConfigurationError(f"no variance {kind!r}; {choices(kind, get_args(Kind))}")


def tables(
    stored: StoredExperiment, metric: str | None = None, window: int | None = None, kind: str = "tail"
) -> list[Table]:
    """Return what `trajstore analyze` shows."""
    ds = stored.dataset()
    chosen = metric or usual_metric(ds)
    each = variance(ds, chosen, window, kind)  # type: ignore[arg-type]  # it says what there is
    shown = [
        Table(f"{kind} variance of {window_told(each)}", each, ("variance", "effective"), {"variance": ("low", "high")})
    ]
    if {"forward", "backward"} <= set(map(str, each["order"].values)):
        ratio = variance_ratio(ds, chosen, window, kind)  # type: ignore[arg-type]
        shown.append(Table("forward over backward", ratio, ("ratio", "basis"), {"ratio": ("low", "high")}))
    return shown
