"""The writer of one slab: steps in, segments out.

Data is written and made durable first, the commit record last, so that at any moment the records describe
what is really there. A segment is committed when it is full, and in between after 4,096 steps or five
minutes: its record then counts its first steps, and the next one replaces it.

A segment may also be made somewhere else: a `Segment` writes its states by itself, and the slab's one writer
adopts what it says of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import zarr
from numpy.typing import NDArray

from trajstore.storage.codecs import write_block
from trajstore.storage.digest import SegmentDigest
from trajstore.storage.local import DurableStore
from trajstore.storage.schema import COMMIT_FIELDS, Schema

__all__ = ["Segment", "SlabWriter", "Written"]

COMMIT_STEPS = 4_096
COMMIT_SECONDS = 300.0
Corner = tuple[int, int]
"""Positions of the slab's order and seed."""


class Written(NamedTuple):
    """A segment whose states are durable: its series, and what its commit record will say."""

    segment: int
    steps: NDArray[np.int64]
    series: dict[str, NDArray[Any]]
    """Name of an array along `step` → its values at these steps."""
    record: list[int]


class Segment:
    """The recorded steps of one segment, kept until they are written."""

    def __init__(self, group: zarr.Group, schema: Schema, corner: Corner, number: int) -> None:
        self._group, self._schema, self._corner, self.number = group, schema, corner, number
        self._digest = SegmentDigest()
        self._steps: list[tuple[int, int, int, NDArray[np.float64], NDArray[np.float64]]] = []
        self._snapshots = 0
        self._states: dict[str, NDArray[Any]] = {}
        """Flat states, one a row."""

    def __len__(self) -> int:
        return len(self._steps)

    def append(
        self,
        step: int,
        leg: int,
        metrics: Mapping[str, float],
        sketch: NDArray[np.float64],
        snapshot: tuple[NDArray[Any], NDArray[np.int64]] | None,
    ) -> None:
        """Add one step; a snapshot is copied."""
        names = self._schema.metrics
        measured = sum(1 << k for k, name in enumerate(names) if name in metrics)
        values = np.array([metrics.get(name, np.nan) for name in names], dtype=np.float64)
        self._steps.append((step, leg, measured, values, sketch))
        self._digest.add(step, leg, measured, values, sketch, snapshot)
        if snapshot is not None:
            place = self._places.index(step)
            for name, row in zip(("params", "counters"), snapshot, strict=True):
                if name not in self._states:
                    nothing = _array(self._group, name).fill_value
                    self._states[name] = np.full((len(self._places), len(row)), nothing, row.dtype)
                self._states[name][place] = row
            self._snapshots += 1

    @cached_property
    def _places(self) -> Sequence[int]:
        """The steps that have a place for a snapshot in this segment."""
        first = self.number * self._schema.snapshots_per_segment
        return self._schema.snapshots[first : first + self._schema.snapshots_per_segment]

    def write_states(self) -> Written:
        """Write the states so far and make them durable; the record is for the slab's writer to commit."""
        first = self.number * self._schema.snapshots_per_segment
        for name, rows in self._states.items():
            array = _array(self._group, name)
            for begin in range(0, rows.shape[1], array.chunks[2]):
                block = _transposed(rows[:, begin : begin + array.chunks[2]])
                write_block(array, (*self._corner, begin, first), block[None, None])
        assert isinstance(self._group.store, DurableStore)
        self._group.store.flush()
        record = [len(self._steps), self._snapshots, *self._digest.words().tolist()]
        if not self._steps:
            return Written(self.number, np.array([], dtype=np.int64), {}, record)
        steps, leg, measured, values, sketch = zip(*self._steps, strict=True)
        series = {"leg": np.array(leg), "measured": np.array(measured), "sketch": np.stack(sketch)}
        series |= dict(zip(self._schema.metrics, np.stack(values).T, strict=True))
        return Written(self.number, np.array(steps), series, record)


class SlabWriter:
    """Writes one (order, seed), from step 0 on. Hold the slab's lock."""

    def __init__(self, group: zarr.Group, schema: Schema, order: int, seed: int) -> None:
        store = group.store
        assert isinstance(store, DurableStore)
        self._store, self._group, self._schema, self._corner = store, group, schema, (order, seed)
        self._series = {
            spec.name: _Series(_array(group, spec.name), order, seed) for spec in schema.arrays() if "step" in spec.dims
        }
        self._committed = _array(group, "committed")
        self._records = np.full((schema.segments, len(COMMIT_FIELDS)), -1, dtype=np.int64)
        self._counted, self._since = 0, time.monotonic()
        self._begin_segment(0)
        for segment in range(0, schema.segments, self._committed.chunks[2]):
            self._write_record(segment)  # whatever an earlier, unfinished recording left does not count any more

    def append(
        self,
        step: int,
        leg: int,
        metrics: Mapping[str, float],
        sketch: NDArray[np.float64],
        snapshot: tuple[NDArray[Any], NDArray[np.int64]] | None,
    ) -> None:
        """Record the next step."""
        number = self._schema.segment_of(step)
        while number != self._segment.number:  # a segment without a recorded step counts too, as empty
            if len(self._segment):
                self.commit()
            else:
                self.adopt(self._segment.write_states())
            self._begin_segment(self._segment.number + 1)
        self._segment.append(step, leg, metrics, sketch, snapshot)
        if len(self._segment) - self._counted >= COMMIT_STEPS or time.monotonic() - self._since > COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Make everything so far durable, then true."""
        if len(self._segment) > self._counted:
            self.adopt(self._segment.write_states())
            self._counted, self._since = len(self._segment), time.monotonic()

    def adopt(self, written: Written) -> None:
        """Commit a segment whose states are durable, in any order of segments."""
        for name, values in written.series.items():
            self._series[name].put(written.steps, values)
        self._store.flush()
        self._records[written.segment] = written.record
        self._write_record(written.segment)

    def _begin_segment(self, number: int) -> None:
        self._segment = Segment(self._group, self._schema, self._corner, number)
        self._counted, self._since = 0, time.monotonic()

    def _write_record(self, segment: int) -> None:
        """Replace the one chunk that holds a segment's record."""
        length = self._committed.chunks[2]
        start = segment // length * length
        write_block(self._committed, (*self._corner, start, 0), self._records[start : start + length][None, None])
        self._store.flush()


class _Series:
    """One slab's values of an array along `step`; the chunk that was written last stays in memory."""

    def __init__(self, array: zarr.Array[Any], order: int, seed: int) -> None:
        self._array, self._corner = array, (order, seed)
        self._length = array.chunks[2]
        self._buffer = np.full((self._length, *array.chunks[3:]), array.fill_value, array.dtype)
        self._chunk = -1
        self._written: set[int] = set()
        """Chunks of this recording; what an earlier one left is written over."""

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
            self._written.add(chunk)

    def _load(self, chunk: int) -> None:
        self._chunk = chunk
        self._buffer.fill(self._array.fill_value)
        if chunk in self._written:
            start, width = chunk * self._length, self._width(chunk)
            self._buffer[:width] = self._array[(*self._corner, slice(start, start + width))]

    def _width(self, chunk: int) -> int:
        return min(self._length, int(self._array.shape[2]) - chunk * self._length)


def _transposed(rows: NDArray[Any]) -> NDArray[Any]:
    """Return a contiguous transpose, made in tiles that stay in the cache: several times faster than in one go."""
    block = np.empty(rows.shape[::-1], rows.dtype)
    for begin in range(0, len(block), 256):
        block[begin : begin + 256] = rows[:, begin : begin + 256].T
    return block


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array
