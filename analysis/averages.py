"""Time averages: what the measure that training visits says of a metric (Zhang et al.).

Losses and gradient norms need not settle for their averages to. For ``invariance_gap``, computed from stored states
with fresh draws, the average of a stationary window is 0: an interval without 0 says that it is not stationary.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.lib.stride_tricks import sliding_window_view
from trajstore.analysis.longrun import ENOUGH, effective_size, quantile, standard_error
from trajstore.analysis.rounding import scale_of
from trajstore.analysis.windows import SLABS, window_of

from trajstore.errors import StatisticError

__all__ = ["rolling_mean", "time_average"]


def time_average(ds: xr.Dataset, metric: str, window: int | None = None, level: float = 0.95) -> xr.Dataset:
    """Return the mean over a window with an interval for that of the process it is a piece of, for each slab.

    By default the window is the last half of what was measured. A window worth fewer than 50 independent values
    (``effective``) has no interval.
    """
    seen = window_of(ds, metric, window, least=8)
    finite = np.asarray(np.isfinite(seen.values).all(-1))
    scale = scale_of(seen.values[finite])
    values = np.where(finite[..., None], seen.values, 0.0) / scale
    mean = values.mean(-1)
    reach = quantile(level) * standard_error(values - mean[..., None])
    size = np.apply_along_axis(effective_size, -1, values)
    still = np.ptp(values, axis=-1) == 0
    sure = finite & ((size >= ENOUGH) | still)
    why = np.where(~finite, "diverged", np.where(sure, "", f"too short: {ENOUGH} independent values are needed"))
    mean, reach = mean * scale, reach * scale
    fields = {
        "mean": np.where(finite, mean, np.nan),
        "low": np.where(sure, mean - reach, np.nan),
        "high": np.where(sure, mean + reach, np.nan),
        "effective": np.where(finite, size, np.nan),
        "why": why,
    }
    columns = {name: (SLABS, column) for name, column in fields.items()}
    return xr.Dataset(columns, seen.coords, {**seen.attrs, "level": level})


def rolling_mean(ds: xr.Dataset, metric: str, window: int) -> xr.DataArray:
    """Return the mean over the `window` measured steps that end at each step, (order, seed, step)."""
    if window < 1:
        raise StatisticError(f"window is {window}; a mean needs at least one step")
    seen = window_of(ds, metric, "all", least=window)
    means = np.full(seen.values.shape, np.nan)
    views = sliding_window_view(seen.values, window, axis=-1)
    means[..., window - 1 :] = views.mean(-1)
    coords = {**seen.coords, "step": seen.steps}
    return xr.DataArray(means, coords, (*SLABS, "step"), "rolling_mean", {**seen.attrs, "window": window})
