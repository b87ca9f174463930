"""Replay: compute iterates again from the configuration that is stored, and compare.

Nothing is written. What comes out is compared with what is stored, bit for bit, and where it differs, by how much:
another machine, or another release of torch, may round differently without anything being wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trajstore.engine.plan import Plan, ready
from trajstore.engine.toolchain import missing_for_compiling
from trajstore.engine.walk import Slab, walk
from trajstore.errors import ConfigurationError, ConflictError
from trajstore.recording.acceptance import refuse_other_data
from trajstore.recording.measuring import Observer, parameters_of
from trajstore.recording.schema import schema_of
from trajstore.replay.recipe import experiment_of, why_not
from trajstore.storage.writing.segment import Observation
from trajstore.storage.writing.slab_writer import Ledger
from trajstore.store import StoredExperiment

__all__ = ["Replayed", "replay"]

Tell = Callable[[int, str], None]


@dataclass
class Replayed:
    """What came of computing one slab again."""

    order: str
    seed: int
    compared: int = 0
    """How many recorded steps were compared."""
    differs_from: int | None = None
    """The first step that is not the same in every bit."""
    off: float = 0.0
    """The largest difference of parameters, relative to their norm."""

    def __str__(self) -> str:
        slab = f"order {self.order!r}, seed {self.seed}: {self.compared} steps"
        if self.differs_from is None:
            return f"{slab} came out the same, bit for bit"
        return f"{slab}, different from step {self.differs_from} on, by at most {self.off:.1e} of the parameters' norm"


def replay(stored: StoredExperiment) -> Iterator[Replayed]:
    """Compute what is committed of an experiment again, seed by seed, and compare."""
    if (reason := why_not(stored)) is not None:
        raise ConfigurationError(f"{reason}; `trajstore verify` without --replay checks what is stored")
    experiment = experiment_of(stored)
    live = experiment.problem.build(torch.device("cpu"))
    refuse_other_data(stored.name, stored.attributes, live)
    schema = stored.schema
    if schema_of(experiment, live) != replace(schema, late=()):
        raise ConflictError(
            f"experiment {stored.name!r}: its problem has changed since it was recorded, so it cannot be replayed"
        )
    _, engine = ready(_plan(stored), live, experiment.operator, experiment.run_seeds)
    observe = Observer(experiment, schema)
    for k, seed in enumerate(schema.seeds):
        slabs = [Slab(order, k) for order in experiment.orders]
        ledgers = {slab: Ledger(stored.group, schema, i, k) for i, slab in enumerate(slabs)}
        begun = [slab for slab in slabs if ledgers[slab].last_step >= 0]
        if not begun:
            continue
        steps = {slab: np.flatnonzero(ledgers[slab].committed).tolist() for slab in begun}
        told = {slab: Replayed(str(slab.order), seed) for slab in begun}
        start: Tensor | None = None
        before: dict[Slab, Tensor] = {}
        for visit in walk(begun, max(map(max, steps.values())), experiment.grid, engine, steps):
            here = parameters_of(visit.iterate.state)
            start = here if start is None else start
            observed = observe(visit.iterate, visit.leg_start, here, start, before.get(visit.slabs[0]))
            before |= dict.fromkeys(visit.slabs, here)
            for slab in visit.slabs:
                if ledgers[slab].committed[observed.step]:
                    _compare(told[slab], ledgers[slab].stored(observed.step), observed)
        yield from told.values()


def _compare(told: Replayed, stored: Observation, again: Observation) -> None:
    told.compared += 1
    if stored.bits() == again.bits():
        return
    if told.differs_from is None or again.step < told.differs_from:
        told.differs_from = again.step
    if stored.snapshot is not None and again.snapshot is not None:
        left, right = (state[0].astype(np.float64) for state in (stored.snapshot, again.snapshot))
        norm = float(np.linalg.norm(left))
        told.off = max(told.off, float(np.linalg.norm(left - right)) / (norm or 1.0))


def _plan(stored: StoredExperiment) -> Plan:
    fills = [fill for fill in stored.fills if "plan" in fill]
    if not fills:
        raise ConfigurationError(f"experiment {stored.name!r} has no record of the plan it was computed with")
    plan = replace(Plan.from_json(fills[0]["plan"]), workers=0)
    return replace(plan, compiled=False) if plan.compiled and missing_for_compiling("cpu") else plan
