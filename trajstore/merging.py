"""Merge and remove: experiments and slabs from one store into another, and out of one.

What is taken over is read and checked first; chunks are copied as they are, a slab's commit records last, as when it
was recorded. What both stores have must be the same, as far as both have it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import zarr
from zarr.buffer.cpu import Buffer

from trajstore.configuration import differences
from trajstore.errors import ConfigurationError, ConflictError, DamageError, TrajstoreError, WriteError
from trajstore.storage.declaring import ATTRIBUTE, declare, grow, stored_batches
from trajstore.storage.fills import add_fills, stored_fills
from trajstore.storage.late import LateSeries
from trajstore.storage.place import keeper_of
from trajstore.storage.schema import Schema, late_records
from trajstore.storage.segment import Corner
from trajstore.storage.writer import Ledger
from trajstore.store import DECLARED, Store, StoredExperiment, check_place, open_root, refuse_alike, refuse_foreign
from trajstore.system import is_full, system_told

__all__ = ["Merged", "merge", "remove"]

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
        _lock_slabs(held, experiment, full=True)
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
    return [merged for experiment in experiments for merged in _take_over(experiment, target)]


def _take_over(experiment: StoredExperiment, target: Store) -> list[Merged]:
    name = experiment.name
    with ExitStack() as held:
        with target.declaring():
            root = open_root(target.place)
            refuse_foreign(target, name)
            if name in target:
                config, schema = _union(target[name], experiment)
                group = zarr.open_group(root.store, path=name, mode="r+", zarr_format=3)
                if schema != Schema.of(group):
                    grow(group, schema, config, _batches(schema, StoredExperiment(target, group), experiment))
            else:
                batches = _batches(experiment.schema, experiment)
                group = declare(root, name, experiment.schema, experiment.config, batches)
        stored = StoredExperiment(target, group)
        _lock_slabs(held, experiment, stored)
        done = [
            Merged(name, order, seed, _copy_slab(experiment, stored, order, seed))
            for order, seed in product(experiment.schema.orders, experiment.schema.seeds)
        ]
        with target.declaring():
            group = zarr.open_group(root.store, path=name, mode="r+", zarr_format=3)
            known = {fill["id"] for fill in stored_fills(group)}
            if new := [fill for fill in experiment.fills if fill["id"] not in known]:
                add_fills(group, new)
    return done


def _union(here: StoredExperiment, there: StoredExperiment) -> tuple[dict[str, Any], Schema]:
    """Return configuration and schema of what both have together; refuse what does not go together."""
    left, right = ({k: v for k, v in e.config.items() if k not in _GROWING} for e in (here, there))
    found = differences(left, right)
    if found:  # perhaps by fields that came later; asking loads torch, which nothing else here does
        from trajstore.experiment import of_today

        found = differences(of_today(left), of_today(right))
    a, b = here.schema, there.schema
    growing = ("orders", "seeds", "init_seeds", "data_seeds", "steps", "snapshots", "metrics", "late")
    shape, other = ({k: v for k, v in s.to_json().items() if k not in growing} for s in (a, b))
    found += differences(shape, other, "schema.")
    names = list(a.metrics), list(b.metrics)
    shorter = min(map(len, names))
    if names[0][:shorter] != names[1][:shorter]:
        found.append(f"metrics: {', '.join(names[0])} / {', '.join(names[1])}")
    if a.steps != b.steps and a.batch_size:
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
    """Return the batches of each seed, from the first of the experiments that has it."""
    if not schema.batch_size:
        return []
    homes = [next(e for e in experiments if seed in e.schema.seeds) for seed in schema.seeds]
    places = [home.schema.seeds.index(seed) for home, seed in zip(homes, schema.seeds, strict=True)]
    return [stored_batches(home.group, home.schema, k) for home, k in zip(homes, places, strict=True)]


def _copy_slab(source: StoredExperiment, target: StoredExperiment, order: str, seed: int) -> bool:
    """Copy a slab that the target has less of; tell whether there was anything to copy."""
    theirs, ours = (
        Ledger(e.group, e.schema, e.schema.orders.index(order), e.schema.seeds.index(seed)) for e in (source, target)
    )
    for name in source.schema.late:
        known, values = LateSeries(source.group, source.schema, theirs.corner, name).read()
        if known.any():
            LateSeries(target.group, target.schema, ours.corner, name).put(np.flatnonzero(known), values[known])
    more = False
    same = (theirs.records == ours.records[: len(theirs.records)]).all(axis=-1)
    differing = bool((~same & (theirs.records[:, 0] >= 0)).any())
    parts = _parts(source, theirs.corner, ours.corner) if differing else {}
    as_read = {here: _digests(source, here) for here in parts}
    for number in np.flatnonzero(theirs.records[:, 0] >= 0).tolist() if differing else ():  # chunks may be of several
        record, own = theirs.records[number].tolist(), ours.records[number].tolist()
        checked = theirs.read(number, counted=max(0, own[0]))
        if own[0] > record[0]:
            ours.read(number, counted=record[0]).refuse_other(record, theirs.steps_named(number))
            continue
        checked.refuse_other(own, ours.steps_named(number))
        more |= own != record
    if not more:
        return False
    ahead = [n for n in range(len(theirs.records)) if ours.records[n, 0] > theirs.records[n, 0]]
    if ahead:
        raise ConflictError(
            f"{ours.name}: each of the two stores has steps that the other lacks; resume one of them first"
        )
    for here, there in parts.items():
        _copy(source, target, here, there, as_read[here], theirs.name)
    for path in theirs.slots.paths:
        _copy(source, target, path, path)
    try:
        ours.refuse_unlike(theirs)
    except DamageError as error:
        raise DamageError(
            f"{error}; that was copied from {source.store}, and counts in {target.store} only when it is merged again"
        ) from None
    ours.take_over(theirs.records)
    return True


def _parts(source: StoredExperiment, theirs: Corner, ours: Corner) -> dict[str, str]:
    """Return where the chunks of a slab lie that its commit records vouch for → where they are copied to."""
    return {
        f"{spec.name}/c/{theirs[0]}/{theirs[1]}": f"{spec.name}/c/{ours[0]}/{ours[1]}"
        for spec in source.schema.arrays()
        if {"order", "seed"} <= set(spec.dims) and spec.name != "committed" and not _is_late(source.schema, spec.name)
    }


def _digests(source: StoredExperiment, here: str) -> dict[str, bytes]:
    """Return what is below a key of an experiment → a digest of it."""
    place = source.store.place
    return {key: _digest(place.read(key) or b"") for key, _ in place.files(f"{source.name}/{here}")}


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _is_late(schema: Schema, array: str) -> bool:
    return any(array in (name, late_records(name)) for name in schema.late)


def _copy(
    source: StoredExperiment,
    target: StoredExperiment,
    here: str,
    there: str,
    as_read: Mapping[str, bytes] | None = None,
    slab: str = "",
) -> None:
    """Copy what lies below a key of one experiment to another key of the other.

    Where digests are given, it must still be what was read and checked: it may replace what is committed here.
    """
    keeper, place = keeper_of(target.group), source.store.place
    prefix = f"{source.name}/{here}"
    for key in (key for key, _ in place.files(prefix)) if as_read is None else as_read:
        ours = re.fullmatch(r"(/([0-9]+|c|zarr\.json))*", key.removeprefix(prefix)) is not None  # chunks and documents
        content = place.read(key) if ours else None
        if as_read is not None and ours and (content is None or _digest(content) != as_read[key]):
            raise ConflictError(
                f"{slab}: {key} in {source.store} was changed or removed while it was merged; nothing of it counts "
                "here; merge again when nobody writes there"
            )
        if content is not None:
            keeper.set_sync(f"{target.name}/{there}{key.removeprefix(prefix)}", Buffer.from_bytes(content))


def _lock_slabs(
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
