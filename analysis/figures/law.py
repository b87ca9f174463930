"""Theorem 2.6 to the eye: the law that forward goes through as a density, where backward runs end as marks."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from numpy.typing import NDArray
from trajstore.analysis.figures._panels import (
    Drawn,
    Given,
    Seeds,
    main_metric,
    named,
    panels,
    selected,
    titled,
)
from trajstore.analysis.figures._style import order_colour, style
from trajstore.analysis.law import law, refuse_of_more
from trajstore.analysis.spaces import PARAMETERS
from trajstore.analysis.windows import measured_steps, stored_window, window_of
from trajstore.analysis.writing import number

from trajstore.errors import NotFoundError, StatisticError

__all__ = ["draw"]

_ORDERS = ("forward", "backward")
_MANY = 100
"""Seeds: from here on one iterate of each makes a density, and they are independent."""
_LEAST = 20
"""Forward iterates that a density takes."""
_FEW = 12
"""Values: so few are drawn as bars of their own."""
_BINS = (8, 40)

Floats = NDArray[np.float64]


def draw(ds: xr.Dataset, metric: str | None = None, *, seed: Seeds = None, axes: Given = None) -> Drawn:
    """Draw the density of a metric over forward iterates, and its value at the last backward iterate of each seed.

    The forward iterates are those of the last half of the steps, of all seeds, or the last one of each seed where there
    are 100. ``parameters`` is the parameter itself, where there is only one; it is then what is drawn by default. The
    title has the p-value of `analysis.law` where that test can be made.
    """
    ds = selected(ds, seed)
    for name in _ORDERS:
        if name not in ds["order"].values:
            raise StatisticError(f"the law compares 'forward' and 'backward'; there is no {name!r} here")
    metric = metric or (PARAMETERS if _single(ds) else main_metric(ds, None))
    refuse_of_more(metric)
    values, step, label = _values(ds, metric)
    forward, backward = values
    many = len(forward) >= _MANY
    late, when = (forward[:, -1], "") if many else _late(ds, metric, forward)
    known, ends = late.ravel(), backward[:, -1]
    known, ends = known[np.isfinite(known)], ends[np.isfinite(ends)]
    if len(known) < _LEAST or not len(ends):
        raise StatisticError(
            f"{label}: {len(known)} forward and {len(ends)} backward iterates have a finite value, and {_LEAST} and 1 "
            "are needed; record more steps or seeds"
        )
    taken = f"forward, step {step} of {_seeds(known)}" if many else f"forward, {when} of {_seeds(forward)}"
    with style():
        made = panels(1, 1, axes, (4.4, 2.7))
        (ax,) = made.flat
        _density(ax, known, ends, taken, f"backward, step {step} of {_seeds(ends)}")
        ax.set_xlabel(label)
        ax.set_ylabel("density" if len(np.unique(known)) > _FEW else "share")
        titled(ax, _tested(ds, metric))
        made.legend()
    return made.figure


def _late(ds: xr.Dataset, metric: str | None, forward: Floats) -> tuple[Floats, str]:
    """Return forward over its last half, and what that is; of an adaptive grid, which is uneven, over its window."""
    if not ds.attrs.get("adaptive"):
        return forward[:, forward.shape[1] // 2 :], "last half"
    alone = ds.sel(order=["forward"])
    if metric == PARAMETERS:
        steps = stored_window(alone, PARAMETERS)
        values = alone["params"].sel(snapshot=steps).isel(order=0, param=0).transpose("seed", "snapshot").values
        return values.astype(float), f"last {len(steps)} states"
    seen = window_of(alone, main_metric(alone, metric))
    return seen.values[0], f"last {len(seen)} steps"


def _seeds(values: Floats) -> str:
    return "1 seed" if len(values) == 1 else f"{len(values)} seeds"


def _single(ds: xr.Dataset) -> bool:
    return ds.sizes.get("param") == 1 and bool(ds["stored"].any())


def _values(ds: xr.Dataset, metric: str) -> tuple[tuple[Floats, Floats], int, str]:
    """Return forward and backward, (seed, step), the last step, and what they are."""
    if metric == PARAMETERS:
        if not _single(ds):
            raise StatisticError(
                f"a density is of one number, and {ds.sizes['param']:,} of each state are stored; name a metric, as in "
                "param_norm, or draw the figure 'plane'"
            )
        kept = ds["params"].isel(param=0).transpose("order", "seed", "snapshot")
        found, last, label = kept.values.astype(float), int(ds["snapshot"].values[-1]), "parameter $θ$"
    else:
        metric = main_metric(ds, metric)
        places, found, _ = measured_steps(ds, metric)
        last, label = int(ds["step"].values[places[-1]]), named(metric)
    at = [ds["order"].values.tolist().index(name) for name in _ORDERS]
    return (found[at[0]], found[at[1]]), last, label


def _density(ax: Axes, known: Floats, ends: Floats, forward: str, backward: str) -> None:
    """Draw bars for forward, and marks below them for backward."""
    values, counts = np.unique(known, return_counts=True)
    colour = order_colour("forward", 0)
    if len(values) <= _FEW:
        wide = 0.1 * (np.ptp(values) or 1.0)
        bars = ax.bar(values, counts / len(known), wide, color=colour, alpha=0.55)
        bars[0].set_label(forward)  # that of all bars would come last in the legend
        top = float((counts / len(known)).max())
    else:
        low, high = min(known.min(), ends.min()), max(known.max(), ends.max())
        bins = int(np.clip(len(np.histogram_bin_edges(known, "fd")) - 1, *_BINS))
        heights, _, _ = ax.hist(known, bins, range=(low, high), density=True, color=colour, alpha=0.55, label=forward)
        top = float(np.max(heights))
    few = len(ends) < _MANY
    ax.plot(
        ends, np.full(len(ends), -0.07 * top), linestyle="", marker="^" if few else "|", markersize=6 if few else 9,
        alpha=0.8 if few else 0.4, markeredgewidth=0.6, color=order_colour("backward", 1), label=backward,
    )  # fmt: skip
    ax.axhline(0, color="black", linewidth=0.7)
    ax.set_ylim(-0.14 * top, 1.05 * top)
    ax.set_yticks([tick for tick in ax.get_yticks() if 0 <= tick <= 1.05 * top])
    ax.spines["bottom"].set_visible(False)


def _tested(ds: xr.Dataset, metric: str) -> str:
    """Return what the test of equal law found, or why there is none, shortly."""
    try:
        found = law(ds, [metric])
    except (StatisticError, NotFoundError) as error:
        return f"no test: {str(error).split(';')[0].split(',')[0]}"
    p = float(found["p_swap"].values[0, 0])
    return f"test of equal law at step {found['step'].values[0]}: swap $p$ = {number(p)}"
