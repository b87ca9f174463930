"""Fill slabs in this process: the engine's iterates, observed and handed to the slabs' writers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trajstore.engine import Engine
from trajstore.engine.refining import Refining
from trajstore.engine.walk import Progress, Slab, walk
from trajstore.experiment.experiment import Experiment
from trajstore.recording.measuring import Observer, parameters_of
from trajstore.recording.resuming import pack, unpack
from trajstore.recording.timing import Clock, Spent
from trajstore.storage.writing.pipeline import Pipeline
from trajstore.storage.writing.segment import Observation
from trajstore.storage.writing.slab_writer import Ledger, SlabWriter, arrays_written
from trajstore.store import StoredExperiment

__all__ = ["fill_here", "ledgers_of"]

_ON_THE_WAY = {"cuda": 4}
"""So many iterates may be leaving a device while the next are computed."""


def fill_here(
    stored: StoredExperiment, experiment: Experiment, slabs: Sequence[Slab], engine: Engine, device: torch.device
) -> Spent:
    """Record slabs in this process, together."""
    clock = Clock(engine)
    observe, wanted = Observer(experiment, stored.schema), experiment.refinement
    refined = engine if wanted is None else Refining(engine, wanted)
    starts: dict[int, Tensor] = {}
    before: dict[Slab, tuple[int, Tensor]] = {}
    leaving: deque[tuple[list[Slab], Progress, Callable[[], Observation]]] = deque()
    with ledgers_of(stored, slabs) as ledgers, _writers(ledgers, clock) as writers:
        decided = _decided if wanted else lambda ledger: ledger.committed.copy()
        done = {slab: decided(ledger) for slab, ledger in ledgers.items()}
        progress = {} if wanted else {s: p for s, ledger in ledgers.items() if (p := _progress(ledger, device))}
        asked = {slab: _still_wanted(experiment, done[slab], progress.get(slab)) for slab in slabs}

        def arrive() -> None:
            slabs, progress, finish = leaving.popleft()
            observed = finish()
            for slab in slabs:
                writers[slab].append(observed, resume=lambda: pack(progress))

        for visit in walk(slabs, experiment.steps, experiment.grid, refined, asked, progress):
            with clock.storing():
                here = parameters_of(visit.iterate.state)
                start = starts.setdefault(visit.slabs[0].seed, here)
                # Slabs that came the same way have the same iterate before, but some may be ahead.
                earlier = [before[slab] for slab in visit.slabs if slab in before]
                last = max((b for b in earlier if b[0] < visit.iterate.step), key=lambda b: b[0], default=None)
                before |= dict.fromkeys(visit.slabs, (visit.iterate.step, here))
                todo = [slab for slab in visit.slabs if not done[slab][visit.iterate.step]]
                if todo:
                    finish = observe.begin(
                        visit.iterate, visit.leg_start, here, start, None if last is None else last[1]
                    )
                    leaving.append((todo, visit.progress, finish))
                if len(leaving) > _ON_THE_WAY.get(here.device.type, 0):
                    arrive()
        with clock.storing():
            while leaving:
                arrive()
    return clock.spent()


def _progress(ledger: Ledger, device: torch.device) -> Progress | None:
    """Return how far a slab is, if it is known how to go on and nothing is missing before."""
    last = ledger.last_step
    if last < 0 or (ledger.records[: ledger.schema.segment_of(last), 0] < 0).any():
        return None
    found = ledger.slots.latest(last)
    return None if found is None else unpack(found[1], device)


def _decided(ledger: Ledger) -> NDArray[np.bool_]:
    """Return the steps that an adaptive grid has recorded or left out: after an extension it might choose others."""
    done: NDArray[np.bool_] = ledger.committed.copy()
    last = ledger.last_step
    for segment in np.flatnonzero(ledger.records[:, 0] >= 0).tolist():
        begin, end = ledger.schema.steps_of(segment)
        done[begin : min(end, last + 1)] = True
    return done


def _still_wanted(experiment: Experiment, done: NDArray[np.bool_], progress: Progress | None) -> Sequence[int]:
    """Return the steps to ask for: those that are missing, and each one's predecessor, to tell the distance to it."""
    if experiment.refinement is not None or not done.any():
        return experiment.asked
    grid = np.array(experiment.grid)
    missing = ~done[grid]
    needed = missing.copy()
    needed[:-1] |= missing[1:]
    if progress is not None:
        needed &= grid > progress.last.step
    return [int(step) for step in grid[needed]]


@contextmanager
def _writers(ledgers: Mapping[Slab, Ledger], clock: Clock) -> Iterator[dict[Slab, SlabWriter]]:
    """Open writers that share a pipeline; whatever happens, what is complete is committed."""
    pipeline = Pipeline()
    writers = {slab: SlabWriter(ledger, pipeline) for slab, ledger in ledgers.items()}
    try:
        yield writers
    except BaseException:
        with suppress(Exception):  # the first error is the one that matters
            for writer in writers.values():
                writer.commit()
        with suppress(Exception):  # when it is told, nothing is being written any more
            pipeline.close()
        raise
    with clock.storing():
        for writer in writers.values():
            writer.commit()
        pipeline.close()


@contextmanager
def ledgers_of(stored: StoredExperiment, slabs: Sequence[Slab]) -> Iterator[dict[Slab, Ledger]]:
    """Lock slabs and open what says which of their steps count."""
    schema = stored.schema
    with ExitStack() as locks:
        for order, position in slabs:
            locks.enter_context(stored.locked(str(order), schema.seeds[position]))
        group, arrays = stored.group, arrays_written(stored.group, schema)
        yield {
            slab: Ledger(group, schema, schema.orders.index(str(slab.order)), slab.seed, arrays=arrays)
            for slab in slabs
        }
