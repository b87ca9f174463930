"""The xarray view: labelled, lazy, and only what is committed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import xarray as xr

from trajstore import accessor as accessor  # registers `ds.traj`
from trajstore.storage.schema import ArraySpec, late_records
from trajstore.storage.segment import array_of
from trajstore.storage.states import States

if TYPE_CHECKING:
    from trajstore.store import StoredExperiment

__all__ = ["dataset"]

_TASK_BYTES = 16 * 2**20


def dataset(experiment: StoredExperiment) -> xr.Dataset:
    """Return an experiment as a lazy Dataset; what is not committed is NaN, −1 or 0.

    The coordinate `recorded` marks the steps that were computed and committed, `stored` the snapshots.
    """
    schema = experiment.schema
    # Read the records first and the data after: what they vouch for is then on disk.
    commits, late = experiment.commits(), experiment.late()
    masks: dict[str, tuple[tuple[str, ...], Any]] = {
        "recorded": (("order", "seed", "step"), commits.steps),
        "stored": (("order", "seed", "snapshot"), commits.snapshots),
    }
    hidden = {"committed", *map(late_records, late)}
    # Array by array, and no longer than the schema: while an experiment grows, some are longer than others.
    variables = {
        spec.name: xr.Variable(spec.dims, _lazy(experiment, spec), _attributes(experiment, spec))
        for spec in schema.arrays()
        if spec.name not in hidden
    }
    labels = {
        name: (dim, np.array(values.tolist()) if name == "order" else values, {"description": what})
        for name, (dim, values, what) in schema.coordinates().items()
    }
    shown = xr.Dataset(variables, {**labels, **masks})
    fills = {spec.name: spec.fill for spec in schema.arrays()}
    known = {name: there for name, (there, _) in late.items()}
    for name, variable in shown.data_vars.items():
        for mask in (shown.recorded, shown.stored):
            there = mask.copy(data=known[str(name)]) if name in known and mask.name == "recorded" else mask
            if set(mask.dims) <= set(variable.dims) and not bool(there.all()):
                nothing = np.asarray(fills[str(name)], dtype=variable.dtype)
                shown[name] = variable.where(there, nothing).assign_attrs(variable.attrs)
    metric = experiment.config["record"].get("adaptive")
    adaptive = {"adaptive": metric} if metric else {}
    described: xr.Dataset = shown.assign_attrs(trajstore=experiment.attributes, experiment=experiment.name, **adaptive)
    return described


def _lazy(experiment: StoredExperiment, spec: ArraySpec) -> Any:  # noqa: ANN401  dask has no types
    """Return an array in tasks of whole chunks, several where they are small: one task a chunk would drown in tasks."""
    array, schema = experiment.array(spec), experiment.schema
    chunks = dict(zip(spec.dims, spec.chunks, strict=True))
    if spec.kind == "params":
        task = _TASK_BYTES // (schema.snapshots_per_segment * array.dtype.itemsize)
        chunks["param"] = max(chunks["param"], task // chunks["param"] * chunks["param"])
    lengths = schema.lengths()
    source: Any = States.of(experiment.store.place, array, schema.codec) if spec.kind == "params" else array
    # A name of its own: the array's contents change while it is recorded.
    whole: Any = da.from_array(source, chunks=tuple(chunks[d] for d in spec.dims), name=False, inline_array=True)  # type: ignore[no-untyped-call]
    return whole[tuple(slice(0, lengths[dim]) for dim in spec.dims)]


def _attributes(experiment: StoredExperiment, spec: ArraySpec) -> dict[str, Any]:
    return dict(array_of(experiment.group, spec.name).attrs)
