"""The xarray view: labelled, lazy, and only what is committed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from trajstore.storage.schema import late_records

if TYPE_CHECKING:
    from trajstore.store import StoredExperiment

__all__ = ["dataset"]

_TASK_BYTES = 64 * 2**20


def dataset(experiment: StoredExperiment) -> xr.Dataset:
    """Return an experiment as a lazy Dataset; what is not committed is NaN, −1 or 0.

    The coordinate `recorded` marks the steps that were computed and committed, `stored` the snapshots.
    """
    schema = experiment.schema
    # A dask task holds whole chunks, several where they are small: one task a chunk would drown in tasks.
    row = schema.snapshots_per_segment * schema.layout.dtype.itemsize
    along_param = max(1, _TASK_BYTES // row)
    chunk = min(65_536, schema.layout.size("params"))
    # Read the records first and the data after: what they vouch for is then on disk.
    commits = experiment.commits()
    opened = xr.open_zarr(
        str(experiment.store.path),
        group=experiment.name,
        consolidated=False,
        chunks={"param": max(chunk, along_param // chunk * chunk), "snapshot": schema.snapshots_per_segment},
    )
    fills = {spec.name: spec.fill for spec in schema.arrays()}
    recorded = xr.DataArray(commits.steps, dims=("order", "seed", "step"))
    stored = xr.DataArray(commits.snapshots, dims=("order", "seed", "snapshot"))
    late = experiment.late()
    records = ["committed", *map(late_records, late)]
    shown = opened.drop_vars(records).assign_coords(recorded=recorded, stored=stored)
    for name, (known, _) in late.items():
        mask = xr.DataArray(known, dims=("order", "seed", "step"))
        shown[name] = shown[name].where(mask).assign_attrs(shown[name].attrs)
    for name, variable in shown.data_vars.items():
        if name in late:
            continue
        for mask in (recorded, stored):
            if set(mask.dims) <= set(variable.dims) and not bool(mask.all()):
                nothing = np.asarray(fills[str(name)], dtype=variable.dtype)
                shown[name] = variable.where(mask, nothing).assign_attrs(variable.attrs)
    labels = {name: shown[name].compute() for name in ("init_seed", "data_seed")}
    metric = experiment.config["record"].get("adaptive")
    adaptive = {"adaptive": metric} if metric else {}
    labelled: xr.Dataset = shown.assign_coords(labels).assign_attrs(experiment=experiment.name, **adaptive)
    return labelled
