"""What titles say of how many times forward varies more than another order, or why nothing can be said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import xarray as xr
from trajstore.analysis.writing import interval

from trajstore.errors import StatisticError

__all__ = ["ratios"]


class Statistic(Protocol):
    """A table of ratios, a row a seed."""

    def __call__(self, ds: xr.Dataset, metric: str, *, orders: tuple[str, str]) -> xr.Dataset:
        """Return it."""


def ratios(ds: xr.Dataset, metric: str, statistic: Statistic, orders: tuple[str, str]) -> dict[int, str]:
    """Return for each seed the ratio of variances with its interval, nothing where an order is not shown.

    Where there is a reason against all ratios, such as too few steps, the first seed has it. A bound is told as one.
    """
    seeds = ds["seed"].values.tolist()
    if not {*orders} <= {*ds["order"].values.tolist()}:
        return {}
    try:
        table = statistic(ds, metric, orders=orders)
    except StatisticError as error:
        return {seeds[0]: f"no ratio of variances: {str(error).removeprefix(f'{metric}: ')}"}
    return {seed: _said(table.sel(seed=seed), table.attrs) for seed in seeds}


def _said(ratio: xr.Dataset, attrs: Mapping[Any, Any]) -> str:
    value, low, high = (float(ratio[name]) for name in ("ratio", "low", "high"))
    if not np.isfinite(value):
        return str(ratio["why"].item())
    one, other = attrs["orders"].split(", ")
    bound = str(ratio["bound"].item()) if "bound" in ratio else ""
    told = interval(value, -np.inf if bound == "upper" else low, high)
    sure = f" ({ratio['why'].item()})" if bound else "" if np.isfinite(low) else " (no interval)"
    return f"variance {one}/{other} {told}{sure}, steps {attrs['from_step']} to {attrs['to_step']}"
