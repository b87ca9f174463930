"""The iterates that a dataset holds, whole or after a selection of orders, seeds and snapshots.

Everything is read off the dataset itself, its labels, masks and attributes, so that what was selected is what counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from trajstore.errors import ConfigurationError, NotFoundError, choices
from trajstore.reading.origin import UNKNOWN_ORIGIN, attributes_of
from trajstore.storage.format.layout import Entry, Layout

__all__ = ["Iterates", "Layers", "Slab", "entry_named", "layout_of", "slab_named"]

Layers = str | Sequence[str] | None
"""Globs of names of parameters; None for all of them."""
_BLOCK = 65_536
"""Parameters in a block of an array that is in memory; 64 snapshots."""


@dataclass(frozen=True)
class Slab:
    """The stored iterates of one (order, seed), as a statistic sees them."""

    where: str
    """What an error calls it."""
    steps: NDArray[np.int64]
    """The steps of its stored iterates, increasing."""
    grid: NDArray[np.int64]
    """The steps at which any slab of the dataset has one."""


@dataclass(frozen=True)
class Iterates:
    """The variable `params` of a dataset with all four dimensions, and what says how to read it."""

    experiment: str
    layout: Layout
    params: xr.DataArray
    """(order, seed, param, snapshot), in blocks."""
    stored: NDArray[np.bool_]
    """(order, seed, snapshot)."""
    selected: tuple[str, ...]
    """Dimensions of which one label was selected; results do not have them."""

    @classmethod
    def of(cls, ds: xr.Dataset) -> Iterates:
        """Find the iterates in a dataset."""
        layout = layout_of(ds)
        if "params" not in ds or "param" not in ds["params"].dims:
            raise NotFoundError("this dataset has no variable 'params' along 'param'; select no part of a state")
        params, stored = ds["params"], ds["stored"] if "stored" in ds.coords else xr.ones_like(ds["snapshot"], bool)
        if params.sizes["param"] != layout.size("params"):
            raise ConfigurationError(
                f"the dataset has {params.sizes['param']:,} of the {layout.size('params'):,} numbers of a state; "
                "take layers by their names, as in ds.traj.layer('0.weight'), and not along 'param'"
            )
        dims = ("order", "seed", "param", "snapshot")
        selected = tuple(dim for dim in dims if dim not in params.dims)
        params = params.expand_dims(selected).transpose(*dims)
        if params.chunks is None:
            params = params.copy(data=da.from_array(params.data, chunks=(1, 1, _BLOCK, 64), name=False))  # type: ignore[no-untyped-call]
        masks = stored.broadcast_like(params.isel(param=0, drop=True)).transpose("order", "seed", "snapshot")
        return cls(str(ds.attrs.get("experiment", "")), layout, params, np.asarray(masks.values, dtype=bool), selected)

    @property
    def steps(self) -> NDArray[np.int64]:
        """Over snapshots: their steps."""
        return np.atleast_1d(np.asarray(self.params["snapshot"].values, dtype=np.int64))

    @cached_property
    def grid(self) -> NDArray[np.int64]:
        """The steps at which any slab has an iterate."""
        return self.steps[self.stored.any(axis=(0, 1))]

    def slab(self, i: int, k: int) -> Slab:
        """Return one slab, by the positions of its order and seed."""
        labels = {
            dim: np.atleast_1d(self.params[dim].values)[at]
            for dim, at in (("order", i), ("seed", k))
            if dim in self.params.coords
        }
        return Slab(slab_named(self.experiment, labels), self.steps[self.stored[i, k]], self.grid)

    def layers(self, wanted: Layers = None) -> tuple[Entry, ...]:
        """Return the parameters with these names, in the order of the layout."""
        known = [e for e in self.layout.entries if e.role == "parameter" and e.array == "params" and e.size]
        if wanted is None:
            return tuple(known)
        chosen = set()
        for glob in [wanted] if isinstance(wanted, str) else wanted:
            names = [self.layout.tied.get(name, name) for name in (*(e.name for e in known), *self.layout.tied)]
            found = {glob} & set(names) or {
                name
                for name, asked in zip(names, (*(e.name for e in known), *self.layout.tied), strict=True)
                if fnmatchcase(asked, glob)
            }
            if not found:
                raise NotFoundError(f"no parameter {glob!r}; {choices(glob, names)}")
            chosen |= found
        return tuple(e for e in known if e.name in chosen)


def layout_of(ds: xr.Dataset) -> Layout:
    """Return how the states of a dataset are laid out."""
    try:
        return Layout.from_json(attributes_of(ds)["schema"]["layout"])
    except (KeyError, TypeError, ValueError):
        raise ConfigurationError(f"this dataset does not say how its states are laid out: {UNKNOWN_ORIGIN}") from None


def slab_named(experiment: str, labels: Mapping[str, Any]) -> str:
    """Name a slab for a message, by as many of its labels as are known."""
    named = [f"experiment {experiment!r}"] if experiment else []
    return ", ".join([*named, *(f"{dim} {np.asarray(label).item()!r}" for dim, label in labels.items())])


def entry_named(layout: Layout, name: str) -> Entry:
    """Return the tensor with a name, or with a second name of it."""
    entries = {e.name: e for e in layout.entries}
    try:
        return entries[layout.tied.get(name, name)]
    except KeyError:
        raise NotFoundError(f"no tensor {name!r}; {choices(name, [*entries, *layout.tied])}") from None
