"""Whole slabs as plain NumPy arrays: a folder of `.npy` files, and `layout.json`, which names everything in them.

Only what is committed is written: a row is a recorded step, or a stored state. States go from the store's chunks
into files that are mapped into memory, a segment at a time.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import zarr
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from trajstore._common.atomic import whole_folder
from trajstore.errors import damage_told
from trajstore.exchange.export import Slab, check_outside, origin, slabs_of
from trajstore.storage.format.metrics import start_of
from trajstore.storage.states import States
from trajstore.storage.writing.late_metrics import LateSeries
from trajstore.storage.writing.segment import array_of
from trajstore.store import StoredExperiment

__all__ = ["LAYOUT_FILE", "export_arrays"]

LAYOUT_FILE = "layout.json"

_ABOUT = (
    "Read a file with numpy.load(FILE, mmap_mode='r', allow_pickle=False). A tensor is "
    "row[offset : offset + product of shape].reshape(shape) of a row of params, or of counters."
)
_ARRAYS = {
    "params": (["snapshot", "param"], "flat states; `params` names the tensors in a row"),
    "counters": (["snapshot", "counter"], "the integers of these states; `counters` names the tensors in a row"),
    "snapshots": (["snapshot"], "the step of each row of params and counters"),
    "steps": (["step"], "the step of each row of leg, metrics, measured and sketch"),
    "leg": (["step"], "start step of the leg that made the iterate"),
    "metrics": (["step", "metric"], "`metrics` names the columns; NaN where not measured, or diverged"),
    "measured": (["step", "metric"], "whether it was measured: tells a diverged NaN from no value"),
    "sketch": (["step", "component"], "projection of the parameters' difference to {start}"),
}
_BATCHES = (["batch", "example"], "one file a seed, for all orders: the examples in B_1, B_2, ...")
_BLOCK_BYTES = 64 * 2**20


def export_arrays(
    experiment: StoredExperiment,
    folder: Path,
    *,
    orders: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    force: bool = False,
) -> None:
    """Write what is committed as NumPy arrays, one a file."""
    check_outside(experiment, folder)
    with whole_folder(folder, force=force, ours=_is_export) as partial:
        slabs = slabs_of(experiment, orders, seeds)
        written = [_write_slab(partial, experiment, slab) for slab in slabs]
        batches = _write_batches(partial, experiment, sorted({slab.corner[1] for slab in slabs}))
        layout = json.dumps(_layout(experiment, written, batches), indent=2, ensure_ascii=False)
        (partial / LAYOUT_FILE).write_text(layout + "\n", encoding="utf-8")


def _write_slab(folder: Path, experiment: StoredExperiment, slab: Slab) -> dict[str, Any]:
    """Write the arrays of one slab, and return what the layout says of it."""
    schema, group = experiment.schema, experiment.group
    label = f"{quote(slab.order, safe='+@')}.{slab.seed}"  # a name that no file system minds
    files = {name: f"{label}.{name}.npy" for name in _ARRAYS}
    paths = {name: folder / file for name, file in files.items()}
    steps = np.flatnonzero(slab.recorded)
    snapshots = np.array(schema.snapshots, dtype=np.int64)[slab.stored]
    with damage_told(slab.where):
        for name in ("params", "counters"):
            array = array_of(group, name)
            source = States.of(experiment.store.place, array, schema.codec) if name == "params" else array
            _write_states(paths[name], array, source, slab, schema.snapshots_per_segment)
        _write_metrics(paths["metrics"], paths["measured"], experiment, slab)
        _write_sketch(paths["sketch"], array_of(group, "sketch"), slab)
        for name, values in {"snapshots": snapshots, "steps": steps, "leg": _series(group, "leg", slab)}.items():
            np.save(paths[name], values, allow_pickle=False)
    return {
        "order": slab.order,
        "seed": slab.seed,
        "complete": slab.complete,
        "last_step": int(steps[-1]),
        "steps": len(steps),
        "snapshots": len(snapshots),
        "files": files,
    }


def _write_states(
    file: Path, array: zarr.Array[Any], source: zarr.Array[Any] | States, slab: Slab, segment: int
) -> None:
    """Write (snapshot × element): a segment at a time, and of large states some chunks at a time."""
    chunk, width = array.chunks[2], array.shape[2]
    along = max(chunk, _BLOCK_BYTES // (segment * array.dtype.itemsize) // chunk * chunk)
    out, row = _new_array(file, (int(slab.stored.sum()), width), array.dtype), 0
    for first in range(0, len(slab.stored), segment):
        kept = slab.stored[first : first + segment]
        end = row + int(kept.sum())
        for begin in range(0, width if end > row else 0, along):
            block = np.asarray(source[(*slab.corner, slice(begin, begin + along), slice(first, first + len(kept)))])
            out[row:end, begin : begin + along] = block[:, kept].T
        row = end


def _write_metrics(metrics: Path, measured: Path, experiment: StoredExperiment, slab: Slab) -> None:
    """Write (step × metric), a column at a time: the values, and whether they were measured; late ones come last."""
    schema, group = experiment.schema, experiment.group
    shape = (int(slab.recorded.sum()), len(schema.metrics) + len(schema.late))
    values, flags = _new_array(metrics, shape, np.dtype(np.float64)), _new_array(measured, shape, np.dtype(np.bool_))
    bits = _series(group, "measured", slab)
    for bit, name in enumerate(schema.metrics):
        flags[:, bit] = bits >> bit & 1
        values[:, bit] = np.where(flags[:, bit], _series(group, name, slab), np.nan)
    for column, name in enumerate(schema.late, len(schema.metrics)):
        known, late = LateSeries(group, schema, slab.corner, name).read()
        flags[:, column], values[:, column] = known[slab.recorded], late[slab.recorded]


def _write_sketch(file: Path, array: zarr.Array[Any], slab: Slab) -> None:
    """Write (step × component), some chunks of steps at a time."""
    out, row = _new_array(file, (int(slab.recorded.sum()), array.shape[3]), array.dtype), 0
    along = _rows_of_a_block(array, 2)
    for first in range(0, len(slab.recorded), along):
        kept = slab.recorded[first : first + along]
        end = row + int(kept.sum())
        out[row:end] = np.asarray(array[(*slab.corner, slice(first, first + len(kept)))])[kept]
        row = end


def _write_batches(folder: Path, experiment: StoredExperiment, seeds: Sequence[int]) -> dict[int, str]:
    """Write (batch × example) for seeds at these positions, and return seed → file; none where batches are noise."""
    schema, written = experiment.schema, dict[int, str]()
    for k in seeds if schema.batch_size else ():
        seed = schema.seeds[k]
        written[seed] = f"batch_index.{seed}.npy"
        with damage_told(f"experiment {experiment.name!r}, seed {seed}"):
            array = array_of(experiment.group, "batch_index")
            out = _new_array(folder / written[seed], (schema.steps, schema.batch_size), array.dtype)
            along = _rows_of_a_block(array, 1)
            for first in range(0, schema.steps, along):
                out[first : first + along] = np.asarray(array[k, first : min(first + along, schema.steps)])
    return written


def _layout(
    experiment: StoredExperiment, slabs: Sequence[Mapping[str, Any]], batches: Mapping[int, str]
) -> dict[str, Any]:
    """Return what names everything that was written."""
    schema, stored = experiment.schema, experiment.attributes
    seeds = zip(schema.seeds, schema.init_seeds, schema.data_seeds, strict=True)
    tensors: dict[str, list[dict[str, Any]]] = {"params": [], "counters": []}
    for entry in map(asdict, schema.layout.entries):
        tensors[entry.pop("array")].append(entry)
    return {
        "about": _ABOUT,
        **origin(experiment),
        "config": stored["config"],
        "fills": stored["fills"],
        "arrays": {
            name: {"dimensions": dimensions, "about": what.format(start=start_of(schema.made_by))}
            for name, (dimensions, what) in (_ARRAYS | ({"batch_index": _BATCHES} if batches else {})).items()
        },
        "slabs": list(slabs),
        "seeds": [
            {"seed": seed, "init_seed": init, "data_seed": data, "batch_index": batches.get(seed)}
            for seed, init, data in seeds
            if any(slab["seed"] == seed for slab in slabs)
        ],
        "metrics": [
            {"name": m, "examples": schema.metrics.get(m), "late": m in schema.late, "about": schema.about(m)}
            for m in (*schema.metrics, *schema.late)
        ],
        **tensors,
        "tied": dict(schema.layout.tied),
        "sketch": {"seed": schema.sketch_seed, "identity": schema.components == schema.layout.parameters},
    }


def _is_export(folder: Path) -> bool:
    """Tell whether a folder holds nothing but what was exported before."""
    try:
        layout = json.loads((folder / LAYOUT_FILE).read_text(encoding="utf-8"))
        named = {file for slab in layout["slabs"] for file in slab["files"].values()}
        named |= {LAYOUT_FILE, *(seed["batch_index"] for seed in layout["seeds"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return all(file.name in named and file.is_file() for file in folder.iterdir())


def _series(group: zarr.Group, name: str, slab: Slab) -> NDArray[Any]:
    """Return one number a recorded step."""
    return np.asarray(array_of(group, name)[(*slab.corner, slice(0, len(slab.recorded)))])[slab.recorded]


def _rows_of_a_block(array: zarr.Array[Any], axis: int) -> int:
    """Return how many rows along an axis to hold in memory: whole chunks."""
    chunk, row = array.chunks[axis], max(1, array.shape[-1]) * array.dtype.itemsize
    return max(chunk, _BLOCK_BYTES // row // chunk * chunk)


def _new_array(file: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return a new file as an array, its place on the disk taken.

    Writing to mapped memory that has no place on a full disk would end the process.
    """
    array: NDArray[Any] = open_memmap(file, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as opened:
            try:
                os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot promise
                    raise
    return array
