"""What a reset does: a panel a seed, the level of a metric before and after each reset, and forward beside them."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from trajstore.analysis.figures._panels import (
    Drawn,
    Given,
    Seeds,
    log_axis,
    main_metric,
    named,
    recorded,
    seed_panels,
    selected,
    slab_style,
    spans_decades,
    step_axis,
    titled,
)
from trajstore.analysis.figures._style import style
from trajstore.analysis.resets import resets

__all__ = ["draw"]

_FORWARD = "forward"
_SETTLES = {
    "elsewhere": "settles elsewhere",
    "not told apart": "levels not told apart",
    "too short": "legs too short to settle",
    "undecided": "levels differ, not decided why",
}


def draw(
    ds: xr.Dataset,
    metric: str | None = None,
    *,
    seed: Seeds = None,
    order: str | None = None,
    axes: Given = None,
) -> Drawn:
    """Draw an order that begins new legs, by default the first that does, with `forward` if it is there.

    Black bars are the levels of `analysis.resets`, over the steps that they are of, the grey about them is their 95%
    interval, and dotted lines are resets. The titles say where it settled, and where that is elsewhere, how much of
    forward during the new legs is between the levels. `axes` are one a seed.
    """
    ds = selected(ds, seed)
    metric = main_metric(ds, metric)
    found = resets(ds, metric)  # of all orders: others tell what would have been without a reset
    if order is not None and order not in found["order"].values:
        resets(selected(ds, order=order), metric)  # which says what it lacks
    order = order or str(found["order"].values[0])  # the first that does
    found = found.isel(reset=found["order"].values == order)
    seeds = ds["seed"].values.tolist()
    shown = [name for name in ds["order"].values.tolist() if name in (_FORWARD, order)]
    with style():
        made = seed_panels(seeds, axes)
        for ax, one in zip(made.flat, seeds, strict=False):
            for name in shown:
                steps, values = recorded(ds, metric, name, one)
                ax.plot(steps, values, label=name, **slab_style(ds, name))
            mine = found.isel(reset=found["seed"].values == one)
            _levels(ax, mine)
            titled(ax, f"seed {one}", _settled(mine), _between(mine) if _FORWARD in shown else "")
        if spans_decades(ds[metric].sel(order=shown)):
            log_axis(made.flat)
        step_axis(made.flat)
        made.label("step $n$", named(metric))
        made.legend()
    return made.figure


def _levels(ax: Axes, found: xr.Dataset) -> None:
    """Draw each leg's level where it was taken: before the first reset, and after each."""
    for number in range(found.sizes["reset"] + 1 if found.sizes["reset"] else 0):
        which = found.isel(reset=max(number - 1, 0))
        side = "after" if number else "before"
        level, low, high = (float(which[side + end]) for end in ("", "_low", "_high"))
        start = int(which["step"])
        half = [float(which[f"{side}_from"]), float(which["after_to"]) if number else start]
        ax.fill_between(half, low, high, color="black", alpha=0.2, linewidth=0, zorder=8)
        ax.plot(
            half,
            [level, level],
            color="black",
            linewidth=1.4,
            zorder=9,
            label=None if number else "level (end of a leg)",
        )
        if number:
            ax.axvline(start, color="black", linestyle=":", linewidth=0.8)


def _settled(found: xr.Dataset) -> str:
    told = found["settles"].values.tolist()
    if len(told) == 1:
        return _SETTLES.get(told[0], str(told[0]))
    return f"{told.count('elsewhere')} of {len(told)} resets settle elsewhere" if told else "no reset"


def _between(found: xr.Dataset) -> str:
    shares = found["forward_between"].values[found["settles"].values == "elsewhere"]  # only these are levels apart
    shares = shares[np.isfinite(shares)]
    if not len(shares):
        return ""
    share = f"{shares[0]:.0%}" if len(shares) == 1 else f"{shares.min():.0%} to {shares.max():.0%}"
    return f"forward between the levels: {share}"
