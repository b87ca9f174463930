"""Before a recording: how it will be computed, and whether that fits."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch

from trajstore.engine.plan import EngineChoice, Plan, choose
from trajstore.engine.walk import applications
from trajstore.errors import ConfigurationError, choices
from trajstore.experiment.experiment import Experiment
from trajstore.operators import Operator
from trajstore.operators.state import beginning
from trajstore.problems import LiveProblem
from trajstore.recording.plans import remembered
from trajstore.recording.schema import tensors_of
from trajstore.storage.format.schema import Schema

if TYPE_CHECKING:
    from trajstore.recording.workers import Scheduler

__all__ = ["Device", "Wishes", "afford", "plan_for"]

Device = Literal["auto", "cpu", "cuda"]
_LITTLE = 5_000
"""Operator applications that are over before a calibration would be."""


@dataclass(frozen=True)
class Wishes:
    """What was asked for of how to compute; None leaves it to the plan."""

    engine: EngineChoice = "auto"
    lanes: int | None = None
    device: Device = "auto"
    workers: int | None = None
    """Processes of this machine; 0: only the one that was called."""
    scheduler: Scheduler | None = None
    """A Dask scheduler, by its address, a client or a cluster, whose workers compute."""
    memory: int | None = None
    """Bytes that all processes together may take."""

    def __post_init__(self) -> None:
        if self.engine not in get_args(EngineChoice):
            raise ConfigurationError(f"engine {self.engine!r}; {choices(self.engine, get_args(EngineChoice))}")
        if self.lanes is not None and not 1 <= self.lanes <= 4096:
            raise ConfigurationError(f"lanes is {self.lanes}; it must be from 1 to 4096")
        if self.lanes is not None and self.engine == "reference":
            raise ConfigurationError("lanes belong to engine 'wavefront'; leave them out with engine 'reference'")
        if self.workers is not None and not 0 <= self.workers <= 1024:
            raise ConfigurationError(f"workers is {self.workers}; it must be from 0 to 1024")
        if self.workers is not None and self.scheduler is not None:
            raise ConfigurationError("a scheduler has workers of its own; give workers or a scheduler, not both")

    @property
    def where(self) -> torch.device:
        """The device that is meant here."""
        if self.device not in get_args(Device):
            raise ConfigurationError(f"device {self.device!r}; {choices(self.device, get_args(Device))}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigurationError("device 'cuda': this torch sees no GPU; use 'cpu' or 'auto'")
        return torch.device("cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu")


def plan_for(experiment: Experiment, live: LiveProblem, wishes: Wishes) -> Plan:
    """Choose how to compute an experiment here."""
    seeds = experiment.run_seeds
    total = applications(experiment.orders, experiment.steps, experiment.grid) * len(seeds)
    chains = len(experiment.grid) * len(experiment.orders) * len(seeds)
    engine: EngineChoice = "wavefront" if wishes.lanes is not None else wishes.engine
    workers = 1 if wishes.scheduler is not None else wishes.workers

    def choice() -> Plan:
        state_bytes = _state_bytes(live, experiment.operator, seeds[0][0])
        how = engine, wishes.lanes, workers
        return choose(live, experiment.operator, seeds, total, chains, state_bytes, experiment.steps, *how)

    if engine == "auto" and not workers and total <= _LITTLE:
        return Plan("reference", reason="little work", threads=torch.get_num_threads())
    device = wishes.where.type
    question = {"config": experiment.config() | {"name": None}, "engine": engine, "device": device}
    return remembered(question | {"lanes": wishes.lanes, "workers": workers}, choice)


_PROCESS, _WORKER = 950_000_000, 1_000_000_000
"""What a process takes before the first state: torch and its compiler, and for workers Dask."""


def afford(plan: Plan, experiment: Experiment, live: LiveProblem, schema: Schema, wishes: Wishes) -> tuple[Plan, int]:
    """Return a plan that fits into memory, and how many slabs can be recorded together; refuse what cannot fit.

    Without a wish, half of the machine's memory may be used, and as much as it takes at least.
    """
    limit = wishes.memory or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    segment = schema.layout.row_bytes * min(schema.snapshots_per_segment, len(schema.snapshots))
    # The wave, what comes out of a tick, its gradients and activations; while it is proven also those in float64.
    wave = (
        (12 if plan.engine == "wavefront" else 4)
        * plan.lanes
        * _state_bytes(live, experiment.operator, experiment.init_seeds[0])
    )
    a_slab = segment + segment // 4

    def needed(workers: int) -> int:
        # A worker holds a segment, and a copy while it travels or is encoded.
        return _PROCESS + (workers * (_WORKER + wave + 3 * segment) if workers else wave + a_slab)

    workers = plan.workers
    while wishes.workers is None and workers and needed(workers) > limit:
        workers -= 1
    if wishes.memory is not None and needed(workers) > limit:
        what = f"{workers} worker process{'es' if workers > 1 else ''}" if workers else "one process"
        fewer = ", or ask for fewer workers" if workers else ""
        raise ConfigurationError(
            f"experiment {experiment.name!r}: {what} would take about {needed(workers) / 1e9:.1f} GB, "
            f"and memory is {limit / 1e9:.1f} GB; give more{fewer}"
        )
    together = max(1, (limit - _PROCESS - wave) // max(1, a_slab))
    return replace(plan, workers=workers), together


def _state_bytes(live: LiveProblem, operator: Operator, init_seed: int) -> int:
    params, buffers = live.initial(init_seed)
    tensors = tensors_of(beginning(params, buffers, operator.memory(params)), memory=True)
    return sum(t.numel() * t.element_size() for _, _, t in tensors)
