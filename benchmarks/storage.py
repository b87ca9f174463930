"""What it costs to store iterates and to read them: this store, files, Zarr, TensorStore, HDF5, in one run.

    python benchmarks/storage.py --iterates FOLDER [--only methods|recorder] [--method NAME …] [--repeats 5] [--json F]
    python benchmarks/storage.py --iterates FOLDER --profile

The iterates are those of the preset fig4 (a 3×300 MLP of 181,501 float32 parameters, batch 1), recorded once into
FOLDER by trajstore itself. Each method writes all forward iterates, then all backward ones, from memory into a new
folder of its own, and reads them; methods take turns, as often as `--repeats` says, and the tables have the median
and the spread over turns. A method that takes more than 10 s to write has one turn. In the first turn everything
that is read is compared bit for bit. Writing is timed from nothing to closed; "fsync" marks methods which then have
it on disk and not only in the page cache. Reading is from the page cache, and each method has as many threads as it
takes by itself.

The second part trains the same network by hand, in eager PyTorch, alone and with its iterates recorded; ratios are
to the bare loop of the same turn. `--profile` takes the stages of writing one segment apart, each alone in one thread.
Needs `pip install -e .[bench]`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import google_crc32c
import h5py
import numpy as np
import tensorstore
import torch
import torch.nn.functional as F
import zarr
from numcodecs.pcodec import PCodec
from numcodecs.zstd import Zstd
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn
from zarr.buffer import cpu
from zarr.storage import MemoryStore

import trajstore
from trajstore.engine import Iterate
from trajstore.experiment.experiment import Experiment
from trajstore.operators.state import State
from trajstore.problems.regression import Regression
from trajstore.reading.handles import open_root
from trajstore.recording.measuring import Observer, parameters_of
from trajstore.storage.format.codecs import CODECS, Codec, chunk_codecs, write_block
from trajstore.storage.format.schema import Schema
from trajstore.storage.places.folder import FolderStore
from trajstore.storage.places.place import Durability
from trajstore.storage.writing.declaring import declare
from trajstore.storage.writing.pipeline import Pipeline
from trajstore.storage.writing.segment import Observation, Segment, Spare, _transposed, array_of
from trajstore.storage.writing.slab_writer import Ledger, SlabWriter

CHUNK = 65_536
SEGMENT = 64
"""Parameters and steps of a chunk, where chunks span several steps: as this store has them."""
BLOCK = slice(CHUNK, 2 * CHUNK)
"""The parameters that are read over all time: one chunk."""
TOO_LONG = 10.0
"""Seconds of writing after which a method has no second turn."""
RANDOM_STEPS = 12
"""Steps that are read alone in each turn."""
LR = 0.05


@dataclass(frozen=True)
class Iterates:
    """Recorded iterates of one order, in memory."""

    order: str
    params: NDArray[np.float32]
    """Steps × parameters."""
    metrics: Sequence[Mapping[str, float]]
    sketches: NDArray[np.float64]
    schema: Schema
    config: Mapping[str, Any]

    @classmethod
    def recorded(cls, order: str, steps: int, folder: Path) -> Iterates:
        """Record steps 0 to `steps` − 1, or what is missing of them, and load them."""
        asked = {"name": f"{order}-{steps}", "seeds": [0], "orders": [order], "steps": steps - 1}
        folder.mkdir(parents=True, exist_ok=True)
        experiment = Experiment.preset("fig4", asked)
        stored = trajstore.run(experiment, folder / "iterates.zarr", resume=True, workers=0)
        ds = stored.dataset().isel(order=0, seed=0)
        schema = replace(stored.schema, batch_size=0)
        values = {name: ds[name].values for name in schema.metrics}
        return cls(
            order,
            np.ascontiguousarray(ds["params"].values.T),
            [{name: float(v[n]) for name, v in values.items() if not np.isnan(v[n])} for n in range(steps)],
            ds["sketch"].values,
            schema,
            stored.config,
        )

    def first(self, steps: int) -> Iterates:
        """Return the first ones."""
        schema = replace(self.schema, steps=steps - 1, snapshots=tuple(range(steps)))
        return replace(self, params=self.params[:steps], schema=schema)


class Opened(NamedTuple):
    """What has been written, to be read."""

    everything: Callable[[], NDArray[np.float32]]
    """Steps × parameters, in whatever memory order the method gives; opens it first."""
    step: Callable[[int], Any]
    """The parameters of one step, in one array or in several by name."""
    over_time: Callable[[slice], NDArray[np.float32]]
    """Steps × some parameters."""


class Method(NamedTuple):
    """A way to store iterates."""

    write: Callable[[Iterates, Path], object]
    open: Callable[[Iterates, Path], Opened]
    fsync: bool = False
    """Whether what was written is on disk at the end."""
    files: Callable[[int, int], int] | None = None
    """How many files so many steps of so many parameters make, where that is no straight line."""


def write_trajstore(its: Iterates, folder: Path, codec: Codec, durability: Durability, threads: int = 2) -> None:
    """Declare an experiment and record a slab, with the metrics and sketches that belong to it."""
    schema = replace(its.schema, codec=codec)
    group = declare(open_root(folder / "runs.zarr", durability), its.order, schema, its.config, [])
    pipeline = Pipeline(threads)
    writer = SlabWriter(Ledger(group, schema, 0, 0), pipeline)
    for n, row in enumerate(its.params):
        writer.append(Observation(n, 0, its.metrics[n], its.sketches[n], (row, np.array([n]))))
    writer.commit()
    pipeline.close()


def open_trajstore(its: Iterates, folder: Path) -> Opened:
    """Read as users do: the dataset, by dask's threads, and named arrays of one step."""

    def dataset() -> Any:  # noqa: ANN401
        return trajstore.open(folder / "runs.zarr")[its.order].dataset()["params"].isel(order=0, seed=0)

    stored, params = trajstore.open(folder / "runs.zarr")[its.order], dataset()
    return Opened(
        lambda: dataset().compute(scheduler="threads").values.T,
        lambda n: stored.arrays(order=its.order, seed=0, step=n),
        lambda some: params.isel(param=some).compute(scheduler="threads").values.T,
    )


def write_torch(its: Iterates, folder: Path) -> None:
    """Save a file a step."""
    for n, row in enumerate(its.params):
        torch.save({"params": torch.from_numpy(row)}, folder / f"{n:06}.pt")


def open_torch(its: Iterates, folder: Path) -> Opened:
    """Load whole files, or map them where only a part is wanted."""

    def load(n: int, mmap: bool = False) -> NDArray[np.float32]:
        return torch.load(folder / f"{n:06}.pt", weights_only=True, mmap=mmap)["params"].numpy()

    def over_time(some: slice) -> NDArray[np.float32]:
        return _filled((load(n, mmap=True)[some] for n in range(len(its.params))), len(its.params))

    return Opened(lambda: _filled(map(load, range(len(its.params))), len(its.params)), load, over_time)


def write_safetensors(its: Iterates, folder: Path) -> None:
    """Save a file a step."""
    for n, row in enumerate(its.params):
        save_file({"params": row}, folder / f"{n:06}.safetensors")


def open_safetensors(its: Iterates, folder: Path) -> Opened:
    """Load whole files, or slices of them."""

    def load(n: int) -> NDArray[np.float32]:
        return load_file(folder / f"{n:06}.safetensors")["params"]

    def part(n: int, some: slice) -> NDArray[np.float32]:
        with safe_open(folder / f"{n:06}.safetensors", "numpy") as file:
            return file.get_slice("params")[some]

    def over_time(some: slice) -> NDArray[np.float32]:
        return _filled((part(n, some) for n in range(len(its.params))), len(its.params))

    return Opened(lambda: _filled(map(load, range(len(its.params))), len(its.params)), load, over_time)


def write_zarr(its: Iterates, folder: Path, chunk_a_step: bool) -> None:
    """Assign one step at a time to an array of steps × parameters, created with zarr's defaults."""
    shape = its.params.shape
    chunks = (1, shape[1]) if chunk_a_step else "auto"
    array = zarr.create_array(folder / "array.zarr", shape=shape, dtype="float32", chunks=chunks)
    for n, row in enumerate(its.params):
        array[n] = row


def open_zarr(its: Iterates, folder: Path) -> Opened:
    """Index the array."""
    array = zarr.open_array(folder / "array.zarr", mode="r")
    return Opened(
        lambda: zarr.open_array(folder / "array.zarr", mode="r")[...],
        lambda n: array[n],
        lambda some: array[:, some],
    )


def default_zarr_files(steps: int, parameters: int) -> int:
    """Return how many files zarr's default chunks make; the chunks depend on the shape."""
    return 1 + zarr.create_array(MemoryStore(), shape=(steps, parameters), dtype="float32").nchunks


def _tensorstore(folder: Path, **more: Any) -> Any:  # noqa: ANN401
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / "array.zarr")}}
    return tensorstore.open({**spec, **more}).result()


def write_tensorstore(its: Iterates, folder: Path, sync: bool) -> None:
    """Write parameters × steps a segment at a time, in chunks as this store's, up to four at once."""
    steps, parameters = its.params.shape
    grid = {"name": "regular", "configuration": {"chunk_shape": [CHUNK, SEGMENT]}}
    zstd = {"name": "zstd", "configuration": {"level": 1}}
    metadata = {
        "shape": [parameters, steps],
        "data_type": "float32",
        "chunk_grid": grid,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, zstd],
    }
    array = _tensorstore(folder, context={"file_io_sync": sync}, metadata=metadata, create=True)
    under_way: list[Any] = []
    for begin in range(0, steps, SEGMENT):
        end = min(steps, begin + SEGMENT)
        under_way.append(array[:, begin:end].write(its.params[begin:end].T))
        if len(under_way) == 4:
            under_way.pop(0).result()
    for written in under_way:
        written.result()


def open_tensorstore(its: Iterates, folder: Path) -> Opened:
    """Read parameters × steps."""
    array = _tensorstore(folder)
    return Opened(
        lambda: _tensorstore(folder).read().result().T,
        lambda n: array[:, n].read().result(),
        lambda some: array[some].read().result().T,
    )


def write_hdf5(its: Iterates, folder: Path) -> None:
    """Write parameters × steps a segment at a time, whole chunks; step-major ones are four times slower and larger."""
    steps, parameters = its.params.shape
    with h5py.File(folder / "array.h5", "w") as file:
        array = file.create_dataset(
            "params", (parameters, steps), "f4", chunks=(CHUNK, SEGMENT), compression="gzip", compression_opts=1
        )
        for begin in range(0, steps, SEGMENT):
            array[:, begin : begin + SEGMENT] = its.params[begin : begin + SEGMENT].T


def open_hdf5(its: Iterates, folder: Path) -> Opened:
    """Read parameters × steps."""
    array = h5py.File(folder / "array.h5")["params"]

    def everything() -> NDArray[np.float32]:
        with h5py.File(folder / "array.h5") as file:
            return file["params"][...].T

    return Opened(everything, lambda n: array[:, n], lambda some: array[some].T)


def _filled(rows: Iterator[NDArray[np.float32]], steps: int) -> NDArray[np.float32]:
    """Return rows as one array, without keeping them all beside it."""
    first = next(rows)
    whole = np.empty((steps, len(first)), first.dtype)
    whole[0] = first
    for n, row in enumerate(rows, 1):
        whole[n] = row
    return whole


METHODS: dict[str, Method] = {
    "this store, pcodec": Method(
        partial(write_trajstore, codec="pcodec", durability="segment"), open_trajstore, fsync=True
    ),
    "this store, pcodec, no fsync": Method(partial(write_trajstore, codec="pcodec", durability="none"), open_trajstore),
    "this store, portable": Method(
        partial(write_trajstore, codec="portable", durability="segment"), open_trajstore, fsync=True
    ),
    "this store, portable, no fsync": Method(
        partial(write_trajstore, codec="portable", durability="none"), open_trajstore
    ),
    "torch.save, a file a step": Method(write_torch, open_torch),
    "safetensors, a file a step": Method(write_safetensors, open_safetensors),
    "Zarr, defaults": Method(partial(write_zarr, chunk_a_step=False), open_zarr, files=default_zarr_files),
    "Zarr, a chunk a step": Method(partial(write_zarr, chunk_a_step=True), open_zarr),
    "TensorStore, zstd 1": Method(partial(write_tensorstore, sync=True), open_tensorstore, fsync=True),
    "TensorStore, zstd 1, no fsync": Method(partial(write_tensorstore, sync=False), open_tensorstore),
    "HDF5, gzip 1": Method(write_hdf5, open_hdf5),
}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that something took, and what it returned."""
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


@contextmanager
def fresh(scratch: Path) -> Iterator[Path]:
    """Give an empty folder, when nothing that was written before is still on its way to the disk."""
    os.sync()
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        yield Path(folder)


def files_in(folder: Path) -> list[Path]:
    """Return every file."""
    return [f for f in folder.rglob("*") if f.is_file()]


def files_per_10000(method: Method, its: Iterates, scratch: Path) -> float:
    """Return how many files 10,000 steps make, from a quarter and half of these; warms the method up, too."""
    counts = {}
    for part in (4, 2):
        steps = len(its.params) // part // SEGMENT * SEGMENT
        with fresh(scratch) as folder:
            method.write(its.first(steps), folder)
            method.open(its.first(steps), folder).everything()
            counts[steps] = len(files_in(folder))
    if method.files is not None:
        return method.files(10_000, its.params.shape[1])
    (few, fewer), (many, more) = counts.items()
    return more + (more - fewer) / (many - few) * (10_000 - many)


def turn(method: Method, its: Iterates, scratch: Path, seed: int, compare: bool) -> dict[str, float]:
    """Write and read once; where it is asked for, compare every bit that was read."""
    raw = its.params.nbytes
    steps = np.random.default_rng(seed).choice(len(its.params), RANDOM_STEPS, replace=False).tolist()
    one = slice(CHUNK, CHUNK + 1)
    with fresh(scratch) as folder:
        writing, _ = timed(lambda: method.write(its, folder))
        told = {
            "write MB/s": raw / writing / 1e6,
            "ratio": raw / sum(f.stat().st_size for f in files_in(folder)),
            "seconds": writing,
        }
        os.sync()
        # Twice: a virtual machine may take milliseconds to get a megabyte that it has given back.
        method.open(its, folder).everything()
        whole, read = timed(method.open(its, folder).everything)
        told["read all MB/s"] = raw / whole / 1e6
        if compare:
            _same(read, its.params)
        del read
        opened, times = method.open(its, folder), []
        for n in steps:
            seconds, read = timed(lambda n=n: opened.step(n))
            times.append(seconds)
            if compare:
                _same(np.concatenate([np.ravel(a) for a in _parts(read)])[None], its.params[n : n + 1])
        told["step ms"] = statistics.median(times) * 1e3
        for name, some in {"block ms": BLOCK, "parameter ms": one}.items():
            seconds, read = timed(lambda some=some: opened.over_time(some))
            told[name] = seconds * 1e3
            if compare:
                _same(read, its.params[:, some])
            del read
    return told


def _parts(read: Any) -> list[NDArray[np.float32]]:  # noqa: ANN401
    return list(read.values()) if isinstance(read, Mapping) else [read]


def _same(read: NDArray[Any], written: NDArray[np.float32]) -> None:
    """Raise where a bit differs."""
    if read.dtype != written.dtype or not np.array_equal(read.view(np.uint32), written.view(np.uint32)):
        raise SystemExit(f"what was read ({read.dtype}, {read.shape}) is not what was written ({written.shape})")


def methods(given: argparse.Namespace, all_iterates: Sequence[Iterates]) -> dict[str, Any]:
    """Measure every method on forward and on backward iterates."""
    chosen = {
        name: method
        for name, method in METHODS.items()
        if not given.method or any(part.lower() in name.lower() for part in given.method)
    }
    told: dict[str, dict[str, list[dict[str, float]]]] = {its.order: {n: [] for n in chosen} for its in all_iterates}
    files = {name: files_per_10000(method, all_iterates[0], given.scratch) for name, method in chosen.items()}
    for k in range(given.repeats):
        print(f"methods: turn {k + 1} of {given.repeats}", file=sys.stderr)
        for name, method in chosen.items():
            for its in all_iterates:
                turns = told[its.order][name]
                if not turns or turns[0]["seconds"] < TOO_LONG:
                    turns.append(turn(method, its, given.scratch, k, compare=k == 0))
    for its in all_iterates:
        print(
            f"\n{len(its.params)} {its.order} iterates, {its.params.nbytes / 1e6:.0f} MB; MB/s of raw bytes;"
            " median (least–most)"
        )
        columns = {"write MB/s": 17, "ratio": 6, "read all MB/s": 18, "step ms": 17, "block ms": 19, "parameter ms": 19}
        heads = ["fsync", *columns, "files"]
        widths = [5, *columns.values(), 7]
        print(" ".join([f"{'':<30}", *(f"{h:>{w}}" for h, w in zip(heads, widths, strict=True))]))
        for name, turns in told[its.order].items():
            cells = [_spread([t[c] for t in turns]) for c in columns]
            cells[1] = f"{turns[0]['ratio']:.2f}"
            row = ["yes" if chosen[name].fsync else "no", *cells, f"{files[name]:,.0f}"]
            print(" ".join([f"{name:<30}", *(f"{c:>{w}}" for c, w in zip(row, widths, strict=True))]))
    print(
        f"step: one of {RANDOM_STEPS} random ones a turn; block: {CHUNK:,} parameters over all time;"
        " parameter: one over all time; files: in 10,000 steps"
    )
    return {"turns": told, "files_per_10000": files}


def _spread(values: Sequence[float]) -> str:
    digits = 0 if statistics.median(values) >= 100 else 1
    least, middle, most = (f"{x:.{digits}f}" for x in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({least}–{most})" if len(values) > 1 else middle


class Recorder(Protocol):
    """What a training loop calls."""

    def step(self, *, loss: float) -> None:
        """Record the iterate after a step."""
        ...


class Nothing:
    """Records nothing."""

    def step(self, *, loss: float) -> None:
        """Do nothing."""


@dataclass
class Tenth:
    """Hands every tenth step on."""

    recorder: Recorder
    _n: int = 0

    def step(self, *, loss: float) -> None:
        """Record the iterate after a step, if it is one of those."""
        self._n += 1
        if self._n % 10 == 0:
            self.recorder.step(loss=loss)


@dataclass
class TorchRecorder:
    """A file for every iterate."""

    model: nn.Module
    folder: Path
    _n: int = 0

    def step(self, *, loss: float) -> None:
        """Save the iterate after a step."""
        self._n += 1
        torch.save(self.model.state_dict(), self.folder / f"{self._n:06}.pt")


@contextmanager
def stored(model: nn.Module, folder: Path, steps: int, snapshots: int, tenth: bool) -> Iterator[Recorder]:
    """Open this store's recorder."""
    with trajstore.record(
        folder / "runs.zarr", "loop", model, steps=steps, snapshots=trajstore.every(snapshots)
    ) as rec:
        yield Tenth(rec) if tenth else rec


RECORDERS: dict[str, tuple[int, Callable[[nn.Module, Path, int], AbstractContextManager[Recorder]]]] = {
    "alone": (0, lambda model, folder, steps: nullcontext(Nothing())),
    "every iterate": (1, lambda model, folder, steps: stored(model, folder, steps, 1, False)),
    "measured each, stored every 10th": (10, lambda model, folder, steps: stored(model, folder, steps, 10, False)),
    "every 10th": (10, lambda model, folder, steps: stored(model, folder, steps // 10, 1, True)),
    "torch.save of every iterate": (1, lambda model, folder, steps: nullcontext(TorchRecorder(model, folder))),
}
"""Name → every how many iterates are stored, and what opens the recorder."""


def train(label: str, batch_size: int, steps: int, scratch: Path) -> dict[str, float]:
    """Train for some steps, and return seconds and core-seconds, from the first step until all is committed."""
    torch.manual_seed(0)
    model = Regression().module()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    inputs = 2 * torch.rand(steps, batch_size, 1) - 1
    targets = inputs**2
    with fresh(scratch) as folder, ExitStack() as recording:
        opening, rec = timed(lambda: recording.enter_context(RECORDERS[label][1](model, folder, steps)))
        begin, cores = time.perf_counter(), time.process_time()
        for x, y in zip(inputs, targets, strict=True):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            rec.step(loss=loss.item())
        recording.close()
        return {"opening": opening, "wall": time.perf_counter() - begin, "cores": time.process_time() - cores}


def recorder(given: argparse.Namespace) -> dict[str, Any]:
    """Measure what recording adds to a training step."""
    told: dict[str, Any] = {}
    for batch_size in given.batch_size:
        times: dict[str, list[dict[str, float]]] = {label: [] for label in RECORDERS}
        for label in RECORDERS:
            train(label, batch_size, 2 * SEGMENT, given.scratch)
        for _ in range(given.repeats):
            for label, runs in times.items():
                runs.append(train(label, batch_size, given.loop_steps, given.scratch))
        told[str(batch_size)] = times
        print(f"\ntraining at batch size {batch_size}, {given.loop_steps} steps; median (least–most)")
        print(f"{'':<33}{'µs a step':>18}{'× alone':>20}{'ms added an iterate':>21}{'core-ms':>9}{'opening ms':>12}")
        for label, runs in times.items():
            ratios = [r["wall"] / a["wall"] for r, a in zip(runs, times["alone"], strict=True)]
            every = RECORDERS[label][0]
            row = f"{label:<33}{_spread([r['wall'] / given.loop_steps * 1e6 for r in runs]):>18}"
            row += f"{statistics.median(ratios):>7.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
            if every:
                wall, cores = (
                    statistics.median(r[what] - a[what] for r, a in zip(runs, times["alone"], strict=True))
                    for what in ("wall", "cores")
                )
                iterates = given.loop_steps // every
                row += f"{wall / iterates * 1e3:>21.2f}{cores / iterates * 1e3:>9.2f}"
                row += f"{statistics.median(r['opening'] for r in runs) * 1e3:>12.0f}"
            print(row, flush=True)
    return told


def stages(its: Iterates, codec: Codec, scratch: Path, repeats: int) -> dict[str, float]:
    """Return nanoseconds a raw byte of each stage of a segment in the middle, alone and in one thread."""
    number = len(its.params) // SEGMENT // 2
    rows = its.params[number * SEGMENT : (number + 1) * SEGMENT]
    steps = range(number * SEGMENT, (number + 1) * SEGMENT)
    schema = replace(its.schema, codec=codec)
    memory = declare(zarr.open_group(MemoryStore(), mode="a"), its.order, schema, its.config, [])
    array, spare = array_of(memory, "params"), Spare()
    settings = chunk_codecs(codec)[0].to_dict().get("configuration", {})
    encoder = PCodec(**settings) if codec == "pcodec" else Zstd(level=1)
    blocks = [np.array(rows[:, b : b + array.chunks[2]].T, order="C") for b in range(0, rows.shape[1], array.chunks[2])]
    padded = [_padded(block, array.chunks[2]) for block in blocks]
    encoded = [encoder.encode(block) for block in padded]
    contents = [cpu.Buffer.from_bytes(bytes(content)) for content in encoded]

    def appended(spare: Spare) -> Segment:
        segment = Segment(memory, schema, (0, 0), number, spare=spare)
        for n, row in zip(steps, rows, strict=True):
            segment.append(Observation(n, 0, its.metrics[n], its.sketches[n], (row, np.array([n]))))
        return segment

    experiment = Experiment.of(its.config)
    observer, layout = Observer(experiment, schema), schema.layout
    tensors = [
        {name: torch.from_numpy(a) for name, a in layout.unflatten(row, np.zeros(0, dtype=np.int64)).items()}
        for row in (its.params[0], *rows)
    ]
    states = [State(params, {}, {}, torch.tensor(n)) for n, params in zip((0, *steps), tensors, strict=True)]
    start = parameters_of(states[0])

    def observe() -> None:
        before = start
        for n, state in zip(steps, states[1:], strict=True):
            here = parameters_of(state)
            observer.begin(Iterate(n, state, {}), 0, here, start, before)()
            before = here

    def transpose() -> None:
        for begin in range(0, rows.shape[1], array.chunks[2]):
            _transposed(rows[:, begin : begin + array.chunks[2]])

    def through_zarr() -> None:
        for k, block in enumerate(blocks):
            write_block(array, (0, 0, k * array.chunks[2], steps[0]), block[None, None])

    def save(durable: bool) -> float:
        with fresh(scratch) as folder:
            store = FolderStore(folder, durable=durable)

            def put() -> None:
                for k, content in enumerate(contents):
                    store.set_sync(f"e/params/c/0/0/{k}/{number}", content)
                store.flush()

            return timed(put)[0]

    def commit(durable: bool) -> float:
        with fresh(scratch) as folder:
            root = zarr.open_group(FolderStore(folder / "s.zarr", durable=durable), mode="a", zarr_format=3)
            ledger = Ledger(declare(root, its.order, schema, its.config, []), schema, 0, 0)
            before, written = ledger.segment(number - 1), appended(spare).cut().written()
            ledger.adopt(before.cut().written())  # the first one loads chunks of series
            return timed(lambda: ledger.adopt(written))[0]

    def digest() -> float:
        segment = appended(spare)
        seconds, _ = timed(lambda: segment.cut().written())
        segment.release()
        return seconds

    def enter(spare: Spare) -> float:
        seconds, segment = timed(lambda: appended(spare))
        segment.release()
        return seconds

    def whole(threads: int) -> float:
        with fresh(scratch) as folder:
            seconds, _ = timed(lambda: write_trajstore(its, folder, codec, "segment", threads))
            return seconds * rows.nbytes / its.params.nbytes

    alone: dict[str, Callable[[], float]] = {
        "observe": _seconds(observe),
        "copy on entry": lambda: enter(spare),
        "copy on entry, fresh memory": lambda: enter(Spare()),
        "transposition": _seconds(transpose),
        "codec": _seconds(lambda: [encoder.encode(block) for block in padded]),
        "checksum": _seconds(lambda: [google_crc32c.value(bytes(content)) for content in encoded]),
        "codec, checksum, zarr": _seconds(through_zarr),
        "digest": digest,
        "files": lambda: save(False),
        "files, fsync": lambda: save(True),
        "series and record": lambda: commit(False),
        "series and record, fsync": lambda: commit(True),
        "whole, 1 encoder": lambda: whole(1),
        "whole, 2 encoders": lambda: whole(2),
    }
    return _medians(alone, repeats, rows.nbytes)


def reading_stages(its: Iterates, codec: Codec, scratch: Path, repeats: int) -> dict[str, float]:
    """Return nanoseconds a raw byte of reading everything, and of its parts, each alone."""
    with fresh(scratch) as folder:
        write_trajstore(its, folder, codec, "segment")
        os.sync()
        stored = trajstore.open(folder / "runs.zarr")[its.order]
        array = array_of(stored.group, "params")
        params = stored.dataset()["params"].isel(order=0, seed=0)
        files = files_in(folder / "runs.zarr" / its.order / "params" / "c")
        contents = [file.read_bytes()[:-4] for file in files]
        decoder, block = PCodec() if codec == "pcodec" else Zstd(), np.empty(array.chunks[2:], np.float32)
        alone: dict[str, Callable[[], object]] = {
            "files": lambda: [file.read_bytes() for file in files],
            "checksum": lambda: [google_crc32c.value(content) for content in contents],
            "codec, memory used again": lambda: [decoder.decode(content, out=block) for content in contents],
            "codec, fresh memory": lambda: [decoder.decode(content) for content in contents],
            "fresh memory for the result": lambda: np.empty_like(its.params).fill(0),
            "zarr: array[0, 0]": lambda: array[0, 0],
            "dataset, one thread": lambda: params.compute(scheduler="synchronous"),
            "dataset, threads": lambda: params.compute(scheduler="threads"),
        }
        return _medians({name: _seconds(work) for name, work in alone.items()}, repeats, its.params.nbytes)


def _padded(block: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    return np.pad(block, ((0, length - len(block)), (0, 0)), constant_values=np.nan)  # as zarr does at an edge


def _seconds(work: Callable[[], object]) -> Callable[[], float]:
    return lambda: timed(work)[0]


def _medians(alone: Mapping[str, Callable[[], float]], repeats: int, size: int) -> dict[str, float]:
    """Return nanoseconds a byte of each, in turns, after one that does not count."""
    turns = [{name: seconds() for name, seconds in alone.items()} for _ in range(repeats + 1)][1:]
    return {name: statistics.median(t[name] for t in turns) / size * 1e9 for name in alone}


def profile(given: argparse.Namespace, all_iterates: Sequence[Iterates]) -> dict[str, Any]:
    """Take writing and reading apart."""
    torch.set_num_threads(1)
    told: dict[str, Any] = {}
    for codec in CODECS:
        for its in all_iterates:
            writing = stages(its, codec, given.scratch, given.repeats)
            reading = reading_stages(its, codec, given.scratch, given.repeats)
            told[f"{codec}, {its.order}"] = {"writing": writing, "reading": reading}
    rows = _rows_of_writing({name: t["writing"] for name, t in told.items()})
    rows += [("", None), ("reading everything, by parts", None)]
    rows += [(f"  {part}", [t["reading"][part] for t in told.values()]) for part in reading]
    print(f"\n{'ns a raw byte, median of ' + str(given.repeats):<52}" + "".join(f"{name:>20}" for name in told))
    for label, values in rows:
        print(f"{label:<52}" + "".join(f"{v:>20.3f}" for v in values or ()))
    return told


def _rows_of_writing(told: Mapping[str, Mapping[str, float]]) -> list[tuple[str, list[float] | None]]:
    """Arrange the stages: those that add up, their sum, and what was measured of the whole."""

    def row(first: str, *less: str) -> list[float]:
        return [t[first] - sum(t[name] for name in less) for t in told.values()]

    series, both = "series and record", "codec, checksum, zarr"
    caller = {"copy on entry": row("copy on entry")}
    encoder = {
        "transposition": row("transposition"),
        "codec": row("codec"),
        "checksum (CRC-32C)": row("checksum"),
        "zarr's part of it, by difference": row(both, "codec", "checksum"),
        "files": row("files"),
        "their fsync, by difference": row("files, fsync", "files"),
    }
    committer = {
        "digest (SHA-256)": row("digest"),
        "series and record": row(series),
        "their fsync, by difference": row(f"{series}, fsync", series),
    }
    rows: list[tuple[str, list[float] | None]] = [("writing one segment, each stage alone, one thread", None)]
    total = [0.0] * len(told)
    for who, parts in {"caller": caller, "encoders": encoder, "committer": committer}.items():
        rows += [(f"  {who}: {part}", values) for part, values in parts.items()]
        sums = [sum(column) for column in zip(*parts.values(), strict=True)]
        rows += [(f"  {who} together", sums)] if len(parts) > 1 else []
        total = [a + b for a, b in zip(total, sums, strict=True)]
    return [
        *rows,
        ("all of these", total),
        ("all segments as they are written, one encoder", row("whole, 1 encoder")),
        ("all segments as they are written, two encoders", row("whole, 2 encoders")),
        ("copy on entry into fresh memory instead", row("copy on entry, fresh memory")),
        ("before the writer: flattening, norms, sketch", row("observe")),
    ]


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--iterates", type=Path, required=True, help="where iterates are, or will be, recorded")
    arguments.add_argument("--forward", type=int, default=640, help="how many forward iterates")
    arguments.add_argument("--backward", type=int, default=256, help="how many backward iterates")
    arguments.add_argument("--only", choices=["methods", "recorder"])
    arguments.add_argument("--method", action="append", help="part of a method's name; repeatable")
    arguments.add_argument("--batch-size", type=int, action="append", help="of the training loop; repeatable")
    arguments.add_argument("--loop-steps", type=int, default=1280)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, in the loop")
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--profile", action="store_true", help="only where the time of writing and reading goes")
    arguments.add_argument(
        "--scratch", type=Path, default=tempfile.gettempdir(), help="a folder on the disk to measure"
    )
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    given.batch_size = given.batch_size or [1, 32, 256]
    torch.set_num_threads(given.threads)
    if min(given.forward, given.backward) < 4 * SEGMENT:
        arguments.error(f"--forward and --backward must be at least {4 * SEGMENT}")
    names = ["torch", "numpy", "zarr", "numcodecs", "pcodec", "safetensors", "tensorstore", "h5py"]
    versions = {name: version(name) for name in names}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch with {torch.get_num_threads()} threads"
    print(", ".join(f"{name} {v}" for name, v in versions.items()) + f"\n{machine}; scratch in {given.scratch}")
    told: dict[str, Any] = {"versions": versions, "machine": machine}
    parts = ["profile"] if given.profile else [given.only] if given.only else ["methods", "recorder"]
    orders = {"forward": given.forward, "backward": given.backward}
    all_iterates = [Iterates.recorded(o, n, given.iterates) for o, n in orders.items()] if parts != ["recorder"] else []
    for part in parts:
        if part == "recorder":
            told[part] = recorder(given)
        else:
            told[part] = {"methods": methods, "profile": profile}[part](given, all_iterates)
    if given.json:
        given.json.write_text(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
