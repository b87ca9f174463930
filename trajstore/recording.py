"""Run an experiment: the engine's iterates into the store's slabs.

The one place where `engine` and `storage` meet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from trajstore.configuration import differences
from trajstore.engine import Engine, Iterate
from trajstore.engine.reference import ReferenceEngine
from trajstore.engine.walk import applications, walk
from trajstore.errors import ConfigurationError, ConflictError
from trajstore.experiment import Experiment
from trajstore.orders import Leg, Order
from trajstore.problems import NamesOfModule
from trajstore.provenance import now, provenance
from trajstore.state import State
from trajstore.storage.layout import Entry, Layout
from trajstore.storage.locks import lock
from trajstore.storage.reader import Commits
from trajstore.storage.schema import Schema, declare, segment_length
from trajstore.storage.sketch import Sketch
from trajstore.storage.writer import SlabWriter
from trajstore.store import Store, StoredExperiment, check_writable, open_root

__all__ = ["Cost", "Device", "cost", "run"]

Device = Literal["auto", "cpu", "cuda"]
Progress = Callable[[int, str], None]
"""Called with operator applications done since the last call, and what is being recorded."""


@dataclass(frozen=True)
class Cost:
    """What a recording takes."""

    applications: int
    """Operator applications over all seeds; an upper bound where legs depend on a metric."""
    exact: bool
    iterates: int
    snapshots: int
    raw_bytes: int
    """Stored states before compression."""
    seconds: float


def run(
    experiment: Experiment,
    path: str | Path,
    *,
    resume: bool = False,
    device: Device = "auto",
    progress: Progress | None = None,
) -> StoredExperiment:
    """Record an experiment into a store, and return it as stored.

    An experiment that exists already needs ``resume=True`` and an equal configuration: slabs that are
    complete are skipped, others done again.
    """
    where = _device(device)
    store = Store(path)
    config = experiment.config()
    check_writable(store)
    with lock(store.locks / "declare.lock", f"store {path}", patience=60):
        root = open_root(path)
        existing = root.get(experiment.name)
        if isinstance(existing, zarr.Group) and "trajstore" in existing.attrs:
            _refuse_unless_same(existing, experiment.name, config, resume)
            group, schema = existing, Schema.of(existing)
        else:
            live = experiment.problem.build(where)
            schema = _schema(experiment, live)
            streams = [live.batches(seed) for seed in schema.data_seeds] if schema.batch_size else []
            indices = [np.stack([s.examples(i) for i in range(1, experiment.steps + 1)]) for s in streams]
            group = declare(root, experiment.name, schema, config, indices)
    stored = StoredExperiment(store, group)
    complete = Commits.of(group, schema).complete
    missing = [
        (position, [order for k, order in enumerate(experiment.orders) if not complete[k, position]])
        for position in range(len(experiment.seeds))
    ]
    if any(orders for _, orders in missing):
        began = now()
        for position, orders in missing:
            if orders:
                _fill(stored, group, schema, experiment, position, orders, where, progress)
        _note_fill(store, group, {"began": began, "ended": now(), "engine": "reference", **provenance(where)})
    return stored


def cost(experiment: Experiment, device: Device = "auto") -> Cost:
    """Say what a recording will take, after timing a few operator applications here."""
    live = experiment.problem.build(_device(device))
    schema = _schema(experiment, live)
    slabs = len(experiment.orders) * len(experiment.seeds)
    total = applications(experiment.orders, experiment.steps, experiment.grid) * len(experiment.seeds)
    iterates = len(experiment.grid) * slabs
    engine = ReferenceEngine(live, experiment.operator, experiment.init_seeds[0], experiment.seeds[0])
    per_application, per_iterate = _timings(engine)
    states = len(experiment.snapshots) * slabs
    return Cost(
        applications=total,
        exact=not any(order.metrics for order in experiment.orders),
        iterates=iterates,
        snapshots=states,
        raw_bytes=states * schema.layout.size("params") * schema.layout.dtype.itemsize,
        seconds=total * per_application + iterates * per_iterate,
    )


def _timings(engine: Engine, seconds: float = 1.0) -> tuple[float, float]:
    """Return seconds per application and per evaluated iterate: chains of length 1 against chains of 21."""
    origin, leg = engine.start(), Leg("backward")
    list(engine.iterates(leg, origin, [1, 2, 3]))  # warm up

    def timed(n: int) -> float:
        best, end = float("inf"), time.perf_counter() + seconds / 2
        while time.perf_counter() < end or best == float("inf"):
            begin = time.perf_counter()
            list(engine.iterates(leg, origin, [n]))
            best = min(best, time.perf_counter() - begin)
        return best

    short, long = timed(1), timed(21)
    per_application = max(long - short, 0.0) / 20
    return per_application, max(short - per_application, 0.0)


def _fill(
    stored: StoredExperiment,
    group: zarr.Group,
    schema: Schema,
    experiment: Experiment,
    position: int,
    orders: Sequence[Order],
    device: torch.device,
    progress: Progress | None,
) -> None:
    """Record the given orders of one seed."""
    seed = schema.seeds[position]
    with ExitStack() as locks:
        for order in orders:
            what = f"experiment {experiment.name!r}, order {str(order)!r}, seed {seed}"
            locks.enter_context(lock(stored.slab_lock(str(order), seed), what))
        writers = {order: SlabWriter(group, schema, schema.orders.index(str(order)), position) for order in orders}
        live = experiment.problem.build(device)
        engine: Engine = ReferenceEngine(
            live, experiment.operator, schema.init_seeds[position], schema.data_seeds[position]
        )
        if progress is not None:
            engine = _Metered(engine, progress, seed)
        flatten = _Flatten(schema.layout)
        sketch = Sketch(schema.layout.parameters, experiment.record.sketch, schema.sketch_seed)
        snapshots = frozenset(schema.snapshots)
        origin: NDArray[np.float64] | None = None
        for visit in walk(orders, experiment.steps, experiment.grid, engine):
            n, state, metrics = visit.iterate
            vector, counters = flatten(state)
            theta = vector[: schema.layout.parameters].astype(np.float64)
            origin = theta if origin is None else origin
            projection = sketch(theta - origin)
            for order in visit.orders:
                writers[order].append(
                    n, visit.leg_start, metrics, projection, (vector, counters) if n in snapshots else None
                )
        for writer in writers.values():
            writer.commit()


class _Metered:
    """An engine that tells how far it is."""

    def __init__(self, engine: Engine, progress: Progress, seed: int) -> None:
        self._engine, self._progress, self._seed = engine, progress, seed
        self.start = engine.start

    def iterates(self, leg: Leg, last: Iterate, steps: Sequence[int]) -> Iterator[Iterate]:
        done = last.step
        for iterate in self._engine.iterates(leg, last, steps):
            self._progress(
                leg.applications([iterate.step], done),
                f"seed {self._seed}, {leg.kind} to step {iterate.step}",
            )
            done = iterate.step
            yield iterate


class _Flatten:
    """States to the flat vectors of a layout."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._dtype = torch.float64 if layout.dtype == np.float64 else torch.float32

    def __call__(self, state: State) -> tuple[NDArray[Any], NDArray[np.int64]]:
        parts: dict[str, list[torch.Tensor]] = {"params": [], "counters": []}
        tensors = {(role, name): tensor for role, name, tensor in _tensors(state, memory=True)}
        for entry in self._layout.entries:
            parts[entry.array].append(tensors[entry.role, entry.name].reshape(-1))
        params = torch.cat([t.to(self._dtype) for t in parts["params"]])
        counters = torch.cat([t.to(torch.int64) for t in parts["counters"]])
        return params.numpy(force=True), counters.numpy(force=True)


def _tensors(
    state: State, memory: bool
) -> Iterator[tuple[Literal["parameter", "buffer", "memory", "position"], str, torch.Tensor]]:
    for name, tensor in state.params.items():
        yield "parameter", name, tensor
    for name, tensor in state.buffers.items():
        yield "buffer", name, tensor
    for slot, tensors in state.memory.items() if memory else ():
        for name, tensor in tensors.items():
            yield "memory", f"{slot}/{name}", tensor
    yield "position", "position", state.position


def _schema(experiment: Experiment, live: Any) -> Schema:  # noqa: ANN401
    engine = ReferenceEngine(live, experiment.operator, experiment.init_seeds[0], experiment.seeds[0])
    tied, transient = (live.tied, live.transient) if isinstance(live, NamesOfModule) else ({}, frozenset())
    entries = [
        Entry(
            name,
            role,
            tuple(t.shape),
            str(t.dtype).removeprefix("torch."),
            in_state_dict=name not in transient,
        )
        for role, name, t in _tensors(engine.start().state, experiment.record.optimizer_state)
    ]
    layout = Layout.of(entries, tied)
    return Schema(
        orders=tuple(map(str, experiment.orders)),
        seeds=experiment.seeds,
        init_seeds=experiment.init_seeds,
        data_seeds=experiment.seeds,
        steps=experiment.steps,
        snapshots=experiment.snapshots,
        layout=layout,
        metrics=live.examples,
        components=min(experiment.record.sketch, layout.parameters),
        batch_size=live.batches(experiment.seeds[0]).batch_size,
        codec=experiment.record.codec,
        snapshots_per_segment=segment_length(layout),
    )


def _device(device: Device) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device 'cuda': this torch sees no GPU; use 'cpu' or 'auto'")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _refuse_unless_same(group: zarr.Group, name: str, config: dict[str, Any], resume: bool) -> None:
    stored: Any = group.attrs["trajstore"]
    if found := differences(stored["config"], config):
        raise ConflictError(
            f"experiment {name!r} is stored already and differs in {'; '.join(found)} (stored / asked for); "
            "choose another --name"
        )
    if not resume:
        raise ConflictError(
            f"experiment {name!r} is stored already with this configuration; "
            "give --resume to go on with it, or another --name"
        )


def _note_fill(store: Store, group: zarr.Group, fill: dict[str, Any]) -> None:
    with lock(store.locks / "declare.lock", f"store {store.path}", patience=60):
        attributes: Any = dict(zarr.open_group(group.store, path=group.path, mode="r").attrs)["trajstore"]
        group.attrs["trajstore"] = attributes | {"fills": [*attributes["fills"], fill]}
