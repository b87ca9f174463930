"""The writer of one slab: steps in, segments out.

Data is written and made durable first, the commit record last, so that at any moment the records describe
what is really there. A segment is committed when it is full, and in between after 4,096 steps or five
minutes: its record then counts its first steps, and the next one replaces it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from trajstore.storage.codecs import write_block
from trajstore.storage.digest import SegmentDigest
from trajstore.storage.local import DurableStore
from trajstore.storage.schema import COMMIT_FIELDS, Schema

__all__ = ["SlabWriter"]

COMMIT_STEPS = 4_096
COMMIT_SECONDS = 300.0


class SlabWriter:
    """Writes one (order, seed), from step 0 on, in increasing steps. Hold the slab's lock."""

    def __init__(self, group: zarr.Group, schema: Schema, order: int, seed: int) -> None:
        store = group.store
        assert isinstance(store, DurableStore)
        self._store, self._schema, self._corner = store, schema, (order, seed)
        self._series = {
            spec.name: _Series(_array(group, spec.name), order, seed) for spec in schema.arrays() if "step" in spec.dims
        }
        self._params, self._counters = _array(group, "params"), _array(group, "counters")
        self._committed = _array(group, "committed")
        self._records = np.full((schema.segments, len(COMMIT_FIELDS)), -1, dtype=np.int64)
        self._rows = np.full((schema.snapshots_per_segment, schema.layout.size("params")), np.nan, schema.layout.dtype)
        self._counts = np.full((schema.snapshots_per_segment, schema.layout.size("counters")), -1, dtype=np.int64)
        self._segment = 0
        self._begin_segment(0)
        self._uncommitted = 0
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
        """Record one step; `snapshot` (params, counters) is copied."""
        segment = self._schema.segment_of(step)
        if segment != self._segment:
            self.commit()
            self._begin_segment(segment)
        names = list(self._schema.metrics)
        measured = sum(1 << k for k, name in enumerate(names) if name in metrics)
        values = np.array([metrics.get(name, np.nan) for name in names], dtype=np.float64)
        for name, value in zip(names, values, strict=True):
            self._series[name].put(step, value)
        self._series["measured"].put(step, measured)
        self._series["leg"].put(step, leg)
        self._series["sketch"].put(step, sketch)
        if snapshot is not None:
            row = self._snapshots
            self._rows[row], self._counts[row] = snapshot
            snapshot = self._rows[row], self._counts[row]
            self._snapshots += 1
        self._digest.add(step, leg, measured, values, sketch, snapshot)
        self._steps += 1
        self._uncommitted += 1
        if self._uncommitted >= COMMIT_STEPS or time.monotonic() - self._since > COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Make everything so far durable, then true."""
        if not self._uncommitted:
            return
        for series in self._series.values():
            series.write()
        start = self._segment * self._schema.snapshots_per_segment
        width = min(self._schema.snapshots_per_segment, len(self._schema.snapshots) - start)
        if self._snapshots:
            write_block(self._params, (*self._corner, 0, start), self._rows[:width].T[None, None])
            if self._counts.shape[1]:
                write_block(self._counters, (*self._corner, 0, start), self._counts[:width].T[None, None])
        self._store.flush()
        self._records[self._segment] = [self._steps, self._snapshots, *self._digest.words()]
        self._write_record(self._segment)
        self._uncommitted, self._since = 0, time.monotonic()

    def _begin_segment(self, segment: int) -> None:
        self._segment = segment
        self._steps = self._snapshots = 0
        self._rows.fill(np.nan)
        self._counts.fill(-1)
        self._digest = SegmentDigest()
        self._since = time.monotonic()

    def _write_record(self, segment: int) -> None:
        """Replace the one chunk that holds a segment's record."""
        length = self._committed.chunks[2]
        start = segment // length * length
        write_block(self._committed, (*self._corner, start, 0), self._records[start : start + length][None, None])
        self._store.flush()


class _Series:
    """One slab's values of an array along `step`, buffered a chunk at a time."""

    def __init__(self, array: zarr.Array[Any], order: int, seed: int) -> None:
        self._array, self._corner = array, (order, seed)
        self._length = array.chunks[2]
        self._buffer = np.empty((self._length, *array.chunks[3:]), array.dtype)
        self._begin(0)

    def put(self, step: int, value: Any) -> None:  # noqa: ANN401
        chunk, offset = divmod(step, self._length)
        if chunk != self._chunk:
            self.write()
            self._begin(chunk)
        self._buffer[offset] = value
        self._dirty = True

    def write(self) -> None:
        """Write the present chunk, if it changed."""
        if self._dirty:
            start = self._chunk * self._length
            width = min(self._length, self._array.shape[2] - start)
            corner = (*self._corner, start, *(0 for _ in self._array.shape[3:]))
            write_block(self._array, corner, self._buffer[:width][None, None])
            self._dirty = False

    def _begin(self, chunk: int) -> None:
        self._chunk, self._dirty = chunk, False
        self._buffer.fill(self._array.fill_value)


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array
