"""Learning curves in the manner of the paper's Figure 4: a row per seed, a column per metric, all orders.

Seeds are drawn one by one and never averaged: backward paths differ from seed to seed, and a mean would
hide what each shows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from trajstore.analysis.figures import order_colour, style

from trajstore.errors import NotFoundError, StatisticError, choices
from trajstore.measures import MEASURES

__all__ = ["draw"]

_ROW_INCHES, _COLUMN_INCHES = 1.75, 3.3


def draw(ds: xr.Dataset, metrics: Sequence[str] | None = None) -> Figure:
    """Draw the problem's own metrics over steps, or the ones given, or what there is."""
    known = str(ds["measured"].attrs["flag_meanings"]).split()
    for metric in metrics or ():
        if metric not in known:
            raise NotFoundError(f"no metric {metric!r}; {choices(metric, known)}")
    own = [metric for metric in known if metric not in MEASURES]
    chosen = list(metrics or own or known)
    if not bool(ds["recorded"].any()):
        raise StatisticError(
            f"experiment {ds.attrs.get('experiment')!r}: nothing is recorded yet, so there is nothing to draw"
        )
    seeds = ds["seed"].values
    with style():
        figure = Figure(figsize=(_COLUMN_INCHES * len(chosen), 0.55 + _ROW_INCHES * len(seeds)), layout="constrained")
        axes = figure.subplots(len(seeds), len(chosen), sharex=True, sharey="col", squeeze=False)
        for row, seed in enumerate(seeds):
            for column, metric in enumerate(chosen):
                _curves(axes[row, column], ds, metric, row)
            axes[row, 0].set_ylabel(f"seed {seed}")
        for column, metric in enumerate(chosen):
            if _spans_decades(ds, metric):
                axes[0, column].set_yscale("log")  # shared by the column
            axes[0, column].set_title(metric.replace("_", " "))
            axes[-1, column].set_xlabel("step $n$")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 3))
    return figure


def _curves(ax: Axes, ds: xr.Dataset, metric: str, row: int) -> None:
    for position, order in enumerate(map(str, ds["order"].values)):
        here = ds["recorded"].isel(order=position, seed=row).values
        values = ds[metric].isel(order=position, seed=row).values[here]
        ax.plot(
            ds["step"].values[here],
            values,
            color=order_colour(order, position),
            label=order,
            # The noisiest curve lies below, so that the smooth ones stay visible.
            zorder=2 + position,
            linewidth=0.7 if order == "forward" else 1.1,
            # A line would hide that nothing was computed in between.
            marker="." if _uneven(ds["step"].values[here]) else None,
            markersize=2.5,
        )
    ax.margins(x=0.01)


def _uneven(steps: NDArray[np.int64]) -> bool:
    """Tell whether steps are recorded at uneven distances; the last one may be nearer."""
    return bool(len(set(np.diff(steps)[:-1].tolist())) > 1)


def _spans_decades(ds: xr.Dataset, metric: str) -> bool:
    """Tell whether a logarithmic axis serves: positive values, and enough range that its ticks are powers of ten."""
    values = ds[metric].values[ds["recorded"].values]
    finite = values[np.isfinite(values)]
    return bool(finite.size and finite.min() > 0 and finite.max() > 10 * finite.min())
