"""A recording as its workers see it: what is to be done, and the store in which it is written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import zarr
from numpy.typing import NDArray

from trajstore.engine.plan import Plan
from trajstore.engine.walk import Slab
from trajstore.errors import slab_named
from trajstore.experiment.experiment import Experiment
from trajstore.recording.timing import Spent
from trajstore.storage.format.commits import Commits
from trajstore.storage.format.schema import Schema
from trajstore.storage.places.opening import place_of
from trajstore.storage.places.place import Durability, keeper_of
from trajstore.storage.writing.segment import Observation, Segment, Written, array_of
from trajstore.storage.writing.slab_writer import guarded

__all__ = ["Brought", "Gathered", "Job", "Shape"]


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


class Brought(NamedTuple):
    """What comes back of a task."""

    gathered: Sequence[Gathered]
    spent: Spent
    plan: Plan
    """The plan that the worker really follows."""
    refused: bool
    """Whether it is another because a fast way gave something else than its definition."""


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
        # Another worker may have written it meanwhile, where the scheduler took this one for dead.
        before = np.asarray(array_of(self.group, "committed")[(*corner, number)]).tolist()[:-1]
        segment = Segment(self.group, self.schema, corner, number, counted=max(0, before[0]))
        for observation in sorted(observations, key=lambda o: o.step):
            segment.append(observation)
        cut = segment.cut()
        written = cut.written()
        written.refuse_other(before, self._named(slab, number))
        for block in cut.blocks() if written.record != before else ():
            block()
        keeper_of(self.group).flush()
        return written

    def _named(self, slab: Slab, number: int) -> str:
        begin, end = self.schema.steps_of(number)
        name = slab_named(self.group.basename, str(slab.order), self.schema.seeds[slab.seed])
        return f"{name}, steps {begin} to {end - 1}"

    def _order(self, slab: Slab) -> int:
        return self.schema.orders.index(str(slab.order))
