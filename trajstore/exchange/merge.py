"""Merge and remove: experiments and slabs from one store into another, and out of one.

What is taken over is read and checked first; chunks are copied as they are, a slab's commit records last, as when it
was recorded. What both stores have must be the same, as far as both have it. What is taken from may be recorded at the
same time; nothing is locked or written there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import zarr

from trajstore._common.system import is_full, system_told
from trajstore.errors import ConfigurationError, ConflictError, DamageError, TrajstoreError, WriteError, damage_told
from trajstore.exchange.copying import copy_slab
from trajstore.experiment.configuration import differences
from trajstore.reading.handles import DECLARED, check_place, open_root, refuse_alike, refuse_foreign
from trajstore.storage.format.schema import Schema
from trajstore.storage.packing import open_to_write
from trajstore.storage.places.place import keeper_of
from trajstore.storage.writing.declaring import ATTRIBUTE, declare, grow, stored_batches
from trajstore.storage.writing.fills import Fill, add_fills, renew_fills, stored_fills
from trajstore.store import Store, StoredExperiment

__all__ = ["Merged", "lock_slabs", "merge", "remove"]

_TRIES = 5
"""How often an experiment is taken over that grows meanwhile."""
_GROWING = ("orders", "seeds", "steps", "stops", DECLARED)


@dataclass(frozen=True)
class Merged:
    """What became of one slab."""

    experiment: str
    order: str
    seed: int
    copied: bool
    """Otherwise it was there already."""


def remove(store: Store, name: str) -> None:
    """Remove an experiment, with everything in it."""
    experiment = store[name]
    store.place.make()  # refuses where nothing can be written
    with ExitStack() as held:
        held.enter_context(store.declaring())
        lock_slabs(held, experiment, full=True)
        if store.place.beside is None:  # it cannot be gone at once: from now on it is no experiment any more
            group = zarr.open_group(store.place.keeper(read_only=False), path=name, mode="r+", zarr_format=3)
            group.attrs[ATTRIBUTE] = {"declaring": True}
        try:
            store.place.remove(name)
        except TrajstoreError:
            raise
        except OSError as error:
            if name in store:
                told = f"experiment {name!r} cannot be removed from {store} ({system_told(error)}); it is as it was"
                raise ConfigurationError(told) from None
            told = f"experiment {name!r} is removed, but some of its files cannot be deleted ({system_told(error)})"
            raise WriteError(f"{told}; `trajstore verify {store}` names the folder") from None


def merge(source: Store, target: Store, names: Sequence[str] | None = None) -> list[Merged]:
    """Take experiments of one store over into another, all of them by default."""
    experiments = [source[name] for name in (list(source) if names is None else names)]
    if source.place == target.place:
        raise ConflictError(f"{source} and {target} are the same store")
    check_place(target)
    there = not target.is_missing()
    for experiment in experiments:  # what contradicts is known before anything is written
        if there and experiment.name in target:
            _union(target[experiment.name], experiment)
        else:
            refuse_alike(target, experiment.name)
    target.place.make()
    return [merged for experiment in experiments for merged in _as_it_grows(experiment, target)]


def _as_it_grows(experiment: StoredExperiment, target: Store) -> list[Merged]:
    """Take an experiment over as it is when its turn comes, and once more where it grows meanwhile.

    Records speak then of steps and metrics that were not declared yet as it was opened, and cannot be read by that.
    """
    now = _again(experiment)
    for _ in range(_TRIES):
        try:
            return _take_over(now, target)
        except DamageError:
            before, now = now, _again(now)
            if now.schema == before.schema:
                raise
    return _take_over(now, target)


def _again(experiment: StoredExperiment) -> StoredExperiment:
    """Open an experiment once more; it must be the same."""
    keeper_of(experiment.group).expected.refuse_another(experiment.name, experiment.store.place)
    return experiment.store[experiment.name]


def _take_over(experiment: StoredExperiment, target: Store) -> list[Merged]:
    name = experiment.name
    noted = experiment.fills  # before the records: of what ended by then, they tell all
    with ExitStack() as held:
        with target.declaring():
            root = open_root(target.place)
            refuse_foreign(target, name)
            if name in target:
                config, schema = _union(target[name], experiment)
                group = open_to_write(root.store, name)
                if schema != Schema.of(group):
                    grow(group, schema, config, _batches(schema, StoredExperiment(target, group), experiment))
            else:
                batches = _batches(experiment.schema, experiment)
                group = declare(root, name, experiment.schema, experiment.config, batches)
            _note(group, [_as_begun(fill) for fill in noted])
        stored = StoredExperiment(target, group)
        lock_slabs(held, experiment, stored)
        done = [
            Merged(name, order, seed, copy_slab(experiment, stored, order, seed))
            for order, seed in product(experiment.schema.orders, experiment.schema.seeds)
        ]
        with damage_told(f"experiment {name!r} in {experiment.store}"):
            later = stored_fills(zarr.open_group(experiment.group.store, path=name, mode="r", zarr_format=3))
        with target.declaring():
            group = zarr.open_group(root.store, path=name, mode="r+", zarr_format=3)
            _note(group, [*noted, *map(_as_begun, later)])
    return done


def _as_begun(fill: Fill) -> Fill:
    """Return a fill as it was before it ended: nobody says that what is copied until then is all of it."""
    return {key: value for key, value in fill.items() if key != "seconds"} | {"ended": None}


def _note(group: zarr.Group, fills: Sequence[Fill]) -> None:
    """Note fills of another store, and those anew that have ended since. Hold the declaration's lock."""
    known = {fill["id"]: fill for fill in stored_fills(group)}
    if new := [fill for fill in fills if fill["id"] not in known]:
        add_fills(group, new)
    renew_fills(group, [f for f in fills if f["ended"] and f["id"] in known and not known[f["id"]]["ended"]])


def _union(here: StoredExperiment, there: StoredExperiment) -> tuple[dict[str, Any], Schema]:
    """Return configuration and schema of what both have together; refuse what does not go together."""
    left, right = ({k: v for k, v in e.config.items() if k not in _GROWING} for e in (here, there))
    found = differences(left, right)
    if found:  # perhaps by fields that came later; asking loads torch, which nothing else here does
        from trajstore.experiment.experiment import of_today

        found = differences(of_today(left), of_today(right))
    a, b = here.schema, there.schema
    growing = ("orders", "seeds", "init_seeds", "data_seeds", "steps", "snapshots", "metrics", "late")
    shape, other = ({k: v for k, v in s.to_json().items() if k not in growing} for s in (a, b))
    found += differences(shape, other, "schema.")
    names = list(a.metrics), list(b.metrics)
    shorter = min(map(len, names))
    if names[0][:shorter] != names[1][:shorter]:
        found.append(f"metrics: {', '.join(names[0])} / {', '.join(names[1])}")
    shorter_one, longer_one = sorted((a, b), key=lambda schema: schema.steps)
    if a.steps != b.steps and a.batch_size and not {*shorter_one.seeds} <= {*longer_one.seeds}:
        found.append(f"steps: {a.steps} / {b.steps} (extend the shorter one first)")
    grids = sorted((a.snapshots, b.snapshots), key=len)
    if grids[1][: len(grids[0])] != grids[0]:
        found.append("the steps whose states are stored")
    seeds = dict(zip(a.seeds, a.init_seeds, strict=True))
    found += [
        f"init seed of seed {seed}: {seeds[seed]} / {init}"
        for seed, init in zip(b.seeds, b.init_seeds, strict=True)
        if seeds.get(seed, init) != init
    ]
    if found:
        raise ConflictError(
            f"experiment {here.name!r} is in {here.store} and in {there.store}, and differs in {'; '.join(found)}"
        )
    inits = {**dict(zip(b.seeds, b.init_seeds, strict=True)), **seeds}
    together = tuple(dict.fromkeys((*a.seeds, *b.seeds)))
    longer = a if len(a.snapshots) >= len(b.snapshots) else b
    schema = replace(
        a,
        orders=tuple(dict.fromkeys((*a.orders, *b.orders))),
        seeds=together,
        init_seeds=tuple(inits[seed] for seed in together),
        data_seeds=together,
        steps=max(a.steps, b.steps),
        snapshots=longer.snapshots,
        metrics=max(a.metrics, b.metrics, key=len),
        late=tuple(dict.fromkeys((*a.late, *b.late))),
    )
    sizes = {"orders": list(schema.orders), "seeds": list(schema.seeds), "steps": schema.steps}
    declared = max(e.config.get(DECLARED) or 0 for e in (here, there))
    sizes |= {DECLARED: declared} if declared else {}
    stops = sorted({*here.config["stops"], *there.config["stops"]})
    return {**here.config, **sizes, "stops": stops}, schema


def _batches(schema: Schema, *experiments: StoredExperiment) -> list[np.ndarray[Any, Any]]:
    """Return the batches of each seed, from the experiment that goes furthest; the others must have begun the same."""
    found = []
    for seed in schema.seeds if schema.batch_size else ():
        homes = [experiment for experiment in experiments if seed in experiment.schema.seeds]
        stored = [stored_batches(home.group, home.schema, home.schema.seeds.index(seed)) for home in homes]
        longest = max(stored, key=len)
        if not all(np.array_equal(longest[: len(batches)], batches) for batches in stored):
            name, stores = homes[0].name, " and ".join(str(home.store) for home in homes)
            raise ConflictError(f"experiment {name!r}, seed {seed} has other batches in {stores}")
        found.append(longest)
    return found


def lock_slabs(
    held: ExitStack, experiment: StoredExperiment, place: StoredExperiment | None = None, *, full: bool = False
) -> None:
    """Hold the locks of an experiment's slabs, in its own store or in another.

    With `full`, a slab of which nothing is stored goes without, where the disk has no room for its lock: nobody can
    begin it either, and what is to be done is what makes room.
    """
    stored = place or experiment
    for order, seed in product(experiment.schema.orders, experiment.schema.seeds):
        try:
            held.enter_context(stored.locked(order, seed))
        except OSError as error:
            if not full or not is_full(error) or stored.store.place.files(stored.slab_folder(order, seed)):
                raise
