"""Run an experiment: the engine's iterates into the store's slabs.

The one place where `engine` and `storage` meet.
"""

from __future__ import annotations

import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from trajstore.configuration import differences
from trajstore.engine import Engine, Iterate, Work
from trajstore.engine.compiling import missing_for_compiling
from trajstore.engine.plan import EngineChoice, Plan, choose, ready
from trajstore.engine.walk import Slab, applications, walk
from trajstore.errors import ConfigurationError, ConflictError, SlowPlanWarning
from trajstore.experiment import Experiment
from trajstore.operators import Operator
from trajstore.orders import Leg
from trajstore.plans import remembered
from trajstore.problems import LiveProblem, NamesOfModule
from trajstore.provenance import now, provenance
from trajstore.state import State, beginning
from trajstore.storage.layout import Entry, Layout
from trajstore.storage.locks import lock
from trajstore.storage.reader import Commits
from trajstore.storage.schema import Schema, check_metric_names, declare, segment_length
from trajstore.storage.sketch import Sketch
from trajstore.storage.writer import SlabWriter
from trajstore.store import Store, StoredExperiment, check_writable, open_root, standing

__all__ = ["Cost", "Device", "cost", "refuse_conflict", "run"]

Device = Literal["auto", "cpu", "cuda"]
_LITTLE = 5_000
"""Operator applications that are over before a calibration would be."""
_BUFFER_BYTES = 2**30
"""What the unfinished segments of the slabs that are recorded together may take."""
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
    """Everything stored, before compression."""
    seconds: float
    plan: Plan


def run(
    experiment: Experiment,
    path: str | Path,
    *,
    resume: bool = False,
    engine: EngineChoice = "auto",
    lanes: int | None = None,
    device: Device = "auto",
    progress: Progress | None = None,
) -> StoredExperiment:
    """Record an experiment into a store, and return it as stored.

    An experiment that exists already needs ``resume=True`` and an equal configuration: slabs that are
    complete are skipped, others done again, by the plan that the recording began with. `lanes` fixes the width of
    the wave.
    """
    where = _device(device)
    live, config, store = experiment.problem.build(where), experiment.config(), Store(path)
    schema = _schema(experiment, live)  # everything that can be wrong with the request comes before the first byte
    check_writable(store)
    with lock(store.locks / "declare.lock", f"store {path}", patience=60):
        root = open_root(path)
        _refuse_foreign(store, experiment.name)
        if experiment.name in store:
            _refuse_unless_same(store[experiment.name], config, schema, resume)
        else:
            streams = [live.batches(seed) for seed in schema.data_seeds] if schema.batch_size else []
            indices = [np.stack([s.examples(i) for i in range(1, experiment.steps + 1)]) for s in streams]
            declare(root, experiment.name, schema, config, indices)
    group = zarr.open_group(root.store, path=experiment.name, mode="r+")
    stored = StoredExperiment(store, group)
    complete = Commits.of(group, schema).complete
    missing = [
        [Slab(order, k) for i, order in enumerate(experiment.orders) if not complete[i, k]]
        for k in range(len(experiment.seeds))
    ]
    if not any(missing):
        return store[experiment.name]
    seeds = list(zip(schema.init_seeds, schema.data_seeds, strict=True))
    plan = _stored_plan(stored, engine, lanes) or plan_for(experiment, live, schema, engine, lanes)
    plan, computing = ready(plan, live, experiment.operator, seeds)
    if plan.slowed:
        warnings.warn(f"experiment {experiment.name!r}: {plan}", SlowPlanWarning, stacklevel=2)
    if progress is not None:
        computing = _Metered(computing, progress, schema.seeds)
    for together in _waves(plan, experiment, schema, missing):
        with _noted(stored, together, {"plan": plan.to_json(), **provenance(where)}):
            _fill(stored, experiment, together, computing)
    return store[experiment.name]


def plan_for(
    experiment: Experiment, live: LiveProblem, schema: Schema, engine: EngineChoice = "auto", lanes: int | None = None
) -> Plan:
    """Choose how to compute an experiment here."""
    seeds = list(zip(schema.init_seeds, schema.data_seeds, strict=True))
    total = applications(experiment.orders, experiment.steps, experiment.grid) * len(seeds)
    chains = len(experiment.grid) * len(experiment.orders) * len(seeds)

    def choice() -> Plan:
        state_bytes = _state_bytes(live, experiment.operator, seeds[0][0])
        return choose(live, experiment.operator, seeds, total, chains, state_bytes, engine)

    question = {"config": experiment.config() | {"name": None}, "engine": engine}
    little = engine == "auto" and total <= _LITTLE
    plan = Plan("reference", reason="little work") if little else remembered(question, choice)
    return plan if lanes is None or plan.engine == "reference" else replace(plan, lanes=lanes)


def _stored_plan(stored: StoredExperiment, engine: EngineChoice, lanes: int | None) -> Plan | None:
    """Return the plan of the last fill, unless another is asked for."""
    fills = stored.attributes["fills"]
    plan = Plan.from_json(fills[-1]["plan"]) if fills else None
    if plan is None or engine not in ("auto", plan.engine) or lanes not in (None, plan.lanes):
        return None
    if plan.compiled and missing_for_compiling():
        return replace(plan, compiled=False)
    return plan


def _waves(
    plan: Plan, experiment: Experiment, schema: Schema, missing: Sequence[Sequence[Slab]]
) -> Iterator[list[Slab]]:
    """Group slabs to be recorded together: whole seeds, as many as fill the lanes and fit into memory.

    A seed at a time commits earliest, so more of them share a wave only where one would leave lanes idle: a
    forward leg cannot be split, so its length bounds how soon a wave can end.
    """
    a_seed = max(1, applications(experiment.orders, experiment.steps, experiment.grid))
    enough = 1 if plan.lanes == 1 else -(-8 * plan.lanes * experiment.steps // a_seed)
    a_slab = schema.layout.row_bytes * min(schema.snapshots_per_segment, len(schema.snapshots))
    fits = max(1, _BUFFER_BYTES // max(1, a_slab * len(experiment.orders)))
    together = min(enough, fits)
    seeds = [slabs for slabs in missing if slabs]
    for start in range(0, len(seeds), together):
        yield [slab for slabs in seeds[start : start + together] for slab in slabs]


def _state_bytes(live: LiveProblem, operator: Operator, init_seed: int) -> int:
    params, buffers = live.initial(init_seed)
    tensors = _tensors(beginning(params, buffers, operator.memory(params)), memory=True)
    return sum(t.numel() * t.element_size() for _, _, t in tensors)


def refuse_conflict(experiment: Experiment, path: Path, resume: bool) -> None:
    """Raise what `run` would raise because of what is stored already."""
    store = Store(path)
    if experiment.name in store:
        schema = _schema(experiment, experiment.problem.build(torch.device("cpu")))
        _refuse_unless_same(store[experiment.name], experiment.config(), schema, resume)


def cost(
    experiment: Experiment, device: Device = "auto", engine: EngineChoice = "auto", lanes: int | None = None
) -> Cost:
    """Say what a recording will take, after timing a few operator applications here."""
    live = experiment.problem.build(_device(device))
    schema = _schema(experiment, live)
    slabs = len(experiment.orders) * len(experiment.seeds)
    total = applications(experiment.orders, experiment.steps, experiment.grid) * len(experiment.seeds)
    iterates = len(experiment.grid) * slabs
    plan = plan_for(experiment, live, schema, engine, lanes)
    seeds = list(zip(schema.init_seeds, schema.data_seeds, strict=True))
    begin = time.perf_counter()
    plan, computing = ready(plan, live, experiment.operator, seeds)
    getting_ready = time.perf_counter() - begin
    per_application, per_iterate = _timings(computing, plan.lanes)
    states = len(experiment.snapshots) * slabs
    return Cost(
        applications=total,
        exact=not any(order.metrics for order in experiment.orders),
        iterates=iterates,
        snapshots=states,
        raw_bytes=states * schema.layout.row_bytes + schema.series_bytes(len(experiment.grid)),
        seconds=getting_ready + total * per_application + iterates * per_iterate,
        plan=plan,
    )


def _timings(engine: Engine, lanes: int, seconds: float = 1.0) -> tuple[float, float]:
    """Return seconds per application and per evaluated iterate, from waves of short and of longer chains."""
    origin = engine.start(0)

    def timed(n: int) -> float:
        best, end = float("inf"), time.perf_counter() + seconds / 2
        while time.perf_counter() < end or best == float("inf"):
            begin = time.perf_counter()
            # As many chains of the same length as there are lanes.
            for _ in engine.run([Work(0, Leg("backward"), origin, [n])] * lanes):
                pass
            best = min(best, time.perf_counter() - begin)
        return best / lanes

    timed(1)
    short, long = timed(1), timed(21)
    per_application = max(long - short, 0.0) / 20
    return per_application, max(short - per_application, 0.0)


def _fill(stored: StoredExperiment, experiment: Experiment, slabs: Sequence[Slab], engine: Engine) -> None:
    """Record slabs, together."""
    schema = stored.schema
    with ExitStack() as locks:
        for order, position in slabs:
            seed = schema.seeds[position]
            what = f"experiment {experiment.name!r}, order {str(order)!r}, seed {seed}"
            locks.enter_context(lock(stored.slab_lock(str(order), seed), what))
        writers = {
            slab: SlabWriter(stored.group, schema, schema.orders.index(str(slab.order)), slab.seed) for slab in slabs
        }
        flatten = _Flatten(schema.layout)
        sketch = Sketch(schema.layout.parameters, experiment.record.sketch, schema.sketch_seed)
        snapshots = frozenset(schema.snapshots)
        origin: dict[int, NDArray[np.float64]] = {}
        for visit in walk(slabs, experiment.steps, experiment.grid, engine):
            n, state, metrics = visit.iterate
            vector, counters = flatten(state)
            theta = vector[: schema.layout.parameters].astype(np.float64)
            projection = sketch(theta - origin.setdefault(visit.slabs[0].seed, theta))
            for slab in visit.slabs:
                writers[slab].append(
                    n, visit.leg_start, metrics, projection, (vector, counters) if n in snapshots else None
                )
        for writer in writers.values():
            writer.commit()


class _Metered:
    """An engine that tells how far it is."""

    def __init__(self, engine: Engine, progress: Progress, seeds: Sequence[int]) -> None:
        self._engine, self._progress, self._seeds = engine, progress, seeds
        self.start = engine.start

    def run(self, works: Sequence[Work]) -> Iterator[tuple[int, Iterate]]:
        done = [work.last.step for work in works]
        for k, iterate in self._engine.run(works):
            leg = works[k].leg
            where = f"seed {self._seeds[works[k].seed]}, {leg.kind} to step {iterate.step}"
            self._progress(leg.applications([iterate.step], done[k]), where)
            done[k] = iterate.step
            yield k, iterate


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


def _schema(experiment: Experiment, live: LiveProblem) -> Schema:
    params, buffers = live.initial(experiment.init_seeds[0])
    start = beginning(params, buffers, experiment.operator.memory(params))
    tied, transient = (live.tied, live.transient) if isinstance(live, NamesOfModule) else ({}, frozenset())
    entries = [
        Entry(
            name,
            role,
            tuple(t.shape),
            str(t.dtype).removeprefix("torch."),
            in_state_dict=name not in transient,
        )
        for role, name, t in _tensors(start, experiment.record.optimizer_state)
    ]
    layout = Layout.of(entries, tied)
    schema = Schema(
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
    check_metric_names(schema)
    return schema


def _device(device: Device) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device 'cuda': this torch sees no GPU; use 'cpu' or 'auto'")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _refuse_foreign(store: Store, name: str) -> None:
    if standing(store.path / name) == "foreign":
        raise ConflictError(
            f"{store.path / name} is there and is no experiment, or has lost its zarr.json; "
            "move it away, or choose another name"
        )


def _refuse_unless_same(stored: StoredExperiment, config: dict[str, Any], schema: Schema, resume: bool) -> None:
    found = differences(stored.config, config)
    found += differences(stored.schema.to_json(), schema.to_json(), "schema.")  # a function's globals may have changed
    if found:
        raise ConflictError(
            f"experiment {stored.name!r} is stored already and differs in {'; '.join(found)} (stored / asked for); "
            "choose another name"
        )
    if not resume:
        raise ConflictError(
            f"experiment {stored.name!r} is stored already with this configuration; "
            "give --resume to go on with it, or another --name"
        )


@contextmanager
def _noted(stored: StoredExperiment, slabs: Sequence[Slab], where: dict[str, Any]) -> Iterator[None]:
    """Write down who records these slabs, before and after."""
    schema = stored.schema
    named = [[str(order), schema.seeds[position]] for order, position in slabs]
    fill = {"id": uuid.uuid4().hex, "slabs": named, "began": now(), "ended": None, **where}
    _note_fill(stored, fill)
    yield
    _note_fill(stored, fill | {"ended": now()})


def _note_fill(stored: StoredExperiment, fill: dict[str, Any]) -> None:
    store = stored.store
    with lock(store.locks / "declare.lock", f"store {store.path}", patience=60):
        group = zarr.open_group(stored.group.store, path=stored.name, mode="r+")
        attributes: Any = group.attrs["trajstore"]
        others = [other for other in attributes["fills"] if other["id"] != fill["id"]]
        group.attrs["trajstore"] = attributes | {"fills": [*others, fill]}
