"""Distance matrix of the iterates, a row a seed, a column an order: a point is dark in the end, a law never is."""

from __future__ import annotations

from warnings import catch_warnings, simplefilter

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from trajstore.analysis.distance_matrix import distance_matrix
from trajstore.analysis.figures._panels import (
    Drawn,
    Given,
    Orders,
    Seeds,
    panels,
    refuse_empty,
    selected,
    sketched,
    titled,
)
from trajstore.analysis.figures._style import style

from trajstore.errors import StatisticError

__all__ = ["draw"]

_MOST = 200
"""Iterates of a slab: a panel has no more pixels to show them."""
_LEAST = 3


def draw(ds: xr.Dataset, *, seed: Seeds = None, order: Orders = None, axes: Given = None) -> Drawn:
    """Draw the distances between all stored states of each slab, or between an even choice of 200 of them.

    Where fewer than three states are stored it is the sketches of all recorded iterates, and the label says so. All
    panels have one scale. `axes` are one an order for each seed, row by row.
    """
    ds = selected(ds, seed, order)
    found, what = _matrices(ds)
    seeds, orders = ds["seed"].values.tolist(), ds["order"].values.tolist()
    found = refuse_empty(found.where(np.isfinite(found)), "distances")  # what diverged is blank
    highest = float(found.max())
    with style():
        made = panels(len(seeds), len(orders), axes, (2.6, 2.35))
        image = None
        for (row, column), ax in np.ndenumerate(made.axes):
            one = found.sel(seed=seeds[row], order=orders[column])
            edges = _edges(one["step"].values)
            image = ax.pcolormesh(edges, edges, one.values, cmap="cividis", vmin=0, vmax=highest, rasterized=True)
            ax.set_aspect("equal")
            ax.grid(visible=False)
            ax.locator_params(nbins=4)
            titled(ax, f"seed {seeds[row]}, {orders[column]}")
        made.label("step $n$", "step $m$")
        assert image is not None
        made.figure.colorbar(image, ax=made.flat, label=what, shrink=min(0.9, 2 / len(seeds)), aspect=30)
    return made.figure


def _matrices(ds: xr.Dataset) -> tuple[xr.DataArray, str]:
    """Return distances, (order, seed, step, other), and what to call them."""
    stored = ds["stored"].any(("order", "seed")).values
    if int(stored.sum()) >= _LEAST:
        few = ds.isel(snapshot=evenly(np.flatnonzero(stored), _MOST))
        with catch_warnings():
            simplefilter("ignore", RuntimeWarning)  # of overflow, where it diverges
            far = distance_matrix(few)
        return far.rename(snapshot="step"), "distance of states $n$ and $m$"
    there = evenly(np.flatnonzero(ds["recorded"].any(("order", "seed"))), _MOST)
    if len(there) < _LEAST:
        raise StatisticError(f"{len(there)} iterates are recorded; a matrix of distances takes {_LEAST}")
    sketch = ds["sketch"].isel(step=there).transpose("order", "seed", "step", "component").compute().astype(float)
    squares = np.zeros((*sketch.shape[:3], len(there)))
    for component in np.moveaxis(sketch.values, -1, 0):  # one at a time: all of them would be much memory
        squares += (component[..., :, None] - component[..., None, :]) ** 2
    coords = {"order": ds["order"].values, "seed": ds["seed"].values, "step": sketch["step"].values}
    error = 0.0 if ds["sketch"].attrs.get("identity", False) else np.sqrt(0.5 / sketch.sizes["component"])
    found = xr.DataArray(np.sqrt(squares), coords, ("order", "seed", "step", "other"))
    return found, f"distance of iterates $n$ and $m$,\n{sketched(error)}"


def evenly(places: NDArray[np.intp], most: int) -> NDArray[np.intp]:
    """Return no more than so many of them, the first and the last among them."""
    if len(places) <= most:
        return places
    return np.asarray(places[np.linspace(0, len(places) - 1, most).round().astype(int)])


def _edges(steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return where the cells of steps begin and end."""
    middles = (steps[1:] + steps[:-1]) / 2
    return np.array([2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]])
