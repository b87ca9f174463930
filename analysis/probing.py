"""What the model of each stored state says of a probe, a few fixed examples: networks as functions.

Parameters can move while the function that they stand for rests, and two states far apart can be one function.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from trajstore.analysis.windows import OUTPUTS, SLABS, with_slabs

from trajstore.errors import StatisticError
from trajstore.reading.iterates import Iterates
from trajstore.replay.recipe import Recipe

__all__ = ["outputs", "outputs_of_slabs"]

Floats = NDArray[np.float64]


def outputs(ds: xr.Dataset) -> xr.DataArray:
    """Return the outputs of every stored state on the probe: (order, seed, snapshot, example, output).

    The probe is the first 256 test examples of the problem, or training examples if there are no others. They are
    computed here, in evaluation mode, with the problem as it is stored; NaN where no state is.
    """
    found = {slab: list(states) for slab, states in outputs_of_slabs(ds)}
    some = next(one for states in found.values() for one in states if one is not None)
    labels = {dim: np.atleast_1d(ds[dim].values) for dim in (*SLABS, "snapshot")}
    values = np.full((*map(len, labels.values()), *some.shape), np.nan)
    for slab, states in found.items():
        for n, one in enumerate(states):
            if one is not None:
                values[slab][n] = one
    about = {"description": "what the model says of the probe"}
    return xr.DataArray(values, labels, (*labels, "probe", "output"), OUTPUTS, about)


def outputs_of_slabs(ds: xr.Dataset) -> Iterator[tuple[tuple[int, int], Iterator[Floats | None]]]:
    """Yield for each slab its position, and the outputs of its states one after the other, None where none is.

    A dataset that has them, as from ``ds.assign(outputs=outputs(ds))``, is taken at its word.
    """
    if OUTPUTS in ds:
        stored, known = with_slabs(ds["stored"]).values, with_slabs(ds[OUTPUTS]).values
        for i, k in np.ndindex(*stored.shape[:2]):
            yield (i, k), (one if there else None for one, there in zip(known[i, k], stored[i, k], strict=True))
        return
    recipe, iterates = Recipe.of(ds), Iterates.of(ds)
    if "counters" not in ds:
        raise StatisticError(
            "outputs: this dataset has no variable 'counters'; select steps, orders and seeds, not variables"
        )
    if not iterates.stored.any():
        raise StatisticError(f"outputs: no state of experiment {recipe.name!r} is stored here; finish the recording")
    missing = [dim for dim in (*SLABS, "snapshot") if dim not in ds["counters"].dims]
    counters = ds["counters"].expand_dims(missing).transpose(*SLABS, "snapshot", "counter")
    for i, k in np.ndindex(*iterates.stored.shape[:2]):
        yield (i, k), _of_slab(recipe, iterates.params[i, k], counters[i, k], iterates.stored[i, k])


def _of_slab(
    recipe: Recipe, params: xr.DataArray, counters: xr.DataArray, there: NDArray[np.bool_]
) -> Iterator[Floats | None]:
    together = recipe.schema.snapshots_per_segment  # as they are stored: what is smaller is read as a whole anyway
    for begin in range(0, len(there), together):
        some = slice(begin, begin + together)
        # Turned first: the numbers of a state would be far from each other.
        vectors = np.ascontiguousarray(params.isel(snapshot=some).transpose("snapshot", "param").values)
        counted = counters.isel(snapshot=some).values.astype(np.int64)
        for at, vector in enumerate(vectors):
            yield recipe.outputs(recipe.state(vector, counted[at])) if there[begin + at] else None
