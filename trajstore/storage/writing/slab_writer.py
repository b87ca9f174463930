"""The writer of one slab: steps in, segments out.

Data is written and made durable first, the commit record last, so that at any moment the records describe
what is really there. A segment is committed when it is full, and in between after 4,096 steps or five
minutes: its record then counts its first steps, and the next one replaces it.

A segment may also be made somewhere else: whoever did wrote its states, and the slab's `Ledger` adopts what is
said of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from copy import copy
from functools import cached_property
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from trajstore._common.system import system_told
from trajstore.errors import ConfigurationError, ConflictError, DamageError, TrajstoreError, WriteError, slab_named
from trajstore.storage.format.codecs import write_block
from trajstore.storage.format.commits import Commits
from trajstore.storage.format.schema import Schema, late_records
from trajstore.storage.places.place import ReplacedError, keeper_of, slab_folder, slab_lock
from trajstore.storage.states import States
from trajstore.storage.writing.late_metrics import LateSeries
from trajstore.storage.writing.pipeline import Pipeline
from trajstore.storage.writing.resume_slots import ResumeSlots
from trajstore.storage.writing.segment import Corner, Cut, Observation, Segment, Spare, Written, array_of

__all__ = ["Ledger", "SlabWriter", "arrays_written", "discard_slab", "guarded"]

COMMIT_STEPS = 4_096
COMMIT_SECONDS = 300.0
ResumeState = Callable[[], bytes]
"""Makes the state from which a recording can go on after the step that it came with."""


class Ledger:
    """The commit records of one slab, and its series. Hold the slab's lock to write."""

    def __init__(
        self,
        group: zarr.Group,
        schema: Schema,
        order: int,
        seed: int,
        *,
        whole: bool = True,
        arrays: Mapping[str, zarr.Array[Any]] | None = None,
    ) -> None:
        """`whole` as of `Commits.of`: whoever repairs takes a slab as it is; `arrays` as of `arrays_written`."""
        self._store, self.group, self.schema, self.corner = keeper_of(group), group, schema, (order, seed)
        arrays = arrays or arrays_written(group, schema)
        self._committed_array = arrays["committed"]
        self.name = slab_named(group.basename, schema.orders[order], schema.seeds[seed])
        self._fence = 0 if group.store.read_only else guarded(group, schema, self.corner)
        commits = self._fenced(whole)
        self.records = commits.records[0, 0].copy()
        self.committed = commits.steps[0, 0].copy()
        """Over steps: recorded and committed."""
        self._at_hand: tuple[int, dict[int, Observation]] = (-1, {})
        """The segment that was read last, and its steps."""
        self.slots = ResumeSlots(group, schema.orders[order], schema.seeds[seed])
        self._series = {
            name: _Series(array, self.corner, self.committed) for name, array in arrays.items() if name != "committed"
        }

    @property
    def last_step(self) -> int:
        """The last committed step, −1 where there is none."""
        there = np.flatnonzero(self.committed)
        return int(there[-1]) if len(there) else -1

    def check(self) -> None:
        """Raise where the slab is not there any more."""
        self._store.check(slab_folder(self.group.path, self.corner))

    def segment(self, number: int, spare: Spare | None = None) -> Segment:
        """Return a segment with those of its steps that are committed, read back and checked."""
        return self._read(number, max(0, int(self.records[number, 0])), spare)[0]

    def read(self, number: int, counted: int = 0) -> Written:
        """Read a committed segment and check it; tell also what the record of its first steps was."""
        return self._read(number, counted, None)[1]

    def _read(self, number: int, counted: int, spare: Spare | None) -> tuple[Segment, Written]:
        segment = Segment(self.group, self.schema, self.corner, number, counted=counted, spare=spare)
        record = self.records[number].tolist()
        for rows in self._stored_rows(number) if record[0] > 0 else ():
            for row in rows:
                segment.append(row)
            written = segment.cut().written()
        if record[0] <= 0:
            return segment, segment.cut().written()
        if written.record != record or len(segment) != record[0]:
            raise DamageError(f"{self.steps_named(number)} differ from what was committed; {self._repair}")
        return segment, written

    def stored(self, step: int) -> Observation:
        """Return a committed step as it is stored."""
        number = self.schema.segment_of(step)
        if self._at_hand[0] != number:
            self._at_hand = number, {row[0]: row for rows in self._stored_rows(number) for row in rows}
        return self._at_hand[1][step]

    def _stored_rows(self, number: int) -> Iterator[list[Observation]]:
        """Yield the committed steps of a segment, some thousand at a time."""
        begin, end = self.schema.steps_of(number)
        places = {step: k for k, step in enumerate(self.schema.snapshots_of(number))}
        try:
            params, counters = self.states(number)
            for start in range(begin, end, COMMIT_STEPS):
                stop = min(start + COMMIT_STEPS, end)
                series = {name: one.read(start, stop) for name, one in self._series.items()}
                rows: list[Observation] = []
                for at in np.flatnonzero(self.committed[start:stop]).tolist():
                    bits, step = int(series["measured"][at]), start + at
                    measured = [name for bit, name in enumerate(self.schema.metrics) if bits >> bit & 1]
                    metrics = {name: float(series[name][at]) for name in measured}
                    state = (params[:, places[step]], counters[:, places[step]]) if step in places else None
                    rows.append(Observation(step, int(series["leg"][at]), metrics, series["sketch"][at], state))
                yield rows
        except TrajstoreError:
            raise
        except (ValueError, RuntimeError, IndexError) as error:  # the last where a document tells of a shorter array
            raise DamageError(f"{self.steps_named(number)} are damaged ({error}); {self._repair}") from None

    def adopt(self, written: Written, resume: bytes | None = None) -> None:
        """Commit a segment whose states are durable, in any order of segments."""
        before = self.records[written.segment].tolist()
        if before[0] >= 0 and before == written.record:
            return
        written.refuse_other(before, self.steps_named(written.segment))
        self._at_hand = -1, {}
        for name, values in written.series.items():
            self._series[name].put(written.steps, values)
        if resume is not None:
            self.slots.put(int(written.steps[-1]), resume, self.last_step)
        self._store.flush()
        self.records[written.segment] = written.record
        self._write_record(written.segment)
        self.committed[written.steps] = True

    def take_over(self, records: NDArray[np.int64]) -> None:
        """Commit segments by the records of another ledger, whose chunks were copied here."""
        self._store.flush()
        self.records[: len(records)] = records
        for segment in range(0, self.schema.segments, self._committed_array.chunks[2]):
            self._write_record(segment)

    def with_records_of(self, other: Ledger) -> Ledger:
        """Return this one as it will be when the records of another count, whose chunks were copied here; to read."""
        there = copy(self)
        there.records, there.committed = self.records.copy(), self.committed.copy()
        there.records[: len(other.records)] = other.records
        there.committed[: len(other.committed)] |= other.committed
        there._at_hand = -1, {}
        return there

    def discard(self, segments: Iterable[int]) -> None:
        """Have segments count no more: what was committed of them is lost."""
        for segment in segments:
            self.records[segment] = -1
            begin, end = self.schema.steps_of(segment)
            self.committed[begin:end] = False
        for segment in range(0, self.schema.segments, self._committed_array.chunks[2]):
            self._write_record(segment)

    def states(self, number: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the stored states of a segment, parameters and counters, one a column."""
        first = number * self.schema.snapshots_per_segment
        stop = first + len(self.schema.snapshots_of(number))
        where = (*self.corner, slice(None), slice(first, stop))
        params, counters = (array_of(self.group, name) for name in ("params", "counters"))
        return States.of(self._store.place, params, self.schema.codec)[where], np.asarray(counters[where])

    def _write_record(self, segment: int) -> None:
        """Replace the one chunk that holds a segment's record."""
        length = self._committed_array.chunks[2]
        start = segment // length * length
        records = self.records[start : start + length]
        fenced = np.column_stack([records, np.full(len(records), self._fence)])
        write_block(self._committed_array, (*self.corner, start, 0), fenced[None, None])
        self._store.flush()

    def _fenced(self, whole: bool) -> Commits:
        """Return the commit records, once whoever held the lock before can add nothing to them any more."""
        while True:
            commits = Commits.of(self.group, self.schema, self.corner, whole=whole)
            if commits.fence >= self._fence:
                return commits
            self.records = commits.records[0, 0]
            with suppress(ReplacedError):  # it did add something, just now
                for name in self.schema.late:
                    LateSeries(self.group, self.schema, self.corner, name).raise_fence(self._fence)
                for segment in range(0, self.schema.segments, self._committed_array.chunks[2]):
                    self._write_record(segment)

    def steps_named(self, number: int) -> str:
        """Name a segment for a message."""
        begin, end = self.schema.steps_of(number)
        return f"{self.name}: steps {begin} to {end - 1}"

    @property
    def _repair(self) -> str:
        return f"`trajstore verify --repair` takes them out, and {self.schema.again} writes them again"


def arrays_written(group: zarr.Group, schema: Schema) -> dict[str, zarr.Array[Any]]:
    """Open what ledgers write to, for several of them: the commit records, and what lies along steps."""
    series = [spec.name for spec in schema.arrays() if "step" in spec.dims and spec.name not in schema.late]
    return {name: array_of(group, name) for name in ("committed", *series)}


def discard_slab(group: zarr.Group, schema: Schema, corner: Corner) -> None:
    """Have nothing of a slab count any more whose records cannot be read. Hold the slab's lock."""
    fence, array = guarded(group, schema, corner), array_of(group, "committed")
    for start in range(0, schema.segments, array.chunks[2]):
        records = np.full((min(array.chunks[2], schema.segments - start), array.shape[-1]), -1, dtype=np.int64)
        records[:, -1] = fence
        write_block(array, (*corner, start, 0), records[None, None])
    keeper_of(group).flush()


def guarded(group: zarr.Group, schema: Schema, corner: Corner) -> int:
    """Have a slab's chunks written only under its lock; return the fence of that."""
    order, seed = schema.orders[corner[0]], schema.seeds[corner[1]]
    arrays = [spec.name for spec in schema.arrays() if {"order", "seed"} <= set(spec.dims)]
    records = ["committed", *map(late_records, schema.late)]
    chunks = {name: f"{group.path}/{name}/c/{corner[0]}/{corner[1]}" for name in arrays}
    slots = [f"{group.path}/{path}" for path in ResumeSlots(group, order, seed).paths]
    return keeper_of(group).guard(
        slab_lock(group.basename, order, seed), [*chunks.values(), *slots], [chunks[name] for name in records]
    )


class SlabWriter:
    """Writes the steps of one slab, in increasing order, through a pipeline. Hold the slab's lock."""

    def __init__(self, ledger: Ledger, pipeline: Pipeline) -> None:
        self.ledger, self._pipeline = ledger, pipeline
        self._schema = ledger.schema
        self.last = ledger.last_step
        """The last step that was appended or committed."""
        self._segment: Segment | None = None
        self._counted, self._since = 0, time.monotonic()
        self._passed = -1
        """The last step that was appended."""
        self._committed_to = -1
        """The last step of the present segment that was committed when it was begun."""
        self._resume: ResumeState | None = None
        self._encoding: list[Future[None]] = []

    def append(self, observed: Observation, resume: ResumeState | None = None) -> None:
        """Record a step; one that is committed must be what is stored."""
        self._pipeline.check()
        step = observed.step
        if step <= self.last and (step <= self._passed or self.ledger.committed[step]):
            self._compare(observed)
            return
        number = self._schema.segment_of(step)
        if self._segment is None or number != self._segment.number:
            self._go_to(number)
        assert self._segment is not None
        if step <= self._committed_to:
            raise ConfigurationError(f"{self.ledger.name}: step {step} was passed over; steps must increase")
        self._segment.append(observed)
        self.last, self._passed, self._resume = max(step, self.last), step, resume
        if len(self._segment) - self._counted >= COMMIT_STEPS or time.monotonic() - self._since > COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Have everything so far made durable, then true."""
        if self._segment is not None and len(self._segment) > self._counted:
            self._submit(self._segment)
            self._counted, self._since = len(self._segment), time.monotonic()

    def _go_to(self, number: int) -> None:
        """Begin a segment; those passed over without a recorded step count too, as empty."""
        if self._segment is not None:
            passed = self._segment
            self.commit()
            self._release(passed)
            for empty in range(passed.number + 1, number):
                self._declare_empty(empty)
        else:
            for empty in range(number):
                self._declare_empty(empty)
        self._segment = self.ledger.segment(number, self._pipeline.spare)
        begin, end = self._schema.steps_of(number)
        there = np.flatnonzero(self.ledger.committed[begin:end])
        self._committed_to = begin + int(there[-1]) if len(there) else -1
        self._counted, self._since = len(self._segment), time.monotonic()
        self._encoding = []

    def _declare_empty(self, number: int) -> None:
        if self.ledger.records[number, 0] < 0:
            self._submit(self.ledger.segment(number))

    def _submit(self, segment: Segment) -> None:
        self.ledger.check()
        cut = segment.cut()
        resume = None if self._resume is None or not cut.rows else self._resume()
        blocks = [self._named(block, cut) for block in cut.blocks()]
        finish = self._named(lambda: self.ledger.adopt(cut.written(), resume), cut)
        self._encoding = self._pipeline.submit(blocks, finish, self._encoding)

    def _release(self, segment: Segment) -> None:
        self._pipeline.submit([], segment.release)

    def _named(self, work: Callable[[], None], cut: Cut) -> Callable[[], None]:
        """Have what goes wrong with files say to whom it happened."""

        def named() -> None:
            try:
                work()
            except WriteError:
                raise
            except (OSError, KeyError) as error:
                self.ledger.check()  # moved in this moment: nothing of it is found any more
                if not isinstance(error, OSError):
                    raise
                steps = f"steps {cut.rows[0].step} to {cut.rows[-1].step}" if cut.rows else "a segment"
                raise WriteError(
                    f"{self.ledger.name}: {steps} could not be written ({system_told(error)}); "
                    f"what was committed before is kept; {self._schema.again} continues"
                ) from error

        return named

    def _compare(self, observed: Observation) -> None:
        """Refuse a step that is recorded with other content."""
        self.commit()
        self._pipeline.drain()
        if not self.ledger.committed[observed.step]:
            raise ConfigurationError(f"{self.ledger.name}: step {observed.step} was passed over; steps must increase")
        if self.ledger.stored(observed.step).bits() != observed.bits():
            raise ConflictError(
                f"{self.ledger.name}: step {observed.step} is recorded already, with other content; "
                "what is committed never changes"
            )


class _Series:
    """One slab's values of an array along `step`; the chunk that was written last stays in memory."""

    def __init__(self, array: zarr.Array[Any], corner: Corner, committed: NDArray[np.bool_]) -> None:
        self._array, self._corner, self._committed = array, corner, committed
        self._length = array.chunks[2]
        self._chunk = -1

    def put(self, steps: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Write values at steps, chunk by chunk."""
        chunks = steps // self._length
        for chunk in np.unique(chunks).tolist():
            here = chunks == chunk
            if chunk != self._chunk:
                self._load(chunk)
            self._buffer[steps[here] - chunk * self._length] = values[here]
            start, width = chunk * self._length, self._width(chunk)
            corner = (*self._corner, start, *(0 for _ in self._array.shape[3:]))
            write_block(self._array, corner, self._buffer[:width][None, None])

    def read(self, begin: int, end: int) -> NDArray[Any]:
        """Return the stored values of some steps."""
        return np.asarray(self._array[(*self._corner, slice(begin, end))])

    @cached_property
    def _buffer(self) -> NDArray[Any]:
        return np.empty((self._length, *self._array.chunks[3:]), self._array.dtype)

    def _load(self, chunk: int) -> None:
        """Read what is committed of a chunk; what a recording that died left beside it does not count."""
        start, width = chunk * self._length, self._width(chunk)
        keep = self._committed[start : start + width]
        self._buffer.fill(self._array.fill_value)
        if keep.any():
            self._buffer[:width][keep] = self.read(start, start + width)[keep]
        self._chunk = chunk

    def _width(self, chunk: int) -> int:
        return min(self._length, len(self._committed) - chunk * self._length)
