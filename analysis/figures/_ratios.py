"""What titles say of how many times forward varies more than another order, where there is anything to say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import xarray as xr
from trajstore.analysis.writing import interval

from trajstore.errors import StatisticError

__all__ = ["ratios"]


def ratios(found: Callable[[], xr.Dataset]) -> dict[int, str]:
    """Return for each seed the ratio of variances with its interval; nothing where a ratio cannot be asked for."""
    try:
        table = found()
    except StatisticError:
        return {}
    return {seed: _said(table.sel(seed=seed), table.attrs) for seed in table["seed"].values.tolist()}


def _said(ratio: xr.Dataset, attrs: Mapping[Any, Any]) -> str:
    value, low, high = (float(ratio[name]) for name in ("ratio", "low", "high"))
    if not np.isfinite(value):
        return str(ratio["why"].item())
    sure = "" if np.isfinite(low) else " (no interval)"
    one, other = attrs["orders"]
    return f"{one}/{other} {interval(value, low, high)}{sure}, steps {attrs['from_step']} to {attrs['to_step']}"
