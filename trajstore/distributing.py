"""Computing a recording on Dask workers: processes of this machine, or a cluster that is there already.

The client holds the slabs' locks, hands out bundles of parts, and commits. A worker computes a part, and
where the part is a whole segment it encodes and writes the states itself, so that only the series travel. What a
worker that dies had in hand is computed again by another.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from trajstore.engine import Iterate
from trajstore.engine.parts import Part, bundles, parts_of, work_to
from trajstore.engine.plan import Plan, ready
from trajstore.engine.refining import Refining
from trajstore.engine.walk import Slab, Stretch, stretches_of
from trajstore.errors import ConfigurationError, WorkerError
from trajstore.experiment import Experiment
from trajstore.observing import Observer, parameters_of
from trajstore.planning import run_seeds
from trajstore.spending import Clock, Spent
from trajstore.storage.place import Durability, keeper_of, place_of, slab_lock
from trajstore.storage.reader import Commits
from trajstore.storage.schema import Schema
from trajstore.storage.segment import Observation, Segment, Written
from trajstore.storage.writer import Ledger, guarded

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Job", "connected", "connected_to", "fill"]

_PATIENCE = 20
"""Seconds to wait for a scheduler to answer."""
_TASKS_A_WORKER = 16
"""A recording is cut into about so many tasks for each worker, so that none waits long for the last."""


@dataclass(frozen=True)
class Job:
    """What a worker needs to know of a recording."""

    id: str
    experiment: Experiment
    store: str
    durability: Durability
    plan: Plan
    device: str


class Gathered(NamedTuple):
    """What became of a slab's steps: a segment that was written, or observations of a part of one."""

    slab: Slab
    segment: int
    made: Written | list[Observation]


@contextmanager
def connected(workers: int) -> Iterator[Client]:
    """Start worker processes here. They end with the context, or when this process is no more."""
    from distributed import Client, Scheduler, SpecCluster
    from distributed.deploy.subprocess import SubprocessWorker

    # Processes of their own, which do not run the caller's main module again as multiprocessing would.
    options: dict[str, Any] = {"nthreads": 1, "memory_limit": 0, "silence_logs": logging.CRITICAL}
    # Importing torch takes seconds: all do it at once, before the first needs it.
    options |= {"preload_nanny": ["trajstore._ends_with_parent"], "preload": ["trajstore.distributing"]}
    worker = {"cls": SubprocessWorker, "options": {"worker_kwargs": options}}
    own = {"cls": Scheduler, "options": {"host": "127.0.0.1", "port": 0, "dashboard_address": "127.0.0.1:0"}}
    with (
        _quiet(),
        _set(),
        SpecCluster(dict.fromkeys(range(workers), worker), scheduler=own, silence_logs=False) as cluster,  # type: ignore[no-untyped-call]
        Client(cluster, set_as_default=False) as client,  # type: ignore[no-untyped-call]
    ):
        client.wait_for_workers(workers, timeout=120)
        yield client


@contextmanager
def connected_to(scheduler: str) -> Iterator[Client]:
    """Connect to a scheduler that is there already."""
    from distributed import Client

    with _quiet():
        try:
            client = Client(scheduler, timeout=_PATIENCE, set_as_default=False)  # type: ignore[no-untyped-call]
        except (OSError, ValueError) as error:
            told = " ".join(str(error).split())
            raise ConfigurationError(f"no Dask scheduler answers at {scheduler!r}: {told}") from None
        with client:
            yield client


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Dask from telling of every connection; what concerns a recording comes as an error."""
    logger = logging.getLogger("distributed")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


_SETTINGS = {
    # Dask's profiler would stop the computing thread a hundred times a second.
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
    # A worker's own process says what it loads before it has read that it is to be quiet.
    "DASK_LOGGING__DISTRIBUTED": "critical",
}


@contextmanager
def _set() -> Iterator[None]:
    """Start workers with settings of Dask that can only be given in their environment."""
    before = {name: os.environ.get(name) for name in _SETTINGS}
    os.environ.update(_SETTINGS)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


Ledgers = Callable[[Sequence[Slab]], AbstractContextManager[Mapping[Slab, Ledger]]]


def fill(
    client: Client,
    job: Job,
    packs: Sequence[Sequence[Slab]],
    ledgers: Ledgers,
    progress: Callable[[int, str], None] | None,
) -> Spent:
    """Record slabs, pack after pack, on workers, and return what these spent.

    `ledgers` locks the slabs of a pack and opens what says which of their segments count.
    """
    from distributed import KilledWorker

    with ExitStack() as held:
        filling = _Filling(client, job, ledgers, held)
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
                "they may lack memory: ask for fewer, or record with --workers 0"
            ) from None
        return filling.spent


class _Task(NamedTuple):
    pack: _Pack
    applications: int
    where: str


class _Filling:
    """Hands out tasks, and takes what comes back."""

    def __init__(self, client: Client, job: Job, ledgers: Ledgers, held: ExitStack) -> None:
        from distributed import as_completed

        self._client, self._job, self._ledgers, self._held = client, job, ledgers, held
        self._known = client.submit(_itself, job, pure=False)
        # All get ready at once, not each when its first task comes.
        addresses = list(client.nthreads())  # type: ignore[no-untyped-call]
        self._ready = [client.submit(_get_ready, self._known, pure=False, workers=[a], priority=1) for a in addresses]
        self._shape = Shape.of(job)
        self._packs = 0
        self.spent = Spent()
        self._done: Any = as_completed(loop=client.loop)  # type: ignore[no-untyped-call]
        self.tasks: dict[Any, _Task] = {}
        self.workers = max(1, sum(client.nthreads().values()))  # type: ignore[no-untyped-call]

    def hand_out(self, slabs: Sequence[Slab], packs: int) -> None:
        """Cut slabs into tasks and hand them out, behind those of earlier packs."""
        locks = self._held.enter_context(ExitStack())
        pack = _Pack(self._shape, locks.enter_context(self._ledgers(slabs)), locks)
        first = {"pure": False, "priority": -self._packs}
        name, labels = self._job.experiment.name, self._shape.schema.seeds
        locked = [slab_lock(name, str(slab.order), labels[slab.seed]) for slab in slabs]
        lent = place_of(self._job.store).held(locked)
        scouted = self._client.submit(_scout, self._known, tuple(slabs), **first)
        stretches: list[Stretch] = self._client.submit(_described, scouted, **first).result()
        experiment, segment_of = self._job.experiment, self._shape.schema.segment_of
        whole = parts_of(stretches, experiment.asked, segment_of, sys.maxsize, pack.missing)
        share = max(1, sum(part.cost for part in whole) * packs // (_TASKS_A_WORKER * self.workers))
        parts = parts_of(stretches, experiment.asked, segment_of, 4 * share, pack.missing)
        for bundle in bundles(parts, share, 4 * self._job.plan.lanes if self._job.plan.lanes > 1 else 1):
            future = self._client.submit(_compute, self._known, scouted, bundle, lent, **first)
            seeds = sorted({self._shape.schema.seeds[stretches[p.stretch].slabs[0].seed] for p in bundle})
            where = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
            self.tasks[future.key] = _Task(pack, sum(part.applications for part in bundle), where)
            pack.tasks += 1
            self._done.add(future)
        self._packs += 1

    def take(self) -> tuple[int, str]:
        """Wait for a task and commit what it brings; return its operator applications, and where they were."""
        future = next(self._done)
        gathered, spent = future.result()
        self.spent = self.spent.plus(spent)
        pack, applications, where = self.tasks.pop(future.key)
        for one in gathered:
            pack.take(one)
        pack.tasks -= 1
        if not pack.tasks:
            pack.finish()
            pack.locks.close()
        return applications, where


@dataclass(frozen=True)
class Shape:
    """The stored experiment as writers of segments see it."""

    group: zarr.Group
    schema: Schema
    records: NDArray[np.int64]
    """The commit records when the job began: (order, seed, segment, field)."""
    recorded: Mapping[int, int]
    """Segment → how many of its steps are recorded, at most where the grid is adaptive."""
    adaptive: bool

    @classmethod
    def of(cls, job: Job) -> Shape:
        """Open the store of a job."""
        keeper = place_of(job.store).keeper(read_only=False, durability=job.durability)
        group = zarr.open_group(keeper, path=job.experiment.name, mode="r+", zarr_format=3)
        schema, recorded = Schema.of(group), dict[int, int]()
        for step in job.experiment.grid:
            segment = schema.segment_of(step)
            recorded[segment] = recorded.get(segment, 0) + 1
        records = Commits.of(group, schema).records
        return cls(group, schema, records, recorded, job.experiment.refinement is not None)

    def missing(self, slab: Slab, number: int) -> bool:
        """Tell whether steps of a segment were not committed when the job began."""
        record = self.records[self._order(slab), slab.seed, number]
        return bool(record[0] < (0 if self.adaptive else self.recorded.get(number, 0)))

    def write(self, slab: Slab, number: int, observations: Sequence[Observation]) -> Written:
        """Write the states of a whole segment."""
        corner = self._order(slab), slab.seed
        guarded(self.group, self.schema, corner)
        before = self.records[(*corner, number)].tolist()
        segment = Segment(self.group, self.schema, corner, number, counted=max(0, before[0]))
        for observation in sorted(observations, key=lambda o: o.step):
            segment.append(observation)
        cut = segment.cut()
        written = cut.written()
        written.refuse_other(before, f"experiment {self.group.basename!r}, order {slab.order}, segment {number}")
        for block in cut.blocks():
            block()
        keeper_of(self.group).flush()
        return written

    def _order(self, slab: Slab) -> int:
        return self.schema.orders.index(str(slab.order))


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


def _keep_memory() -> None:
    """Let the C library keep what is freed, for the next tensor.

    Dask has it returned at once (MALLOC_TRIM_THRESHOLD_), and every large tensor then begins with page faults, which
    costs a third of the time.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # the GNU C library
        library.mallopt(_M_MMAP_THRESHOLD, 2**26)
        library.mallopt(_M_TRIM_THRESHOLD, 2**28)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class _Workshop:
    """What a worker process keeps of a job between its tasks."""

    def __init__(self, job: Job) -> None:
        _keep_memory()
        torch.set_num_threads(job.plan.threads)
        self._job = job
        live = job.experiment.problem.build(torch.device(job.device))
        _, self.engine = ready(job.plan, live, job.experiment.operator, run_seeds(job.experiment))
        wanted = job.experiment.refinement
        self._refined = self.engine if wanted is None else Refining(self.engine, wanted)
        self._starts: dict[int, torch.Tensor] = {}

    @cached_property
    def shape(self) -> Shape:
        return Shape.of(self._job)

    @cached_property
    def observe(self) -> Observer:
        return Observer(self._job.experiment, self.shape.schema)

    def gather(self, stretches: Sequence[Stretch], parts: Sequence[Part]) -> tuple[list[Gathered], Spent]:
        """Compute parts; write the segments that are whole."""
        clock = Clock(self.engine)
        works, roles = [], []
        for k, part in enumerate(parts):
            first = part.steps[0]
            if part.before is not None and work_to(stretches, part.before).steps:
                if part.before[0] == part.stretch:
                    first = part.before[1]  # one work, so that what lies in between can be refined
                else:
                    works.append(work_to(stretches, part.before))
                    roles.append((k, sys.maxsize))
            works.append(stretches[part.stretch].work([n for n in sorted({first, *part.steps}) if n > 0]))
            roles.append((k, part.steps[0] if first == part.steps[0] else first + 1))
        before: dict[int, torch.Tensor] = {}
        early: dict[int, list[Iterate]] = {}
        """Iterates that came before the one before them: a new leg's chains are the shorter ones."""
        gathered: list[Gathered] = []
        desks: dict[tuple[int, int], list[Observation]] = {}

        def observe(k: int, iterate: Iterate) -> None:
            with clock.storing():
                observe_and_write(k, iterate)

        def observe_and_write(k: int, iterate: Iterate) -> None:
            stretch, here = stretches[parts[k].stretch], parameters_of(iterate.state)
            start = self._starts[stretch.slabs[0].seed]
            observed = self.observe(iterate, stretch.leg.start, here, start, before.get(k))
            before[k] = here
            number = self.shape.schema.segment_of(iterate.step)
            desk = desks.setdefault((k, number), [])
            desk.append(observed)
            if len(desk) == self.shape.recorded[number]:
                del desks[k, number]
                slabs = [s for s in stretch.slabs if self.shape.missing(s, number)]
                gathered.extend(Gathered(s, number, self.shape.write(s, number, desk)) for s in slabs)

        for k, part in enumerate(parts):
            seed = stretches[part.stretch].slabs[0].seed
            origin = self.engine.start(seed)
            self._starts.setdefault(seed, parameters_of(origin.state))
            if part.before is None:
                observe(k, origin)
            elif not work_to(stretches, part.before).steps:
                before[k] = parameters_of(stretches[part.before[0]].last.state)
        for w, iterate in self._refined.run(works):
            k, shown_from = roles[w]
            if iterate.step < shown_from:
                before[k] = parameters_of(iterate.state)
                for waiting in early.pop(k, []):
                    observe(k, waiting)
            elif k not in before:
                early.setdefault(k, []).append(iterate)
            else:
                observe(k, iterate)
        for (k, number), desk in desks.items():
            slabs = [s for s in stretches[parts[k].stretch].slabs if self.shape.missing(s, number)]
            gathered += [Gathered(slab, number, desk) for slab in slabs]
        return gathered, clock.spent()


_workshops: dict[str, _Workshop] = {}
_one_at_a_time = threading.Lock()


def _workshop(job: Job) -> _Workshop:
    if job.id not in _workshops:
        _workshops.clear()
        _workshops[job.id] = _Workshop(job)
    return _workshops[job.id]


def _itself(job: Job) -> Job:
    return job


def _get_ready(job: Job) -> None:
    with _one_at_a_time:
        _workshop(job)


def _scout(job: Job, slabs: Sequence[Slab]) -> list[Stretch]:
    with _one_at_a_time:
        return stretches_of(slabs, job.experiment.steps, _workshop(job).engine)


def _described(stretches: Sequence[Stretch]) -> list[Stretch]:
    """Leave the states on the worker."""
    from dataclasses import replace

    from trajstore.state import State

    nothing = State({}, {}, {}, torch.tensor(0))
    return [replace(s, last=s.last._replace(state=nothing)) for s in stretches]


def _compute(
    job: Job, stretches: Sequence[Stretch], parts: Sequence[Part], lent: Sequence[object]
) -> tuple[list[Gathered], Spent]:
    place_of(job.store).lend(lent)
    with _one_at_a_time:
        return _workshop(job).gather(stretches, parts)
