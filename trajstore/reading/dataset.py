"""The xarray view: labelled, lazy, and only what is committed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from threading import Lock
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import dask.array
import dask.threaded
import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray

from trajstore._common.unpromised import GoneError
from trajstore.errors import damage_told
from trajstore.reading import accessor as accessor
from trajstore.reading.origin import ORIGIN, origin_of
from trajstore.storage.format.metrics import training_mark
from trajstore.storage.format.schema import ArraySpec, Schema, late_records
from trajstore.storage.states import States

if TYPE_CHECKING:
    from trajstore._common.unpromised import ExplicitIndexer
    from trajstore.reading.handles import ExperimentHandle, StoreHandle

__all__ = ["dataset", "datatree", "opened"]

_TASK_BYTES = 16 * 2**20
_BITS = 63
"""Of `measured`, besides the sign."""


def _forget_threads() -> None:
    """Have dask begin threads of its own in a fork: those of its parent are not there, and would be waited for."""
    dask.threaded.default_pool = None
    dask.threaded.pools.clear()
    dask.threaded.pools_lock = Lock()


os.register_at_fork(after_in_child=_forget_threads)


def dataset(experiment: ExperimentHandle) -> xr.Dataset:
    """Return an experiment as a lazy Dataset of dask arrays; what is not committed is NaN, −1 or 0.

    The coordinate `recorded` marks the steps that were computed and committed, `stored` the snapshots.
    """
    ds = opened(experiment)
    # Names of their own: the arrays' contents change while they are recorded.
    return ds.assign(
        {
            name: variable.variable.chunk(
                variable.encoding["preferred_chunks"], name=f"{name}-{uuid4().hex}", inline_array=True
            )
            for name, variable in ds.data_vars.items()
        }
    )


def datatree(store: StoreHandle) -> xr.DataTree:
    """Return a store as a tree: a node an experiment."""
    tree: xr.DataTree = xr.DataTree.from_dict({name: dataset(store[name]) for name in store})
    return tree


def opened(experiment: ExperimentHandle) -> xr.Dataset:
    """Return an experiment as a Dataset that reads what is asked for, when it is asked for, without dask."""
    # Read the records first and the data after: what they vouch for is then on disk.
    commits, late = experiment.commits(), experiment.late()
    schema = experiment.schema.until(experiment.progress(commits).steps)
    length, places = schema.steps + 1, len(schema.snapshots)
    late = {name: (known[..., :length], values[..., :length]) for name, (known, values) in late.items()}
    masks = {
        "recorded": (("order", "seed", "step"), commits.steps[..., :length]),
        "stored": (("order", "seed", "snapshot"), commits.snapshots[..., :places]),
    }
    hidden = {"committed", *map(late_records, late)}
    variables = {}
    for spec in schema.arrays():
        if spec.name in hidden:
            continue
        mask = (("order", "seed", "step"), late[spec.name][0]) if spec.name in late else None
        mask = mask or next((mask for mask in masks.values() if {*mask[0]} <= {*spec.dims}), None)
        encoding = {"preferred_chunks": _chunks(schema, spec)}
        source = _Committed.of(experiment, schema, spec, mask)
        attributes = _attributes({"description": spec.about, **spec.attributes})
        if f"{spec.name}_samples" in late:  # computed afterwards
            attributes["mode"] = "train" if training_mark(spec.name) in late else "eval"
        if spec.name == "measured" and late and len(schema.metrics) < _BITS:
            source, attributes = _with_late(source, attributes, {name: known for name, (known, _) in late.items()})
        variables[spec.name] = xr.Variable(spec.dims, _lazy(source, spec, encoding), attributes, encoding)
    labels = {
        name: (dim, np.array(values.tolist()) if name == "order" else values, {"description": what})
        for name, (dim, values, what) in schema.coordinates().items()
    }
    metric = experiment.config["record"].get("adaptive")
    adaptive = {"adaptive": metric} if metric else {}
    attrs = {ORIGIN: origin_of(experiment), "experiment": experiment.name, **adaptive}
    return xr.Dataset(variables, {**labels, **masks}, attrs)


def _lazy(source: _Committed, spec: ArraySpec, encoding: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Return an array that is read when it is asked for."""
    try:
        from trajstore._common.unpromised import LazilyIndexedArray
    except GoneError as gone:
        warnings.warn(str(gone), stacklevel=3)
        chunks = tuple(encoding["preferred_chunks"][dim] for dim in spec.dims)
        return dask.array.from_array(source, chunks)  # type: ignore[no-untyped-call]
    return LazilyIndexedArray(source)


def _attributes(declared: Mapping[str, Any]) -> dict[str, Any]:
    """Return an array's attributes as every file format holds them: none that is None, and yes and no as numbers."""
    told = {name: value for name, value in declared.items() if value is not None}
    return {name: int(value) if isinstance(value, bool) else value for name, value in told.items()}


def _with_late(
    measured: _Committed, attributes: Mapping[str, Any], late: Mapping[str, NDArray[np.bool_]]
) -> tuple[_Committed, dict[str, Any]]:
    """Give late metrics bits behind the others', as long as there are any."""
    names = str(attributes["flag_meanings"]).split()
    added = dict(zip(range(len(names), _BITS), late.items(), strict=False))
    bits = sum((known.astype(np.int64) << bit for bit, (_, known) in added.items()), np.int64(0))
    names += [name for name, _ in added.values()]
    flags = {"flag_masks": [1 << bit for bit in range(len(names))], "flag_meanings": " ".join(names)}
    return replace(measured, added=np.asarray(bits)), {**attributes, **flags}


def _chunks(schema: Schema, spec: ArraySpec) -> Mapping[str, int]:
    """Return tasks of whole chunks, several where they are small: one task a chunk would drown in tasks."""
    lengths = schema.lengths()
    chunks = dict(zip(spec.dims, spec.chunks, strict=True))
    if spec.kind == "params":
        task = _TASK_BYTES // (schema.snapshots_per_segment * np.dtype(spec.dtype).itemsize)
        chunks["param"] = max(chunks["param"], task // chunks["param"] * chunks["param"])
    return {dim: min(chunk, max(1, lengths[dim])) for dim, chunk in chunks.items()}


@dataclass(frozen=True)
class _Committed(BackendArray):
    """An array as far as it counts. It may be longer on disk: while an experiment grows, some are before others, and a
    training loop has room for more steps than it takes."""

    source: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: float | int
    there: NDArray[np.bool_] | None
    """Along all its dimensions, with length 1 where it makes no difference; None where all of it counts."""
    what: str
    """As a message names it."""
    added: NDArray[np.int64] | None = None
    """Bits that are not stored in it."""

    @classmethod
    def of(
        cls,
        experiment: ExperimentHandle,
        schema: Schema,
        spec: ArraySpec,
        mask: tuple[tuple[str, ...], NDArray[np.bool_]] | None,
    ) -> _Committed:
        array = experiment.array(spec)
        source: Any = States.of(experiment.store.place, array, schema.codec) if spec.kind == "params" else array
        lengths = schema.lengths()
        there = None
        if mask is not None and not mask[1].all():
            there = np.expand_dims(mask[1], tuple(at for at, dim in enumerate(spec.dims) if dim not in mask[0]))
        shape, what = tuple(lengths[dim] for dim in spec.dims), f"experiment {experiment.name!r}: {spec.name!r}"
        return cls(source, shape, array.dtype, spec.fill, there, what)

    def __getitem__(self, key: ExplicitIndexer | tuple[slice | int, ...]) -> Any:  # noqa: ANN401
        if isinstance(key, tuple):  # dask asks so
            return self._read(key)
        from trajstore._common.unpromised import IndexingSupport, explicit_indexing_adapter

        return explicit_indexing_adapter(key, self.shape, IndexingSupport.BASIC, self._read)

    def _read(self, key: tuple[slice | int, ...]) -> NDArray[Any]:
        where = tuple(
            slice(*part.indices(n)) if isinstance(part, slice) else part
            for part, n in zip(key, self.shape, strict=True)
        )
        with damage_told(self.what):
            found: NDArray[Any] = np.asarray(self.source[where])
        if self.there is not None:
            found = self._counted(found, where)
        return found if self.added is None else found | self.added[where]

    def _counted(self, found: NDArray[Any], where: tuple[slice | int, ...]) -> NDArray[Any]:
        assert self.there is not None
        counts = self.there[
            tuple(
                part if n > 1 else 0 if isinstance(part, int | np.integer) else slice(None)
                for part, n in zip(where, self.there.shape, strict=True)
            )
        ]
        return found if counts.all() else np.where(counts, found, np.asarray(self.fill, found.dtype))
