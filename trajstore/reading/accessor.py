"""`ds.traj`: what is asked of an experiment's dataset by the names of its layers, and distances of its iterates.

Everything is lazy but `state_dict`, and answers for what is selected: `ds.sel(seed=3).traj` knows that seed alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from trajstore.errors import ConfigurationError, NotFoundError, StatisticError, choices
from trajstore.reading.distances import To, distance_to
from trajstore.reading.iterates import Layers, entry_named, layout_of, slab_named
from trajstore.reading.streaming import PerLayer, streamed

if TYPE_CHECKING:
    import torch

__all__ = ["TrajAccessor"]


@xr.register_dataset_accessor("traj")  # type: ignore[no-untyped-call]
class TrajAccessor:
    """What an experiment's dataset, or a selection of it, is asked by name."""

    def __init__(self, ds: xr.Dataset) -> None:
        self._ds = ds

    def layer(self, name: str) -> xr.DataArray:
        """Return one tensor in its own shape: (order, seed, <its dimensions>, snapshot), lazy.

        Any tensor of the state will do, parameter or buffer or what is stored of the optimizer, and any of its names
        if it is tied. Its dimensions are called ``<name>_dim_0``, ``<name>_dim_1``, …
        """
        layout = layout_of(self._ds)
        entry = entry_named(layout, name)
        along = "param" if entry.array == "params" else "counter"
        array = self._ds[entry.array]
        whole = layout.size(entry.array)
        if array.sizes.get(along) != whole:
            raise ConfigurationError(f"only a part of the {whole:,} numbers of a state is selected along {along!r}")
        flat = array.isel({along: entry.part})
        at = flat.dims.index(along)
        shape = (*flat.shape[:at], *entry.shape, *flat.shape[at + 1 :])
        dims = (*flat.dims[:at], *(f"{name}_dim_{k}" for k in range(len(entry.shape))), *flat.dims[at + 1 :])
        coords = {key: c for key, c in flat.coords.items() if along not in c.dims}
        about = {"role": entry.role, "dtype": entry.dtype, "description": f"{entry.role} {entry.name!r}"}
        return xr.DataArray(flat.data.reshape(shape).astype(entry.read_as), coords, dims, name, about)

    def state_dict(
        self, *, order: str | None = None, seed: int | None = None, step: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Return one stored state for `module.load_state_dict`, strict.

        What is selected already, or is there only once, need not be said again.
        """
        from trajstore.storage.tensors import state_dict

        ds = self._ds
        for dim, label in (("order", order), ("seed", seed), ("snapshot", step)):
            ds = _one(ds, dim, label)
        if "stored" in ds.coords and not bool(ds["stored"]):
            there = self._ds["snapshot"].values[np.atleast_1d(_slab_mask(self._ds, order, seed))]
            at = int(ds["snapshot"])
            nearest = f"; the nearest is step {there[np.abs(there - at).argmin()]}" if len(there) else ""
            what = ", ".join(f"{dim} {ds[dim].item()!r}" for dim in ("order", "seed") if dim in ds.coords)
            raise NotFoundError(f"{what}: no state is stored for step {at}{nearest}")
        params, counters = ds["params"].values, ds["counters"].values
        return state_dict(layout_of(ds), params, counters.astype(np.int64))

    def distances(self, to: To = "start", layers: Layers = None, *, per_layer: bool = False) -> xr.DataArray:
        """Return Euclidean distances of the parameters at every snapshot, (order, seed, snapshot), lazy.

        `to` is a step, or "start" (θ₀), "last" (the slab's last stored iterate) or "previous" (the stored one before).
        `layers` gives names or globs of the parameters to take, by default all; `per_layer` gives each its own
        distance, along `layer`. Squared differences are summed in float64. NaN where nothing is stored.
        """
        statistic = distance_to(to)
        asked = PerLayer(statistic) if per_layer else statistic
        return streamed(self._ds, [asked], layers)[asked.name]

    def sketch_distances(self, to: To = "start") -> xr.DataArray:
        """Return estimates of the distances at every recorded step, (order, seed, step), lazy, from the sketch.

        The attribute `relative_error` is their relative standard deviation, over draws of the projection; it is 0 where
        the sketch is the parameters themselves. NaN where nothing is recorded.
        """
        distance_to(to)  # refuses what makes no sense
        sketch = self._ds["sketch"]
        if "step" not in sketch.dims:
            raise ConfigurationError("one step is selected, and a distance takes two: select steps as a list or slice")
        recorded = self._ds["recorded"] if "recorded" in self._ds.coords else xr.ones_like(sketch["step"], bool)
        steps = sketch["step"].values
        if not isinstance(to, str) and to not in steps:
            raise NotFoundError(f"step {to} is not among the selected steps {steps.min()} to {steps.max()}")
        if not isinstance(to, str):
            missing = recorded.any("step") & ~recorded.sel(step=to, drop=True)
            for at in np.argwhere(missing.values)[:1]:
                slab = missing[tuple(at)]
                labels = {dim: slab[dim].values for dim in ("order", "seed") if dim in slab.coords}
                where = slab_named(str(self._ds.attrs.get("experiment", "")), labels)
                raise StatisticError(f"{where}: step {to} is not recorded, so there is no distance to it")
        found = xr.apply_ufunc(
            _sketched, sketch, recorded, sketch["step"],
            input_core_dims=[["step", "component"], ["step"], ["step"]], output_core_dims=[["step"]],
            kwargs={"to": to}, vectorize=True, dask="parallelized", output_dtypes=[np.float64],
            dask_gufunc_kwargs={"allow_rechunk": True},
        )  # fmt: skip
        identity = bool(sketch.attrs.get("identity", False))
        error = 0.0 if identity else float(np.sqrt(0.5 / sketch.sizes["component"]))
        about = "distance of the parameters, estimated from their sketch; NaN where no step is recorded"
        named: xr.DataArray = found.rename(f"sketch_distance_to_{to}")
        named.attrs = {"description": about, "to": to, "relative_error": error}
        return named


def _one(ds: xr.Dataset, dim: str, label: str | int | None) -> xr.Dataset:
    """Select one label, which need not be said where there is no choice."""
    known = np.atleast_1d(ds[dim].values).tolist() if dim in ds.coords else []
    what = "step" if dim == "snapshot" else dim
    if label is not None and label not in known:
        if dim == "snapshot":
            nearest = min(known, key=lambda other: abs(other - int(label)))
            raise NotFoundError(f"no state is stored for step {label}; the nearest is step {nearest}")
        raise NotFoundError(f"no {what} {label!r} here; {choices(str(label), map(str, known))}")
    if dim not in ds.dims:
        return ds
    if label is None:
        if len(known) > 1:
            raise ConfigurationError(f"say which {what}: there are {len(known)} here")
        return ds.isel({dim: 0})
    return ds.isel({dim: known.index(label)})


def _slab_mask(ds: xr.Dataset, order: str | None, seed: int | None) -> Any:  # noqa: ANN401
    return _one(_one(ds, "order", order), "seed", seed)["stored"].values


def _sketched(
    sketch: NDArray[np.float64], recorded: NDArray[np.bool_], steps: NDArray[np.int64], *, to: To
) -> NDArray[np.float64]:
    """Return distances of one slab, (step, component) → (step)."""
    there = np.flatnonzero(recorded)
    result = np.full(len(sketch), np.nan)
    if not len(there):
        return result
    known = sketch[there]
    if to == "start":
        from_there = known  # it is the sketch of a difference to the start
    elif to == "previous":
        from_there = np.concatenate([np.full_like(known[:1], np.nan), np.diff(known, axis=0)])
    elif to == "last":
        from_there = known - known[-1]
    else:
        (at,) = np.flatnonzero(steps == to)
        from_there = known - sketch[at]
    result[there] = np.sqrt(np.vecdot(from_there, from_there))
    return result
