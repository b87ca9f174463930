"""Export: what is committed, as files that other programs read.

One state as safetensors, the metrics as Parquet, whole slabs as plain NumPy arrays. A file, or a folder of arrays,
is written under a temporary name in the same folder and takes its own name when it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import zarr
from numpy.typing import NDArray

from trajstore.errors import (
    NotFoundError,
    choices,
)
from trajstore.measures import about
from trajstore.storage.schema import Schema
from trajstore.store import StoredExperiment

__all__ = ["LAYOUT_FILE", "export_arrays", "export_metrics", "export_state"]

LAYOUT_FILE = "layout.json"
"""What names the arrays of a folder."""

_MARK = "trajstore_arrays"
_BLOCK_BYTES = 64 * 2**20
_DIMENSIONS = {
    "params": (("snapshot", "param"), "flat states; `params` below names the parts of a row"),
    "counters": (("snapshot", "counter"), "integers of the states; `counters` below names the parts of a row"),
    "snapshots": (("snapshot",), "the step of each row of params and counters"),
    "steps": (("step",), "the step of each row of leg, metrics, measured and sketch"),
    "leg": (("step",), "start step of the leg that made the iterate"),
    "metrics": (("step", "metric"), "`metrics` below names the columns; NaN where not measured, or diverged"),
    "measured": (("step", "metric"), "whether the metric was measured: tells a diverged NaN from no value"),
    "sketch": (("step", "component"), "projection of the parameters' difference to step 0"),
    "batch_index": (("batch", "example"), "the examples in B_1, B_2, …: one file a seed, for all orders"),
}


def export_state(
    experiment: StoredExperiment, file: Path, *, order: str, seed: int, step: int, force: bool = False
) -> None:
    """Write one stored state as safetensors, for `module.load_state_dict`, strict."""
    from safetensors.torch import save

    with _whole_file(experiment, file, force) as partial:
        with _reading(f"experiment {experiment.name!r}, order {order!r}, seed {seed}, step {step}"):
            tensors = experiment.state_dict(order=order, seed=seed, step=step)
        for name in experiment.schema.layout.tied:
            tensors[name] = tensors[name].clone()  # safetensors refuses tensors that share their memory
        # "pt" is what other readers of safetensors look for.
        where = {"format": "pt", **_origin(experiment), "order": order, "seed": str(seed), "step": str(step)}
        partial.write_bytes(_with_metadata(save(tensors), where))


def export_metrics(
    experiment: StoredExperiment,
    file: Path,
    *,
    orders: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    force: bool = False,
) -> None:
    """Write committed metrics as one Parquet file: not measured is NULL, diverged is NaN."""
    import duckdb

    from trajstore.sql import _literal, _write_slab

    with _whole_file(experiment, file, force) as partial, _temporary_folder(partial) as folder:
        parts = []
        for k, slab in enumerate(_slabs(experiment, orders, seeds)):
            parts.append(str(folder / f"{k}.parquet"))
            with _reading(slab.where), _database_errors(file):
                _write_slab(Path(parts[-1]), experiment, slab.order, slab.seed, *slab.corner, slab.recorded)
        told = ", ".join(f"{key}: {_literal(value)}" for key, value in _origin(experiment).items())
        with _database_errors(file), duckdb.connect() as connection:
            connection.read_parquet(parts).create_view("slabs")
            connection.execute(f"COPY slabs TO {_literal(str(partial))} (FORMAT parquet, KV_METADATA {{{told}}})")


def export_arrays(
    experiment: StoredExperiment,
    folder: Path,
    *,
    orders: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    force: bool = False,
) -> None:
    """Write whole slabs as `.npy` files, one an array, and `layout.json`, which names everything in them."""
    with _whole_folder(experiment, folder, force) as partial:
        slabs = _slabs(experiment, orders, seeds)
        written = [_write_slab_arrays(partial, experiment, slab) for slab in slabs]
        batches = _write_batches(partial, experiment, {slab.corner[1] for slab in slabs})
        told = json.dumps(_layout(experiment, written, batches), indent=2, ensure_ascii=False)
        (partial / LAYOUT_FILE).write_text(told + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Slab:
    """What is committed of one (order, seed)."""

    experiment: str
    order: str
    seed: int
    corner: tuple[int, int]
    recorded: NDArray[np.bool_]
    """(step)."""
    stored: NDArray[np.bool_]
    """(snapshot)."""
    complete: bool

    @property
    def where(self) -> str:
        return f"experiment {self.experiment!r}, order {self.order!r}, seed {self.seed}"

    def file(self, array: str) -> str:
        """Return a name that no file system minds."""
        return f"{quote(self.order, safe='+@')}.{self.seed}.{array}.npy"


def _slabs(experiment: StoredExperiment, orders: Sequence[str] | None, seeds: Sequence[int] | None) -> list[_Slab]:
    """Return the slabs of which something is committed."""
    schema, name = experiment.schema, experiment.name
    rows = _positions(name, "order", schema.orders, orders)
    columns = _positions(name, "seed", schema.seeds, seeds)
    commits = experiment.commits()
    found = [
        _Slab(
            name, schema.orders[i], schema.seeds[k], (i, k),
            commits.steps[i, k], commits.snapshots[i, k], bool(commits.complete[i, k]),
        )
        for i in rows
        for k in columns
        if commits.steps[i, k].any()
    ]  # fmt: skip
    if not found:
        of = "".join(
            f", {what} {', '.join(map(repr, wanted))}"
            for what, wanted in (("order", orders), ("seed", seeds))
            if wanted
        )
        raise NotFoundError(f"experiment {name!r}{of}: nothing is recorded yet; go on with --resume")
    return found


def _positions(experiment: str, what: str, known: Sequence[Any], wanted: Sequence[Any] | None) -> list[int]:
    for label in wanted or ():
        if label not in known:
            hint = choices(str(label), map(str, known))
            raise NotFoundError(f"experiment {experiment!r} has no {what} {label!r}; {hint}")
    return [k for k, label in enumerate(known) if wanted is None or label in wanted]


def _origin(experiment: StoredExperiment) -> dict[str, str]:
    """Return what tells a reader of the file where it comes from."""
    stored = experiment.attributes
    return {
        "trajstore_format": str(stored["format"]),
        "experiment": experiment.name,
        "config_digest": stored["config_digest"],
    }


def _with_metadata(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """Add metadata in this order: safetensors' own is a different one each time, and so would the bytes be."""
    length = int.from_bytes(content[:8], "little")
    header = json.dumps({"__metadata__": metadata} | json.loads(content[8 : 8 + length])).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([len(header).to_bytes(8, "little"), header, memoryview(content)[8 + length :]])


def _write_slab_arrays(folder: Path, experiment: StoredExperiment, slab: _Slab) -> dict[str, Any]:
    """Write the arrays of one slab, and return what the layout says of it."""
    schema, group, files = experiment.schema, experiment.group, {name: slab.file(name) for name in _DIMENSIONS}
    del files["batch_index"]
    paths = {name: folder / file for name, file in files.items()}
    steps = np.flatnonzero(slab.recorded)
    snapshots = np.array(schema.snapshots, dtype=np.int64)[slab.stored]
    with _reading(slab.where):
        for states in ("params", "counters"):
            _write_states(paths[states], _array(group, states), slab, schema.snapshots_per_segment)
        np.save(paths["snapshots"], snapshots, allow_pickle=False)
        np.save(paths["steps"], steps, allow_pickle=False)
        np.save(paths["leg"], _series(group, "leg", slab), allow_pickle=False)
        _write_metrics(paths["metrics"], paths["measured"], group, schema, slab)
        _write_sketch(paths["sketch"], _array(group, "sketch"), slab)
    return {
        "order": slab.order,
        "seed": slab.seed,
        "complete": slab.complete,
        "last_step": int(steps[-1]),
        "steps": len(steps),
        "snapshots": len(snapshots),
        "files": files,
    }


def _write_states(file: Path, array: zarr.Array[Any], slab: _Slab, segment: int) -> None:
    """Write (snapshot × element), a segment at a time, and of wide states some chunks at a time."""
    chunk, width = array.chunks[2], array.shape[2]
    along = max(chunk, _BLOCK_BYTES // (segment * array.dtype.itemsize) // chunk * chunk)
    out = _new_array(file, (int(slab.stored.sum()), width), array.dtype)
    row = 0
    for first in range(0, len(slab.stored), segment):
        kept = slab.stored[first : first + segment]
        end = row + int(kept.sum())
        for begin in range(0, width if end > row else 0, along):
            block = np.asarray(array[(*slab.corner, slice(begin, begin + along), slice(first, first + len(kept)))])
            out[row:end, begin : begin + along] = block[:, kept].T
        row = end
    out.flush()


def _write_metrics(metrics: Path, measured: Path, group: zarr.Group, schema: Schema, slab: _Slab) -> None:
    """Write (step × metric), a column at a time: the values, and whether they were measured."""
    shape = (int(slab.recorded.sum()), len(schema.metrics))
    values, flags = _new_array(metrics, shape, np.dtype(np.float64)), _new_array(measured, shape, np.dtype(np.bool_))
    bits = _series(group, "measured", slab)
    for bit, name in enumerate(schema.metrics):
        values[:, bit] = _series(group, name, slab)
        flags[:, bit] = bits >> bit & 1
    values.flush()
    flags.flush()


def _write_sketch(file: Path, array: zarr.Array[Any], slab: _Slab) -> None:
    """Write (step × component), some chunks of steps at a time."""
    out = _new_array(file, (int(slab.recorded.sum()), array.shape[3]), array.dtype)
    row, along = 0, _rows_of_a_block(array, 2)
    for first in range(0, len(slab.recorded), along):
        kept = slab.recorded[first : first + along]
        end = row + int(kept.sum())
        if end > row:
            out[row:end] = np.asarray(array[(*slab.corner, slice(first, first + len(kept)))])[kept]
        row = end
    out.flush()


def _write_batches(folder: Path, experiment: StoredExperiment, seeds: set[int]) -> dict[int, str]:
    """Write (batch × example) for these positions of seeds, and return seed → file; nothing where batches are noise."""
    schema, written = experiment.schema, {}
    for k in sorted(seeds) if schema.batch_size else ():
        seed = schema.seeds[k]
        written[seed] = f"batch_index.{seed}.npy"
        with _reading(f"experiment {experiment.name!r}, seed {seed}"):
            array = _array(experiment.group, "batch_index")
            out = _new_array(folder / written[seed], (schema.steps, schema.batch_size), array.dtype)
            along = _rows_of_a_block(array, 1)
            for first in range(0, schema.steps, along):
                out[first : first + along] = np.asarray(array[k, first : min(first + along, schema.steps)])
            out.flush()
    return written


def _layout(
    experiment: StoredExperiment, slabs: Sequence[Mapping[str, Any]], batches: Mapping[int, str]
) -> dict[str, Any]:
    """Return what names everything that was written."""
    schema, stored = experiment.schema, experiment.attributes
    entries = [asdict(entry) for entry in schema.layout.entries]
    arrays = {name: a for name, a in _DIMENSIONS.items() if name != "batch_index" or batches}
    return {
        "about": "One .npy file an array, each for numpy.load(FILE, mmap_mode='r', allow_pickle=False). "
        "A tensor of a state is row[offset : offset + product of shape].reshape(shape).",
        _MARK: 1,
        **_origin(experiment),
        "config": stored["config"],
        "fills": stored["fills"],
        "arrays": {name: {"dimensions": dims, "about": what} for name, (dims, what) in arrays.items()},
        "slabs": list(slabs),
        "seeds": [
            {"seed": seed, "init_seed": init, "data_seed": data, "batch_index": batches.get(seed)}
            for seed, init, data in zip(schema.seeds, schema.init_seeds, schema.data_seeds, strict=True)
            if any(slab["seed"] == seed for slab in slabs)
        ],
        "metrics": [
            {"name": name, "examples": examples, "about": about(name, examples)}
            for name, examples in schema.metrics.items()
        ],
        **{
            vector: [{k: v for k, v in entry.items() if k != "array"} for entry in entries if entry["array"] == vector]
            for vector in ("params", "counters")
        },
        "tied": dict(schema.layout.tied),
        "sketch": {"seed": schema.sketch_seed, "identity": schema.components == schema.layout.parameters},
    }


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array


def _series(group: zarr.Group, name: str, slab: _Slab) -> NDArray[Any]:
    """Return one number a recorded step."""
    return np.asarray(_array(group, name)[(*slab.corner, slice(0, len(slab.recorded)))])[slab.recorded]


def _rows_of_a_block(array: zarr.Array[Any], axis: int) -> int:
    """Return how many rows along an axis to hold in memory: whole chunks."""
    chunk, width = array.chunks[axis], array.shape[-1]
    return max(chunk, _BLOCK_BYTES // max(1, width * array.dtype.itemsize) // chunk * chunk)


def _new_array(file: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]: ...
