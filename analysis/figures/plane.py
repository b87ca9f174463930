"""Paths in the plane of the trajectories: a panel a seed, all orders in the plane in which its iterates vary most."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from trajstore.analysis.figures._panels import Drawn, Given, Orders, Seeds, seed_panels, selected, slab_style, titled
from trajstore.analysis.figures._style import style
from trajstore.analysis.figures.distance_matrix import evenly

from trajstore.errors import StatisticError
from trajstore.reading.iterates import Iterates

__all__ = ["draw"]

_MOST = 400
"""Iterates of a slab."""
_LEAST = 3
_WIDE = 8_192
"""Parameters that are looked at at a time."""

_DOT: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 5}
_FIRST = _DOT | {"markerfacecolor": "white"}
_LAST: dict[str, Any] = {
    "linestyle": "",
    "marker": "o",
    "markersize": 5,
    "markeredgecolor": "white",
    "markeredgewidth": 0.7,
}

Floats = NDArray[np.float64]


def draw(ds: xr.Dataset, *, seed: Seeds = None, order: Orders = None, axes: Given = None) -> Drawn:
    """Draw the stored states of each seed, or an even choice of 400 of each order, in their first principal components.

    The components are those of all orders of the seed together, from the parameters in float64; the labels have the
    share of the variance that lies along each. Where fewer than three states are stored it is the sketch, and the title
    says so. A ring is the first iterate, a dot the last one. `axes` are one a seed.
    """
    ds = selected(ds, seed, order)
    seeds = ds["seed"].values.tolist()
    with style():
        made = seed_panels(seeds, axes, height=2.5)
        for ax, one in zip(made.flat, seeds, strict=False):
            mine = ds.sel(seed=[one])
            paths, shares, source = _paths(mine)
            for name, path in zip(ds["order"].values.tolist(), paths, strict=True):
                _path(ax, path, slab_style(ds, name), name)
            titled(ax, f"seed {one}{source}")
            ax.set_xlabel(f"component 1 ({shares[0]:.1%})")
            ax.set_ylabel(f"component 2 ({shares[1]:.1%})")
        for label, mark in (("first", _FIRST), ("last", _LAST)):
            made.flat[0].plot([], [], color="#777777", label=label, **mark)
        made.legend()
    return made.figure


def _path(ax: Axes, path: Floats, looks: dict[str, Any], name: str) -> None:
    if not len(path):
        return
    ax.plot(path[:, 0], path[:, 1], label=name, marker=".", markersize=1.5, alpha=0.85, **looks)
    for at, mark in ((path[0], _FIRST), (path[-1], _LAST)):
        ax.plot(*at, color=looks["color"], zorder=20, clip_on=False, **mark)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=4))


def _paths(ds: xr.Dataset) -> tuple[list[Floats], Floats, str]:
    """Return (iterate, component) of each order, the components' shares of the variance, and where they come from."""
    here = ds["recorded"].any("step")
    stored = bool((ds["stored"].sum("snapshot") >= _LEAST).where(here, True).all())
    with np.errstate(all="ignore"):  # told below
        gram, counts, numbers = (_gram_of_states if stored else _gram_of_sketches)(ds)
    where, total = f"seed {ds['seed'].values[0]}", float(np.trace(gram))
    if numbers < 2:
        raise StatisticError("a plane takes two parameters, and there is one; draw 'learning-curves' or 'law' of it")
    if sum(counts) < _LEAST:
        raise StatisticError(f"{where}: {sum(counts)} iterates are recorded, and a plane takes {_LEAST}")
    if not np.isfinite(total):
        raise StatisticError(
            f"{where}: an iterate is not finite, so there is no plane; select the steps before it diverged"
        )
    if total == 0:
        raise StatisticError(f"{where}: all iterates are the same, so there is no plane")
    variances, vectors = np.linalg.eigh(gram)
    top = variances[::-1][:2]
    places = vectors[:, ::-1][:, :2] * np.sqrt(np.maximum(top, 0))
    return np.split(places, np.cumsum(counts)[:-1]), top / total, "" if stored else ", from the sketch"


def _gram_of_states(ds: xr.Dataset) -> tuple[Floats, list[int], int]:
    """Return the products of the centred states of all orders of a seed, how many each has, and of how many numbers.

    Parameters are read range by range and centred before they are multiplied, so that nothing cancels.
    """
    iterates = Iterates.of(ds)
    entries = iterates.layers()
    chosen = [evenly(np.flatnonzero(stored), _MOST) for stored in iterates.stored[:, 0]]
    counts = [len(places) for places in chosen]
    gram = np.zeros((sum(counts), sum(counts)))
    edges = np.cumsum([0, *iterates.params.data.chunks[2]])
    for begin, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        parts = [(max(begin, e.offset) - begin, min(stop, e.offset + e.size) - begin) for e in entries]
        parts = [(left, right) for left, right in parts if left < right]
        if not parts:
            continue
        read = [
            iterates.params.isel(order=k, seed=0, param=slice(begin, stop), snapshot=places).values
            for k, places in enumerate(chosen)
        ]
        for left, right in parts:
            for at in range(left, right, _WIDE):
                rows = np.concatenate([one[at : min(at + _WIDE, right)].T.astype(np.float64) for one in read])
                rows -= rows.mean(axis=0)
                gram += rows @ rows.T
    return gram, counts, sum(e.size for e in entries)


def _gram_of_sketches(ds: xr.Dataset) -> tuple[Floats, list[int], int]:
    """Return the same from the sketches of the recorded iterates."""
    sketch = ds["sketch"].transpose("order", "seed", "step", "component")
    chosen = [evenly(np.flatnonzero(there), _MOST) for there in ds["recorded"].isel(seed=0).values]
    rows = np.concatenate([sketch[k, 0, places].values.astype(float) for k, places in enumerate(chosen)])
    rows -= rows.mean(axis=0)
    return rows @ rows.T, [len(places) for places in chosen], rows.shape[1]
