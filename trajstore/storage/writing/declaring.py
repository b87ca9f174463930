"""Declare: the one place that decides shapes.

An experiment's arrays are created at their full size; chunks that nobody wrote cost nothing. Later they may grow, by
orders, seeds, steps and metrics, and never shrink. Writers of slabs do not resize anything. The group's attribute is
written last, so that what was declared is what it says: a group without it was never declared, and arrays that are
longer than it says are the work of a declaration that died.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from trajstore.errors import damage_told
from trajstore.storage.format.codecs import chunk_codecs
from trajstore.storage.format.digest import config_digest
from trajstore.storage.format.schema import FORMAT, ArraySpec, Schema
from trajstore.storage.places.place import Keeper
from trajstore.storage.writing.resume_slots import GROUP
from trajstore.storage.writing.segment import array_of

__all__ = ["ATTRIBUTE", "batch_digest", "declare", "grow", "set_attributes", "sound_attributes", "stored_batches"]

ATTRIBUTE = "trajstore"
_LABELS = 65_536
"""Labels in a chunk of a coordinate."""
_SHORT = [ZstdCodec(level=3), Crc32cCodec()]


def declare(
    root: zarr.Group, name: str, schema: Schema, config: Mapping[str, Any], batch_index: Sequence[NDArray[np.int64]]
) -> zarr.Group:
    """Create an experiment with all its arrays. Hold the declaration's lock.

    `batch_index` has one (batch, example) array for each seed.
    """
    if isinstance(root.store, Keeper):
        root.store.remove(name)  # what a declaration that died left
    # Marked until it is whole: a group with this mark may be replaced.
    group = root.create_group(name, attributes={ATTRIBUTE: {"declaring": True}})
    _flush(group)
    group.create_group(GROUP)
    lengths = schema.lengths()
    for spec in schema.arrays():
        _create(group, spec, schema, lengths)
    for label, (dim, values, what) in schema.coordinates().items():
        array = group.create_array(
            label, shape=values.shape, dtype=values.dtype, chunks=(_LABELS,), dimension_names=(dim,),
            compressors=_SHORT, attributes={"description": what}, config={"write_empty_chunks": True},
        )  # fmt: skip
        array[...] = values
    if schema.batch_size:
        for position, indices in enumerate(batch_index):
            array_of(group, "batch_index")[position] = indices
    group.attrs["coordinates"] = "init_seed data_seed"  # CF: xarray shows them as coordinates of `seed`
    _flush(group)
    set_attributes(
        group, {"format": FORMAT, **_declared(schema, config, batch_index), "id": uuid.uuid4().hex, "fills": []}
    )
    return group


def grow(
    group: zarr.Group, schema: Schema, config: Mapping[str, Any], batch_index: Sequence[NDArray[np.int64]]
) -> None:
    """Let an experiment grow to a schema that begins as its own does. Hold the declaration's lock."""
    before, lengths = Schema.of(group), schema.lengths()
    known_before = {spec.name for spec in before.arrays()}
    for spec in schema.arrays():
        if spec.name not in known_before and spec.name not in group:  # there it is if growing died
            _create(group, spec, schema, lengths)
            continue
        array = array_of(group, spec.name)
        array.resize(tuple(lengths[dim] for dim in spec.dims))
        if spec.attributes.get("flag_masks") is not None:
            array.update_attributes(dict(spec.attributes))
    if schema.batch_size:
        stored = array_of(group, "batch_index")
        for position, indices in enumerate(batch_index):
            known = before.steps if position < len(before.seeds) else 0
            if known < schema.steps:
                if known:
                    stored_batches(group, before, position)  # or a chunk that is missing would be begun anew
                stored[position, known:] = indices[known:]
    for label, (_, values, _) in schema.coordinates().items():
        array = array_of(group, label)
        known = before.coordinates()[label][1].shape[0]
        with damage_told(f"experiment {group.basename!r}: the coordinate {label!r}"):
            array.resize(values.shape)
            if known < len(values):
                array[known:] = values[known:]
    attributes: Any = group.attrs[ATTRIBUTE]
    _flush(group)
    set_attributes(group, {**attributes, **_declared(schema, config, batch_index)})


def set_attributes(group: zarr.Group, attributes: Mapping[str, Any]) -> None:
    """Replace what is stored beside the arrays, with a digest of it. Hold the declaration's lock."""
    rest = {key: value for key, value in attributes.items() if key != "digest"}
    group.attrs[ATTRIBUTE] = rest | {"digest": config_digest(rest)}
    _flush(group)


def sound_attributes(attributes: Mapping[str, Any]) -> bool:
    """Tell whether attributes are what their digest says."""
    rest = {key: value for key, value in attributes.items() if key != "digest"}
    return bool(attributes.get("digest") == config_digest(rest))


def _flush(group: zarr.Group) -> None:
    if isinstance(group.store, Keeper):
        group.store.flush()


def batch_digest(indices: NDArray[np.int64]) -> str:
    """Return the SHA-256 of one seed's batch indices as little-endian int64."""
    return "sha256:" + hashlib.sha256(np.ascontiguousarray(indices, dtype="<i8").tobytes()).hexdigest()


def stored_batches(group: zarr.Group, schema: Schema, position: int) -> NDArray[np.int64]:
    """Return (batch, example) of the seed at a position, if they are what was declared."""
    attributes: Any = group.attrs[ATTRIBUTE]
    where = f"experiment {group.basename!r}, seed {schema.seeds[position]}: the record of its batches"
    with damage_told(where, "restore it from a copy"):
        found = np.asarray(array_of(group, "batch_index")[position, : schema.steps])
        if batch_digest(found) != attributes["batch_digests"][position]:
            raise ValueError("a chunk is missing, or not what was declared")
    return found


def _declared(schema: Schema, config: Mapping[str, Any], batch_index: Sequence[NDArray[np.int64]]) -> dict[str, Any]:
    return {
        "config": config,
        "config_digest": config_digest(config),
        "schema": schema.to_json(),
        "batch_digests": [batch_digest(indices) for indices in batch_index] if schema.batch_size else [],
    }


def _create(group: zarr.Group, spec: ArraySpec, schema: Schema, lengths: Mapping[str, int]) -> None:
    serializer, compressors = chunk_codecs(schema.codec) if spec.kind == "params" else (BytesCodec(), _SHORT)
    group.create_array(
        spec.name,
        shape=tuple(lengths[dim] for dim in spec.dims),
        chunks=spec.chunks,
        dtype=spec.dtype,
        fill_value=spec.fill,
        dimension_names=spec.dims,
        serializer=serializer,
        compressors=compressors,
        attributes={"description": spec.about, **spec.attributes},
        config={"write_empty_chunks": True},
    )
