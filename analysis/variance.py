"""Variance of a metric over the last recorded steps, each slab by itself.

Three meanings, which differ by orders of magnitude on the same curve, so each has its name:

``level_variance``  raw: descent and noise together
``tail_variance``   about a line fitted by least squares: what is left once the trend is taken out
``step_variance``   half the mean square of successive differences, less their mean: the part from step to step

The values are as wide as the dataset's other dimensions, (order, seed); nothing is averaged over seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from trajstore.errors import NotFoundError, StatisticError, choices

__all__ = ["forward_over_backward", "level_variance", "step_variance", "tail_variance", "window_of"]

Estimator = Callable[[NDArray[np.float64], NDArray[np.float64]], float]
"""(steps, values) → variance."""


def level_variance(ds: xr.Dataset, metric: str, window: int = 100) -> xr.DataArray:
    """Return the sample variance over the last `window` recorded steps."""
    return _over_slabs(ds, metric, window, "level_variance", _level)


def tail_variance(ds: xr.Dataset, metric: str, window: int = 100) -> xr.DataArray:
    """Return the residual variance about a linear trend over the last `window` recorded steps.

    The sum of squares is divided by the number of steps less two, for the line's two coefficients.
    """
    return _over_slabs(ds, metric, window, "tail_variance", _detrended)


def step_variance(ds: xr.Dataset, metric: str, window: int = 100) -> xr.DataArray:
    """Return half the sample variance of successive differences over the last `window` recorded steps."""
    return _over_slabs(ds, metric, window, "step_variance", _differences)


def forward_over_backward(variances: xr.DataArray) -> xr.DataArray:
    """Return the ratio of forward to backward, one for each seed."""
    for order in ("forward", "backward"):
        if order not in variances["order"].values:
            raise StatisticError(f"a ratio needs the orders 'forward' and 'backward'; there is no {order!r} here")
    ratio = variances.sel(order="forward", drop=True) / variances.sel(order="backward", drop=True)
    return ratio.rename(f"{variances.name}_ratio")


def window_of(ds: xr.Dataset, metric: str, window: int) -> tuple[NDArray[np.float64], xr.DataArray]:
    """Return the last `window` recorded steps and the metric there, (order, seed, step)."""
    if metric not in ds or "step" not in ds[metric].dims or ds[metric].ndim != 3:
        known = str(ds["measured"].attrs.get("flag_meanings", "")).split()
        raise NotFoundError(f"no metric {metric!r}; {choices(metric, known)}")
    recorded = ds["recorded"]
    steps = np.flatnonzero(recorded.any(("order", "seed")))
    if window < 3:
        raise StatisticError(f"window is {window}; a variance about a trend needs at least 3 steps")
    if len(steps) < window:
        raise StatisticError(f"{metric}: {len(steps)} steps are recorded, fewer than the window of {window}")
    tail = steps[-window:]
    if ds.attrs.get("adaptive") and len(set(np.diff(tail).tolist())) > 1:
        raise StatisticError(
            f"{metric}: the grid is adaptive, so steps {tail[0]} to {tail[-1]} are recorded where "
            f"{ds.attrs['adaptive']} changes most, and a variance over them would be wrong; record them evenly"
        )
    there = recorded.isel(step=tail)
    if not bool(there.all()):
        order, seed, step = next(zip(*np.nonzero(~there.values), strict=True))
        raise StatisticError(
            f"{metric}: order {str(ds['order'].values[order])!r}, seed {ds['seed'].values[seed]} "
            f"has no step {tail[step]}; finish the recording, or select the slabs that are complete"
        )
    return ds["step"].values[tail].astype(np.float64), ds[metric].isel(step=tail)


def _over_slabs(ds: xr.Dataset, metric: str, window: int, name: str, estimator: Estimator) -> xr.DataArray:
    steps, values = window_of(ds, metric, window)
    series: NDArray[Any] = values.transpose("order", "seed", "step").values
    result = np.array([[estimator(steps, slab) for slab in slabs] for slabs in series])
    return xr.DataArray(
        result,
        dims=("order", "seed"),
        coords={dim: ds[dim] for dim in ("order", "seed")},
        name=name,
        attrs={"metric": metric, "from_step": int(steps[0]), "to_step": int(steps[-1]), "window": window},
    )


def _level(steps: NDArray[np.float64], values: NDArray[np.float64]) -> float:
    return float(np.var(values, ddof=1))


def _detrended(steps: NDArray[np.float64], values: NDArray[np.float64]) -> float:
    x, y = steps - steps.mean(), values - values.mean()
    residual = y - (x @ y / (x @ x)) * x
    return float(residual @ residual / (len(x) - 2))


def _differences(steps: NDArray[np.float64], values: NDArray[np.float64]) -> float:
    return float(np.var(np.diff(values), ddof=1) / 2)
