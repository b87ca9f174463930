"""Learning curves in the manner of the paper's Figure 4: a row per seed, a column per metric, all orders.

Of one metric alone it is a panel a seed, as many beside each other as fit on a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from numpy.typing import NDArray
from trajstore.analysis.figures._panels import (
    Drawn,
    Given,
    Orders,
    Seeds,
    log_axis,
    main_metric,
    named,
    panels,
    recorded,
    seed_panels,
    selected,
    slab_style,
    spans_decades,
    step_axis,
    titled,
)
from trajstore.analysis.figures._style import style
from trajstore.analysis.windows import own_metrics

__all__ = ["draw"]

_SIZE = (3.3, 1.75)


def draw(
    ds: xr.Dataset,
    metric: str | Sequence[str] | None = None,
    *,
    seed: Seeds = None,
    order: Orders = None,
    axes: Given = None,
) -> Drawn:
    """Draw the problem's own metrics over steps, or the ones given, or what there is.

    A metric that has no finite value is left out. `axes` are one a seed and metric, row by row.
    """
    ds = selected(ds, seed, order)
    asked = [metric] if isinstance(metric, str) else list(metric or ())
    chosen = [main_metric(ds, name) for name in asked] or own_metrics(ds)
    seeds = ds["seed"].values.tolist()
    with style():
        alone = len(chosen) == 1
        made = seed_panels(seeds, axes) if alone else panels(len(seeds), len(chosen), axes, _SIZE, share_y="col")
        for ax, (one, name) in zip(made.flat, product(seeds, chosen), strict=False):
            _curves(ax, ds, name, one)
            titled(ax, f"seed {one}" if alone else named(name) if one == seeds[0] else "")
        for ax, (_, name) in zip(made.flat, product(seeds, chosen), strict=False):
            if spans_decades(ds[name]):
                log_axis([ax])
        step_axis(made.flat)
        made.label("step $n$", named(chosen[0]) if alone else "")
        for row, one in enumerate([] if alone else seeds):
            made.at(row, 0).set_ylabel(f"seed {one}")
        made.legend()
    return made.figure


def _curves(ax: Axes, ds: xr.Dataset, metric: str, seed: int) -> None:
    for order in ds["order"].values.tolist():
        steps, values = recorded(ds, metric, order, seed)
        # A line would hide that nothing was computed in between.
        marks: dict[str, Any] = {"marker": ".", "markersize": 2.5} if _uneven(steps) else {}
        ax.plot(steps, values, label=order, **slab_style(ds, order), **marks)


def _uneven(steps: NDArray[np.int64]) -> bool:
    """Tell whether steps are recorded at uneven distances; the last one may be nearer."""
    return bool(len(set(np.diff(steps)[:-1].tolist())) > 1)
