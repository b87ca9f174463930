"""What a recording will take: operator applications counted, time and disk from a trial of its first steps."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from trajstore.engine import Engine, Work
from trajstore.engine.orders import Leg, Order
from trajstore.engine.plan import EngineChoice, Plan, ready, threads
from trajstore.engine.walk import applications
from trajstore.experiment.experiment import Experiment
from trajstore.problems import LiveProblem
from trajstore.recording.planning import Device, Wishes, afford, plan_for
from trajstore.recording.running import record_here
from trajstore.recording.schema import schema_of
from trajstore.storage.format.schema import Schema
from trajstore.store import StoredExperiment

__all__ = ["Cost", "cost"]

_TRIAL_SECONDS, _TRIAL_BYTES = 3.0, 256 * 2**20
"""About what a trial may take."""
_STARTING, _STARTING_COMPILED, _STARTING_WORKERS = 3.0, 3.0, 4.0
"""Seconds until a process has loaded torch, compiled code from its cache as well, and workers have done the same."""


@dataclass(frozen=True)
class Cost:
    """What a recording takes."""

    applications: int
    """Operator applications over all seeds; an upper bound where steps or legs depend on a metric."""
    exact: bool
    iterates: int
    snapshots: int
    raw_bytes: int
    """Everything stored, before compression."""
    disk_bytes: int
    """About what that is on disk."""
    seconds: float
    """About what the whole command takes here."""
    metric_seconds: float
    """The share of them that metrics, sketches, compression and writing take, not operator applications."""
    plan: Plan


def cost(
    experiment: Experiment,
    device: Device = "auto",
    engine: EngineChoice = "auto",
    lanes: int | None = None,
    workers: int | None = None,
    memory: int | None = None,
) -> Cost:
    """Say what a recording will take, after recording its first steps into a temporary folder."""
    wishes = Wishes(engine, lanes, device, workers, memory=memory)
    live = experiment.problem.build(wishes.where)
    schema = schema_of(experiment, live)
    slabs = len(experiment.orders) * len(experiment.seeds)
    total = applications(experiment.orders, experiment.steps, experiment.grid) * len(experiment.seeds)
    iterates, states = len(experiment.grid) * slabs, len(experiment.snapshots) * slabs
    plan, _ = afford(plan_for(experiment, live, wishes), experiment, live, schema, wishes)
    with threads(plan.threads):
        begin = time.perf_counter()
        plan, computing = ready(plan, live, experiment.operator, experiment.run_seeds)
        getting_ready = time.perf_counter() - begin
        an_application = _seconds_an_application(computing, plan.lanes, experiment.steps)
        trial = _Trial(5e-3, {}, 0.0, 0.0, 0)
        for budget in (_TRIAL_SECONDS / 10, _TRIAL_SECONDS):  # the first tells how long the second may be
            trial = _trial(experiment, live, schema, computing, an_application, trial.seconds_an_iterate, budget)
    applying, storing = total * an_application, iterates * trial.seconds_an_iterate
    starting = _STARTING + (max(getting_ready, _STARTING_COMPILED) if plan.compiled else 0.0)
    if plan.workers:
        starting += _STARTING_WORKERS
        applying, storing = applying / plan.workers, storing / plan.workers
    return Cost(
        applications=total,
        exact=experiment.refinement is None and not any(order.metrics for order in experiment.orders),
        iterates=iterates,
        snapshots=states,
        raw_bytes=states * schema.layout.row_bytes + schema.series_bytes(len(experiment.grid)),
        disk_bytes=round(trial.disk_bytes(experiment)),
        seconds=starting + applying + storing,
        metric_seconds=storing,
        plan=plan,
    )


class _Trial(NamedTuple):
    """What the first steps took."""

    seconds_an_iterate: float
    """Metrics, sketch, compression, writing."""
    a_state: dict[str, float]
    """Bytes on disk by kind of leg."""
    a_step: float
    """Bytes on disk of everything else, for an iterate."""
    a_batch: float
    """Bytes on disk of its examples' indices."""
    once: int
    """Bytes on disk of what does not grow."""

    def disk_bytes(self, experiment: Experiment) -> float:
        """Return what an experiment takes on disk."""
        states = sum(self.a_state[order.legs[0].kind] for order in experiment.orders) * len(experiment.snapshots)
        steps = self.a_step * len(experiment.grid) * len(experiment.orders)
        return self.once + len(experiment.seeds) * (states + steps + self.a_batch * experiment.steps)


def _trial(
    experiment: Experiment,
    live: LiveProblem,
    schema: Schema,
    engine: Engine,
    an_application: float,
    an_iterate: float,
    budget: float,
) -> _Trial:
    """Record the first steps of one seed, of a forward leg and a backward one as they occur, in so many seconds."""
    kinds = sorted({order.legs[0].kind for order in experiment.orders})
    orders = tuple(Order.parse(kind) for kind in kinds)
    most = min(schema.snapshots_per_segment, max(2, _TRIAL_BYTES // max(1, len(kinds) * schema.layout.row_bytes)))
    steps = experiment.snapshots[min(most, len(experiment.snapshots) - 1)]

    def seconds(steps: int) -> float:
        grid = [n for n in experiment.grid if n <= steps]
        return applications(orders, steps, grid) * an_application + len(grid) * len(orders) * an_iterate

    while steps > 2 and seconds(steps) > budget:
        steps = math.ceil(steps / 2)
    grid = tuple(n for n in experiment.grid if n <= steps)
    record = replace(
        experiment.record, every=1, log_until=None, adaptive=None, tolerance=None, dense_tail=None, steps=grid
    )
    first: dict[str, Any] = {"steps": steps, "orders": orders, "seeds": experiment.seeds[:1]}
    small = replace(experiment, name="trial", variant_of=None, record=record, **first)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        stored = record_here(small, Path(folder) / "trial.zarr", live, engine)
        took = time.perf_counter() - begin
        spent = applications(orders, steps, small.grid) * an_application
        each = max(0.0, took - spent) / (len(small.grid) * len(orders))
        states: dict[str, float] = {k: _bytes(stored, "params", i) / len(small.snapshots) for i, k in enumerate(kinds)}
        a_batch = _bytes(stored, "batch_index") / steps
        series = sum(_bytes(stored, spec.name) for spec in stored.schema.arrays() if "step" in spec.dims)
        counters = _bytes(stored, "counters")
        files = stored.store.place.files(stored.name)
        once = sum(size for key, size in files if key.endswith("zarr.json"))
    return _Trial(each, states, (series + counters) / (len(small.grid) * len(orders)), a_batch, once)


def _bytes(stored: StoredExperiment, array: str, order: int | None = None) -> int:
    """Return the size of an array's chunks, or of those of one order."""
    chunks = f"{stored.name}/{array}/c" if order is None else f"{stored.name}/{array}/c/{order}"
    return sum(size for _, size in stored.store.place.files(chunks))


def _seconds_an_application(engine: Engine, lanes: int, most: int, seconds: float = 1.0) -> float:
    """Time waves of short and of longer chains, as many of the same length as there are lanes."""
    origin = engine.start(0)

    def timed(n: int) -> float:
        best, end = float("inf"), time.perf_counter() + seconds / 2
        while time.perf_counter() < end or best == float("inf"):
            begin = time.perf_counter()
            for _ in engine.run([Work(0, Leg("backward"), origin, [n])] * lanes):
                pass
            best = min(best, time.perf_counter() - begin)
        return best / lanes

    timed(1)
    longest = min(21, most)
    return max(timed(longest) - timed(1), 0.0) / max(longest - 1, 1)
