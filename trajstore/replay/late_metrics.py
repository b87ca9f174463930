"""Compute: metrics of stored states, written beside those that were recorded.

They are late metrics, so the recording itself stays as it is. States that have a value are left alone: the same call
goes on where an earlier one stopped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import zarr

from trajstore.errors import ConfigurationError, StatisticError
from trajstore.reading.handles import open_root
from trajstore.storage.format.schema import Schema, check_metric_names
from trajstore.storage.packing import open_to_write
from trajstore.storage.writing.declaring import grow, stored_batches
from trajstore.storage.writing.late_metrics import LateSeries
from trajstore.storage.writing.slab_writer import Ledger
from trajstore.store import StoredExperiment

__all__ = ["compute_late"]

_TOGETHER = 64
"""States between two writes."""

Measure = Callable[[str, int, int], Mapping[str, float]]
"""(order, seed, step) → the value of each metric."""


def compute_late(
    stored: StoredExperiment,
    names: Sequence[str],
    measure: Measure,
    every: int = 1,
    threads: int | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> int:
    """Measure every `every`-th stored state that has no values yet, in all slabs; return how many were.

    States are measured by several threads. Values count as soon as they are written, a few dozen states at a time.
    """
    if every < 1:
        raise ConfigurationError(f"every is {every}; it must be at least 1")
    wanted = _wanted(stored, every)
    stored.store.place.make()  # refuses where nothing can be written
    group = _declared(stored, names)
    schema, done = Schema.of(group), 0
    with ThreadPoolExecutor(threads or os.cpu_count(), "trajstore-compute") as pool:
        for (i, k), steps in wanted.items():
            order, seed = schema.orders[i], schema.seeds[k]
            with stored.locked(order, seed):
                Ledger(group, schema, i, k)  # which keeps out whoever held the lock before
                series = {name: LateSeries(group, schema, (i, k), name) for name in names}
                known = {name: one.read()[0] for name, one in series.items()}  # a repair may take out one of them
                missing = [step for step in steps if not all(there[step] for there in known.values())]
                for begin in range(0, len(missing), _TOGETHER):
                    some = missing[begin : begin + _TOGETHER]
                    values = list(pool.map(lambda step, o=order, s=seed: measure(o, s, step), some))
                    for name in names:
                        new = [k for k, step in enumerate(some) if not known[name][step]]
                        series[name].put(np.array(some)[new], np.array([value[name] for value in values])[new])
                    done += len(some)
                    if progress is not None:
                        progress(len(some), f"{order}, seed {seed}")
    return done


def _wanted(stored: StoredExperiment, every: int) -> dict[tuple[int, int], list[int]]:
    """Return for each slab the steps of its stored states, every so many of them."""
    there, steps = stored.commits().snapshots, np.array(stored.schema.snapshots)
    chosen = steps % every == 0
    wanted = {(i, k): steps[there[i, k] & chosen].tolist() for i, k in np.ndindex(*there.shape[:2])}
    if not any(wanted.values()):
        raise StatisticError(
            f"experiment {stored.name!r}: no state is stored at a step that {every} divides, so nothing can be "
            "computed; ask for others, or record states more often"
        )
    return wanted


def _declared(stored: StoredExperiment, names: Sequence[str]) -> zarr.Group:
    """Declare the metrics that the experiment does not have yet, and return its group, to write to."""
    with stored.store.declaring():
        root = open_root(stored.store.place)
        group = open_to_write(root.store, stored.name)
        schema = Schema.of(group)
        if taken := [name for name in names if name in schema.metrics]:
            raise ConfigurationError(f"experiment {stored.name!r}: {taken[0]!r} was recorded with its steps")
        new = replace(schema, late=tuple(dict.fromkeys((*schema.late, *names))))
        if new != schema:
            check_metric_names(new)
            seeds = range(len(schema.seeds)) if schema.batch_size else ()
            indices = [stored_batches(group, schema, k) for k in seeds]
            grow(group, new, stored.config, indices)
    return group
