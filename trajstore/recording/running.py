"""Run an experiment: the engine's iterates into the store's slabs.

The one place where `engine` and `storage` meet.
"""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from trajstore.engine import Engine, Iterate, Work
from trajstore.engine.over import Over
from trajstore.engine.plan import EngineChoice, Plan, followed, ready
from trajstore.engine.toolchain import missing_for_compiling
from trajstore.engine.walk import Slab, applications
from trajstore.errors import ConfigurationError, ConflictError, RefusedWarning, SlowPlanWarning
from trajstore.experiment.configuration import describe, differences, refuse_differences
from trajstore.experiment.experiment import Experiment, of_today
from trajstore.experiment.trust import remember
from trajstore.problems import LiveProblem
from trajstore.reading.handles import check_place, open_root, refuse_foreign, refuse_new, standing
from trajstore.recording.acceptance import digest_of, refuse_other_data
from trajstore.recording.fills import noted
from trajstore.recording.here import fill_here, ledgers_of
from trajstore.recording.planning import Device, Wishes, afford, plan_for
from trajstore.recording.provenance import provenance
from trajstore.recording.schema import schema_of
from trajstore.recording.workers import Job, Scheduler, connected, connected_to, fill
from trajstore.storage.format.commits import Commits
from trajstore.storage.format.schema import Schema
from trajstore.storage.packing import lay_out, open_to_write
from trajstore.storage.places.place import Durability
from trajstore.storage.writing.declaring import declare, grow
from trajstore.store import Store, StoredExperiment

__all__ = ["accept", "record_here", "refuse_conflict", "run"]

Tell = Callable[[int, str], None]
"""Called with operator applications done since the last call, and what is being recorded."""


def run(
    experiment: Experiment,
    path: str | Path,
    *,
    resume: bool = False,
    extend: bool = False,
    durability: Durability = "segment",
    engine: EngineChoice = "auto",
    lanes: int | None = None,
    device: Device = "auto",
    workers: int | None = None,
    scheduler: Scheduler | None = None,
    memory: int | None = None,
    progress: Tell | None = None,
) -> StoredExperiment:
    """Record an experiment into a store, and return it as stored.

    An experiment that exists already needs ``resume=True`` and an equal configuration: what is committed is left as it
    is, and each slab goes on after it, by the plan that the recording began with. With ``extend=True`` the stored
    experiment first grows by the orders, seeds and steps that it does not have, and the slabs asked for are recorded.
    Under ``durability="none"`` nothing is fsynced, for disks whose contents need not survive a power cut.

    `lanes` fixes the width of the wave, `workers` the number of processes (0: only this one); a Dask `scheduler` has
    workers of its own: give its address, a `distributed.Client`, or a cluster such as a `distributed.LocalCluster`.
    `memory` is what all processes may take together, in bytes.
    """
    store, asked = Store(path), experiment
    if store.place.only_here:
        if workers or scheduler is not None:
            raise ConfigurationError(f"{store} is in the memory of this process; other processes cannot record there")
        workers = 0
    wishes = Wishes(engine, lanes, device, workers, scheduler, memory)
    where = wishes.where
    live = experiment.problem.build(where)
    schema = schema_of(experiment, live)  # everything that can be wrong with the request comes before the first byte
    check_place(store)
    begun = standing(store.place, experiment.name) == "experiment"
    if not begun:
        refuse_new(store, experiment.name, schema.metrics)
        if memory is not None:  # before a plan is looked for, which takes time: every other takes as much at least
            afford(Plan("reference", workers=workers or 0), experiment, live, schema, wishes)
    plan = None if begun else plan_for(experiment, live, wishes)
    if plan is not None:
        afford(plan, experiment, live, schema, wishes)
    store.place.make()
    with store.declaring():
        root = open_root(store.place, durability)
        refuse_foreign(store, experiment.name)
        if experiment.name in store:
            there = store[experiment.name]
            experiment = accept(there, experiment, live, resume=resume, extend=extend)
            schema = replace(schema_of(experiment, live), late=there.schema.late)
            if schema != there.schema:
                _grow(root, experiment, live, schema)
        else:
            _declare(root, experiment, live, schema)
    group = zarr.open_group(root.store, path=experiment.name, mode="r+", zarr_format=3)
    stored = StoredExperiment(store, group)
    # The user has asked for this very problem.
    remember(stored.config["problem"], [fill["id"] for fill in stored.fills])
    complete = Commits.of(group, schema).complete
    missing = [
        [Slab(order, k) for i, order in enumerate(experiment.orders) if order in asked.orders and not complete[i, k]]
        for k, seed in enumerate(experiment.seeds)
        if seed in asked.seeds
    ]
    if not any(missing):
        return store[experiment.name]
    with store.declaring():
        lay_out(root.store, experiment.name)
    plan = _stored_plan(stored, wishes) or plan or plan_for(experiment, live, wishes)
    plan, fit = afford(plan, experiment, live, schema, wishes)
    packs = list(_waves(plan, experiment, missing, fit))

    def named(slabs: Sequence[Slab]) -> list[tuple[str, int]]:
        return [(str(order), experiment.seeds[position]) for order, position in slabs]

    origin = {"plan": plan.to_json(), **provenance(where), **digest_of(live)}

    def follow(really: Plan, refused: bool) -> None:
        """Tell that it will take longer, and why, and have it written down."""
        origin["plan"] = replace(really, workers=plan.workers, threads=plan.threads).to_json()
        what = f"{_short(experiment.operator)} on {_short(experiment.problem)}: " if refused else ""
        told = f"experiment {experiment.name!r}: {what}{really}"
        warnings.warn(told, RefusedWarning if refused else SlowPlanWarning, stacklevel=3)

    # Workers take segments whole, and one in which an adaptive grid ended before it was extended is to go on.
    extended = experiment.refinement is not None and bool(experiment.stops)
    if extended and scheduler is not None:
        raise ConfigurationError(
            f"experiment {experiment.name!r}: an adaptive grid that was extended goes on in one process; leave the "
            "scheduler out"
        )
    if (scheduler is not None or plan.workers) and not extended:
        job = Job(uuid.uuid4().hex, experiment, store.place.address, durability, replace(plan, threads=1), where.type)
        on_workers = connected_to(scheduler) if scheduler is not None else connected(plan.workers)
        with noted(stored, named([slab for slabs in missing for slab in slabs]), origin) as note, on_workers as client:
            spent = fill(client, job, packs, lambda slabs: ledgers_of(stored, slabs), progress, follow)
            note.update(spent._asdict())
        return store[experiment.name]
    really, computing = ready(plan, live, experiment.operator, experiment.run_seeds)
    if really.slowed:
        follow(really, bool(computing.refusals))
    origin["plan"] = really.to_json()
    computing = _Watched(computing, lambda: follow(followed(really, computing), True))
    if progress is not None:
        computing = _Metered(computing, progress, schema.seeds)
    for slabs in packs:
        with noted(stored, named(slabs), origin) as note:
            note.update(fill_here(stored, experiment, slabs, computing, where)._asdict())
    return store[experiment.name]


def record_here(experiment: Experiment, path: Path, live: LiveProblem, engine: Engine) -> StoredExperiment:
    """Record an experiment into a new store in this process, by an engine that there is."""
    root, schema = open_root(path), schema_of(experiment, live)
    group = _declare(root, experiment, live, schema)
    stored = StoredExperiment(Store(path), group)
    slabs = [Slab(order, k) for k in range(len(experiment.seeds)) for order in experiment.orders]
    fill_here(stored, experiment, slabs, engine, torch.device("cpu"))
    return stored


def _declare(root: zarr.Group, experiment: Experiment, live: LiveProblem, schema: Schema) -> zarr.Group:
    return declare(root, experiment.name, schema, experiment.config(), _batch_index(experiment, live, schema))


def _grow(root: zarr.Group, experiment: Experiment, live: LiveProblem, schema: Schema) -> None:
    group = open_to_write(root.store, experiment.name)
    grow(group, schema, experiment.config(), _batch_index(experiment, live, schema))


def _batch_index(experiment: Experiment, live: LiveProblem, schema: Schema) -> list[NDArray[np.int64]]:
    streams = [live.batches(seed) for seed in schema.data_seeds] if schema.batch_size else []
    return [np.stack([s.examples(i) for i in range(1, experiment.steps + 1)]) for s in streams]


def _stored_plan(stored: StoredExperiment, wishes: Wishes) -> Plan | None:
    """Return the plan that the recording began with, unless another engine is asked for."""
    fills = stored.fills
    if not fills or "plan" not in fills[0]:
        return None
    plan = Plan.from_json(fills[0]["plan"])
    if wishes.engine not in ("auto", plan.engine) or (wishes.lanes is not None and plan.engine == "reference"):
        return None
    if plan.compiled and (missing := missing_for_compiling(wishes.where.type)):
        reason = f"not compiled as it was begun: this machine lacks {' and '.join(missing)}"
        plan = replace(plan, compiled=False, reason=reason, slowed=True)
    if wishes.workers is not None:
        plan = replace(plan, workers=wishes.workers)
    return plan if wishes.lanes is None else replace(plan, lanes=wishes.lanes)


def _waves(plan: Plan, experiment: Experiment, missing: Sequence[Sequence[Slab]], fit: int) -> Iterator[list[Slab]]:
    """Group slabs to be recorded together: whole seeds, as many as fill the lanes and fit into memory.

    A seed at a time commits earliest, so more of them share a wave only where one would leave lanes idle: a
    forward leg cannot be split, so its length bounds how soon a wave can end. A seed with more orders than fit is
    recorded in turns.
    """
    a_seed = max(1, applications(experiment.orders, experiment.steps, experiment.grid))
    enough = 1 if plan.lanes == 1 else -(-8 * plan.lanes * experiment.steps // a_seed)
    together = max(1, min(enough, fit // len(experiment.orders)))
    seeds = [slabs for slabs in missing if slabs]
    for start in range(0, len(seeds), together):
        slabs = [slab for slabs in seeds[start : start + together] for slab in slabs]
        for turn in range(0, len(slabs), fit):
            yield slabs[turn : turn + fit]


def refuse_conflict(experiment: Experiment, path: str | Path, *, resume: bool, extend: bool) -> None:
    """Raise what `run` would raise because of what is stored already."""
    store = Store(path)
    if not store.is_missing() and experiment.name in store:
        live = experiment.live
        accept(store[experiment.name], experiment, live, resume=resume, extend=extend)
    else:
        refuse_new(store, experiment.name, experiment.metrics)


def _short(part: object) -> str:
    """Name an operator or a problem."""
    table = describe(part)
    return str(table.get("function") or table.get("family") or type(part).__name__)


class _Watched(Over):
    """An engine that tells when it refuses a fast way."""

    def __init__(self, engine: Engine, tell: Callable[[], None]) -> None:
        super().__init__(engine)
        self._tell, self._known = tell, len(engine.refusals)

    def run(self, works: Sequence[Work]) -> Iterator[tuple[int, Iterate]]:
        for found in self.engine.run(works):
            if len(self.refusals) > self._known:
                self._known = len(self.refusals)
                self._tell()
            yield found


class _Metered(Over):
    """An engine that tells how far it is."""

    def __init__(self, engine: Engine, progress: Tell, seeds: Sequence[int]) -> None:
        super().__init__(engine)
        self._progress, self._seeds = progress, seeds

    def run(self, works: Sequence[Work]) -> Iterator[tuple[int, Iterate]]:
        done = [work.last.step for work in works]
        for k, iterate in self.engine.run(works):
            leg = works[k].leg
            where = f"seed {self._seeds[works[k].seed]}, {leg.kind} to step {iterate.step}"
            self._progress(leg.applications([iterate.step], done[k]), where)
            done[k] = iterate.step
            yield k, iterate


def accept(stored: StoredExperiment, asked: Experiment, live: LiveProblem, *, resume: bool, extend: bool) -> Experiment:
    """Return the stored experiment, grown by what is asked for; refuse one, or data, that contradict it."""
    config, schema = stored.config, stored.schema
    experiment = asked.grown_from(config) if extend else replace(asked, stops=tuple(config["stops"]))
    own = experiment.config()
    if "variant_of" not in config:  # it was not stored yet, and changes nothing that is computed
        own["variant_of"] = of_today(config)["variant_of"]
    growing = ("orders", "seeds", "steps", "stops") if extend else ()
    left, right = ({k: v for k, v in c.items() if k not in growing} for c in (config, own))
    found = differences(of_today(left), right)
    new = replace(schema_of(experiment, live), late=schema.late)  # what was computed since is nobody's wish
    shape, wanted = schema.to_json(), new.to_json()  # these too: a function's globals may have changed
    if extend:
        lengths = ("orders", "seeds", "init_seeds", "data_seeds", "steps", "snapshots")
        shape, wanted = ({k: v for k, v in s.items() if k not in lengths} for s in (shape, wanted))
        if new.snapshots[: len(schema.snapshots)] != schema.snapshots:
            found.append("record: steps up to the last one would be recorded at other places")
    found += differences(shape, wanted, "schema.")
    growth = "" if extend else ", or extend it (--extend, extend=True) by orders, seeds or steps"
    refuse_differences(stored.name, found, f"choose another name{growth}")
    refuse_other_data(stored.name, stored.attributes, live)
    if not (resume or extend):
        raise ConflictError(
            f"experiment {stored.name!r} exists already with this configuration; "
            "continue it with --resume (in Python resume=True), or choose another name"
        )
    return experiment
