"""Rolling variance: a panel a seed, the variance of a metric over the window that ends at each step, all orders."""

from __future__ import annotations

from functools import partial

import xarray as xr
from trajstore.analysis.figures._panels import (
    Drawn,
    Given,
    Orders,
    Seeds,
    log_axis,
    main_metric,
    named,
    refuse_empty,
    seed_panels,
    selected,
    slab_style,
    spans_decades,
    step_axis,
    titled,
)
from trajstore.analysis.figures._ratios import ratios
from trajstore.analysis.figures._style import style
from trajstore.analysis.variance import Kind, rolling_variance, variance_ratio
from trajstore.analysis.windows import measured_steps

from trajstore.errors import StatisticError

__all__ = ["draw"]

_WINDOW, _LEAST = 100, 8


def draw(
    ds: xr.Dataset,
    metric: str | None = None,
    *,
    window: int | None = None,
    kind: Kind = "tail",
    seed: Seeds = None,
    order: Orders = None,
    axes: Given = None,
) -> Drawn:
    """Draw the variance over windows of recorded steps: 100, or a quarter of what is measured where that is less.

    The title of a panel has how many times forward varies more than backward over the last half of the run, with the
    interval of `analysis.variance_ratio`, or why there is none. `axes` are one a seed.
    """
    ds = selected(ds, seed, order)
    metric = main_metric(ds, metric)
    measured = len(measured_steps(ds, metric)[0])
    window = window or max(_LEAST, min(_WINDOW, measured // 4))
    if window > measured:
        raise StatisticError(f"{metric}: it was measured at {measured} steps, fewer than the window of {window}")
    found = refuse_empty(rolling_variance(ds, metric, window, kind), metric)
    seeds = ds["seed"].values.tolist()
    told = ratios(ds, metric, partial(variance_ratio, kind=kind), ("forward", "backward"))
    with style():
        made = seed_panels(seeds, axes)
        for ax, label in zip(made.flat, seeds, strict=False):
            for name in ds["order"].values.tolist():
                curve = found.sel(order=name, seed=label)
                ax.plot(curve["step"], curve, label=name, **slab_style(ds, name))
            titled(ax, f"seed {label}", told.get(label, ""))
        if spans_decades(found):
            log_axis(made.flat)
        step_axis(made.flat)
        made.label("step $n$", f"{kind} variance of {named(metric)}\nover {window} recorded steps")
        made.legend()
    return made.figure
