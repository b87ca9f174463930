"""The client's side: slabs are locked, cut into tasks, handed out, and committed as the tasks come back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from trajstore.engine.plan import Plan
from trajstore.engine.walk import Slab, Stretch
from trajstore.errors import WorkerError
from trajstore.recording.timing import Spent
from trajstore.recording.workers import worker
from trajstore.recording.workers.job import Gathered, Job, Shape
from trajstore.recording.workers.parts import bundles, parts_of
from trajstore.recording.workers.patience import Patience
from trajstore.storage.places.opening import place_of
from trajstore.storage.places.place import slab_lock
from trajstore.storage.writing.segment import Observation, Written
from trajstore.storage.writing.slab_writer import Ledger

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["fill"]

_TASKS_A_WORKER = 16
"""A recording is cut into about so many tasks per worker, so that none waits long for the last."""

Ledgers = Callable[[Sequence[Slab]], AbstractContextManager[Mapping[Slab, Ledger]]]


def fill(
    client: Client,
    job: Job,
    packs: Sequence[Sequence[Slab]],
    ledgers: Ledgers,
    progress: Callable[[int, str], None] | None,
    follow: Callable[[Plan, bool], None],
) -> Spent:
    """Record slabs, pack after pack, on workers, and return what these spent.

    `ledgers` locks the slabs of a pack and opens what says which of their segments count. `follow` is told, once, that
    a worker follows a slower plan, and whether it refused a fast way because it gave something else than its
    definition.
    """
    from distributed import CancelledError, KilledWorker

    with ExitStack() as held:
        filling = _Filling(client, job, ledgers, held, follow)
        waiting = list(packs)
        try:
            while waiting or filling.tasks:
                # The next pack is handed out before the last tasks of this one are done.
                while waiting and len(filling.tasks) <= filling.workers:
                    filling.hand_out(waiting.pop(0), len(packs))
                applications, where = filling.take()
                if progress is not None:
                    progress(applications, where)
        except KilledWorker as error:
            raise WorkerError(
                f"experiment {job.experiment.name!r}: workers died again and again at the same task ({error}); "
                "they may lack memory: use fewer, or none (--workers 0)"
            ) from None
        except CancelledError as error:
            raise WorkerError(
                f"experiment {job.experiment.name!r}: the scheduler has ended, or its tasks were cancelled ({error}); "
                "what was committed is kept; --resume continues with another"
            ) from None
        except BaseException:
            filling.give_up()  # a client that goes on would have tasks go on, and the locks are about to be freed
            raise
        return filling.spent


class _Task(NamedTuple):
    future: Any
    pack: _Pack
    applications: int
    where: str


class _Filling:
    """Hands out tasks, and takes what comes back."""

    def __init__(
        self, client: Client, job: Job, ledgers: Ledgers, held: ExitStack, follow: Callable[[Plan, bool], None]
    ) -> None:
        self._follow, self._followed = follow, job.plan
        self._client, self._job, self._ledgers, self._held = client, job, ledgers, held
        self._known: Any = client.submit(worker.itself, job, pure=False)
        # All get ready at once, not each when its first task comes.
        addresses = list(client.nthreads())  # type: ignore[no-untyped-call]
        self._ready: list[Any] = [
            client.submit(worker.get_ready, self._known, pure=False, workers=[a], priority=1) for a in addresses
        ]
        self._shape = Shape.of(job)
        self._packs = 0
        self._getting_ready = {future.key for future in (self._known, *self._ready)}
        self.spent = Spent()
        self._done: SimpleQueue[Any] = SimpleQueue()
        self.tasks: dict[Any, _Task] = {}
        self._patience = Patience(client, job.experiment.name, self._named)
        self.workers = max(1, sum(client.nthreads().values()))  # type: ignore[no-untyped-call]

    def hand_out(self, slabs: Sequence[Slab], packs: int) -> None:
        """Cut slabs into tasks and hand them out, behind those of earlier packs."""
        locks = self._held.enter_context(ExitStack())
        pack = _Pack(self._shape, locks.enter_context(self._ledgers(slabs)), locks)
        first = {"pure": False, "priority": -self._packs}
        name, labels = self._job.experiment.name, self._shape.schema.seeds
        locked = [slab_lock(name, str(slab.order), labels[slab.seed]) for slab in slabs]
        lent = place_of(self._job.store).held(locked)
        scouted = self._client.submit(worker.scout, self._known, tuple(slabs), **first)
        described = self._client.submit(worker.described, scouted, **first)
        self._getting_ready |= {scouted.key, described.key}
        stretches: list[Stretch] = self._patience.result(described)
        experiment, segment_of = self._job.experiment, self._shape.schema.segment_of
        whole = parts_of(stretches, experiment.asked, segment_of, sys.maxsize, pack.missing)
        share = max(1, sum(part.cost for part in whole) * packs // (_TASKS_A_WORKER * self.workers))
        parts = parts_of(stretches, experiment.asked, segment_of, 4 * share, pack.missing)
        for bundle in bundles(parts, share, 4 * self._job.plan.lanes if self._job.plan.lanes > 1 else 1):
            future: Any = self._client.submit(worker.compute, self._known, scouted, bundle, lent, **first)
            seeds = sorted({self._shape.schema.seeds[stretches[p.stretch].slabs[0].seed] for p in bundle})
            where = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
            self.tasks[future.key] = _Task(future, pack, sum(part.applications for part in bundle), where)
            pack.tasks += 1
            future.add_done_callback(self._done.put)
        self._packs += 1

    def take(self) -> tuple[int, str]:
        """Wait for a task and commit what it brings; return its operator applications, and where they were."""
        future = self._patience.take(self._done)
        gathered, spent, really, refused = self._patience.result(future)
        self.spent = self.spent.plus(spent)
        slower = not self._followed.slowed or (self._followed.compiled and not really.compiled)
        if really.slowed and slower:
            self._followed = really
            self._follow(really, refused)
        _, pack, applications, where = self.tasks.pop(future.key)
        for one in gathered:
            pack.take(one)
        pack.tasks -= 1
        if not pack.tasks:
            pack.finish()
            pack.locks.close()
        return applications, where

    def _named(self, key: str) -> str | None:
        """Say what a task is."""
        if key in self.tasks:
            return self.tasks[key].where
        return "to get ready" if key in self._getting_ready else None

    def give_up(self) -> None:
        """Take back what was handed out and has not begun."""
        for task in self.tasks.values():
            task.future.release()


class _Pack:
    """Slabs that are being recorded: their writers, and parts of segments that wait for the rest."""

    def __init__(self, shape: Shape, ledgers: Mapping[Slab, Ledger], locks: ExitStack) -> None:
        self.locks, self.tasks = locks, 0
        self._shape, self._ledgers = shape, ledgers
        self._halves: dict[tuple[Slab, int], list[Observation]] = {}
        self._whole: dict[Slab, set[int]] = {slab: set() for slab in ledgers}

    def missing(self, stretch: Stretch, segment: int) -> bool:
        """Tell whether a segment of any slab of a stretch is to be recorded."""
        return any(self._shape.missing(slab, segment) for slab in stretch.slabs)

    def take(self, gathered: Gathered) -> None:
        slab, segment, made = gathered
        if isinstance(made, Written):
            self._adopt(slab, made)
            return
        half = self._halves.setdefault((slab, segment), [])
        half += made
        if len(half) == self._shape.recorded[segment]:
            self._write(slab, segment)

    def finish(self) -> None:
        """Write the segments of which not every step is recorded: an adaptive grid leaves some out."""
        if self._shape.adaptive:
            for slab in self._ledgers:
                for segment in sorted(set(range(self._shape.schema.segments)) - self._whole[slab]):
                    if self._shape.missing(slab, segment):
                        self._write(slab, segment)

    def _write(self, slab: Slab, segment: int) -> None:
        self._adopt(slab, self._shape.write(slab, segment, self._halves.pop((slab, segment), [])))

    def _adopt(self, slab: Slab, written: Written) -> None:
        self._ledgers[slab].adopt(written)
        self._whole[slab].add(written.segment)
