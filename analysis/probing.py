"""What the model of each stored state says of a probe, a few fixed examples: networks as functions.

Parameters can move while the function that they stand for rests, and two states far apart can be one function.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from trajstore.analysis.windows import SLABS, with_slabs

from trajstore.recipe import Recipe

__all__ = ["outputs", "outputs_of_slabs"]

Floats = NDArray[np.float64]


def outputs(ds: xr.Dataset) -> xr.DataArray:
    """Return the outputs of every stored state on the probe: (order, seed, snapshot, example, output).

    The probe is the first 256 test examples of the problem, or training examples if there are no others. They are
    computed here, in evaluation mode, with the problem as it is stored; NaN where no state is.
    """
    found = {slab: list(states) for slab, states in outputs_of_slabs(ds)}
    some = next((one for states in found.values() for one in states if one is not None), np.empty((0, 0)))
    orders, seeds = (np.atleast_1d(ds[dim].values) for dim in SLABS)
    values = np.full((len(orders), len(seeds), ds.sizes["snapshot"], *some.shape), np.nan)
    for slab, states in found.items():
        for n, one in enumerate(states):
            if one is not None:
                values[slab][n] = one
    coords = {"order": orders, "seed": seeds, "snapshot": ds["snapshot"].values}
    about = {"description": "what the model says of the probe"}
    return xr.DataArray(values, coords, (*SLABS, "snapshot", "example", "output"), "outputs", about)


def outputs_of_slabs(ds: xr.Dataset) -> Iterator[tuple[tuple[int, int], Iterator[Floats | None]]]:
    """Yield for each slab its position, and the outputs of its states one after the other, None where none is."""
    recipe = Recipe.of(ds)
    for slab in np.ndindex(*with_slabs(ds["stored"]).shape[:2]):
        yield (slab[0], slab[1]), _of_slab(recipe, ds, slab[0], slab[1])


def _of_slab(recipe: Recipe, ds: xr.Dataset, i: int, k: int) -> Iterator[Floats | None]:
    there = with_slabs(ds["stored"])[i, k].values
    params, counters = (with_slabs(ds[name])[i, k] for name in ("params", "counters"))
    together = recipe.schema.snapshots_per_segment  # as they are stored: what is smaller is read as a whole anyway
    for begin in range(0, len(there), together):
        some = slice(begin, begin + together)
        # Turned first: the numbers of a state would be far from each other.
        vectors = np.ascontiguousarray(params.isel(snapshot=some).transpose("snapshot", "param").values)
        counted = counters.isel(snapshot=some).transpose("snapshot", ...).values.astype(np.int64)
        for at, vector in enumerate(vectors):
            yield recipe.outputs(recipe.state(vector, counted[at])) if there[begin + at] else None
