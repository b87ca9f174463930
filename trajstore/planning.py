"""Before a recording: how it will be computed, and what it will take."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from trajstore.engine import Engine, Work
from trajstore.engine.plan import EngineChoice, Plan, choose, ready
from trajstore.engine.walk import applications
from trajstore.errors import ConfigurationError, choices
from trajstore.experiment import Experiment
from trajstore.flattening import schema_of, tensors_of
from trajstore.operators import Operator
from trajstore.orders import Leg
from trajstore.plans import remembered
from trajstore.problems import LiveProblem
from trajstore.state import beginning

__all__ = ["Cost", "Device", "check_choice", "cost", "device_of", "plan_for", "run_seeds"]

Device = Literal["auto", "cpu", "cuda"]
_LITTLE = 5_000
"""Operator applications that are over before a calibration would be."""


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


def run_seeds(experiment: Experiment) -> list[tuple[int, int]]:
    """Return the (init seed, data seed) of each seed."""
    return list(zip(experiment.init_seeds, experiment.seeds, strict=True))


def plan_for(
    experiment: Experiment,
    live: LiveProblem,
    device: str,
    engine: EngineChoice = "auto",
    lanes: int | None = None,
) -> Plan:
    """Choose how to compute an experiment here."""
    seeds = run_seeds(experiment)
    total = applications(experiment.orders, experiment.steps, experiment.grid) * len(seeds)
    chains = len(experiment.grid) * len(experiment.orders) * len(seeds)

    def choice() -> Plan:
        state_bytes = _state_bytes(live, experiment.operator, seeds[0][0])
        return choose(live, experiment.operator, seeds, total, chains, state_bytes, experiment.steps, engine)

    if lanes is not None and engine == "auto":
        engine = "wavefront"
    question = {"config": experiment.config() | {"name": None}, "engine": engine, "device": device}
    little = engine == "auto" and total <= _LITTLE
    plan = Plan("reference", reason="little work") if little else remembered(question, choice)
    return plan if lanes is None else replace(plan, lanes=lanes)


def check_choice(engine: str, lanes: int | None) -> None:
    """Refuse an engine or a width that there is not."""
    if engine not in get_args(EngineChoice):
        raise ConfigurationError(f"engine {engine!r}; {choices(engine, get_args(EngineChoice))}")
    if lanes is not None and not 1 <= lanes <= 4096:
        raise ConfigurationError(f"lanes is {lanes}; it must be from 1 to 4096")
    if lanes is not None and engine == "reference":
        raise ConfigurationError("lanes are the wavefront's; leave them out with engine 'reference'")


def cost(
    experiment: Experiment, device: Device = "auto", engine: EngineChoice = "auto", lanes: int | None = None
) -> Cost:
    """Say what a recording will take, after timing a few operator applications here."""
    check_choice(engine, lanes)
    live = experiment.problem.build(device_of(device))
    schema = schema_of(experiment, live)
    slabs = len(experiment.orders) * len(experiment.seeds)
    total = applications(experiment.orders, experiment.steps, experiment.grid) * len(experiment.seeds)
    iterates = len(experiment.grid) * slabs
    plan = plan_for(experiment, live, device_of(device).type, engine, lanes)
    seeds = run_seeds(experiment)
    begin = time.perf_counter()
    plan, computing = ready(plan, live, experiment.operator, seeds)
    getting_ready = time.perf_counter() - begin
    per_application, per_iterate = _timings(computing, plan.lanes, experiment.steps)
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


def _timings(engine: Engine, lanes: int, most: int, seconds: float = 1.0) -> tuple[float, float]:
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
    longest = min(21, most)
    short, long = timed(1), timed(longest)
    per_application = max(long - short, 0.0) / max(longest - 1, 1)
    return per_application, max(short - per_application, 0.0)


def device_of(device: Device) -> torch.device:
    """Return the device that a choice means here."""
    if device not in get_args(Device):
        raise ConfigurationError(f"device {device!r}; {choices(device, get_args(Device))}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device 'cuda': this torch sees no GPU; use 'cpu' or 'auto'")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _state_bytes(live: LiveProblem, operator: Operator, init_seed: int) -> int:
    params, buffers = live.initial(init_seed)
    tensors = tensors_of(beginning(params, buffers, operator.memory(params)), memory=True)
    return sum(t.numel() * t.element_size() for _, _, t in tensors)
