"""The worker's side: a process keeps the problem, built and compiled, between the tasks of a job."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch

from trajstore.engine import Iterate
from trajstore.engine.plan import followed, ready
from trajstore.engine.refining import Refining
from trajstore.engine.walk import Slab, Stretch, stretches_of
from trajstore.operators.state import State
from trajstore.recording.measuring import Observer, parameters_of
from trajstore.recording.timing import Clock
from trajstore.recording.workers.job import Brought, Gathered, Job, Shape
from trajstore.recording.workers.parts import Part, work_to
from trajstore.storage.places.place import keeper_of
from trajstore.storage.writing.segment import Observation

__all__ = ["compute", "described", "get_ready", "itself", "scout"]


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
        self._plan, self.engine = ready(job.plan, live, job.experiment.operator, job.experiment.run_seeds)
        wanted = job.experiment.refinement
        self._refined = self.engine if wanted is None else Refining(self.engine, wanted)
        self._starts: dict[int, torch.Tensor] = {}

    @cached_property
    def shape(self) -> Shape:
        return Shape.of(self._job)

    @cached_property
    def observe(self) -> Observer:
        return Observer(self._job.experiment, self.shape.schema)

    def gather(self, stretches: Sequence[Stretch], parts: Sequence[Part], lent: Sequence[object]) -> Brought:
        """Compute parts; write the segments that are whole."""
        keeper_of(self.shape.group).lend(lent)
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
        return Brought(gathered, clock.spent(), followed(self._plan, self.engine), bool(self.engine.refusals))


_workshops: dict[str, _Workshop] = {}
_one_at_a_time = threading.Lock()


def _workshop(job: Job) -> _Workshop:
    if job.id not in _workshops:
        _workshops.clear()
        _workshops[job.id] = _Workshop(job)
    return _workshops[job.id]


def itself(job: Job) -> Job:
    """Put a job where every worker finds it."""
    return job


def get_ready(job: Job) -> None:
    """Build and compile, before the first task comes."""
    with _one_at_a_time:
        _workshop(job)


def scout(job: Job, slabs: Sequence[Slab]) -> list[Stretch]:
    """Find the stretches of slabs, and where resets put them."""
    with _one_at_a_time:
        return stretches_of(slabs, job.experiment.steps, _workshop(job).engine)


def described(stretches: Sequence[Stretch]) -> list[Stretch]:
    """Leave the states on the worker."""
    nothing = State({}, {}, {}, torch.tensor(0))
    return [replace(s, last=s.last._replace(state=nothing)) for s in stretches]


def compute(job: Job, stretches: Sequence[Stretch], parts: Sequence[Part], lent: Sequence[object]) -> Brought:
    """Compute parts, under the locks that the client lends."""
    with _one_at_a_time:
        return _workshop(job).gather(stretches, parts, lent)
