"""A segment: recorded steps that share a commit record, kept in memory until they are durable.

Steps are copied when they are appended. A cut is the segment as it stands at one moment; it can be encoded and
digested by other threads while further steps are appended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import zarr
from numpy.typing import NDArray

from trajstore.errors import ConfigurationError, IrreproducibleError, damage_told
from trajstore.storage.format.codecs import chunk_bytes, refuse_strange, write_block
from trajstore.storage.format.digest import SegmentDigest
from trajstore.storage.format.schema import ArraySpec, Schema
from trajstore.storage.places.place import Keeper

__all__ = ["Corner", "Cut", "Observation", "Row", "Segment", "Snapshot", "Spare", "Written", "array_of"]

Corner = tuple[int, int]
"""Positions of the slab's order and seed."""
Snapshot = tuple[NDArray[Any], NDArray[np.int64]]
"""A state as the flat vectors `params` and `counters`."""
_STATES = ("params", "counters")


class Observation(NamedTuple):
    """What is recorded of one step."""

    step: int
    leg: int
    metrics: Mapping[str, float]
    sketch: NDArray[np.float64]
    snapshot: Snapshot | None

    def bits(self) -> tuple[object, ...]:
        """Return all that there is of it, so that equal means equal in every bit."""
        names = sorted(self.metrics)
        values = np.array([self.metrics[name] for name in names], dtype=np.float64)
        state = [(vector.dtype, vector.tobytes()) for vector in self.snapshot or ()]
        return self.step, self.leg, names, values.tobytes(), np.asarray(self.sketch, dtype=np.float64).tobytes(), state


class Row(NamedTuple):
    """One recorded step, but for its state."""

    step: int
    leg: int
    measured: int
    """Bit k: metric k was measured."""
    metrics: tuple[float, ...]
    """The measured ones, in the order of their bits."""
    sketch: NDArray[np.float64]
    stored: bool
    """Whether a state is stored with it."""


class Written(NamedTuple):
    """A segment whose states are durable: its series, and what its commit record will say."""

    segment: int
    steps: NDArray[np.int64]
    series: dict[str, NDArray[Any]]
    """Name of an array along `step` → its values at these steps."""
    record: list[int]
    prefixes: list[list[int]]
    """Records of its first steps, which this one may replace."""

    def refuse_other(self, before: list[int], what: str) -> None:
        """Raise where the record before vouches for something else."""
        if before[0] > 0 and before != self.record and before not in self.prefixes:
            raise IrreproducibleError(
                f"{what}: steps computed again differ from the committed ones, which never change: "
                "record with the plan it was begun with, or under another name"
            )


class Spare:
    """Buffers that can be used again: fresh memory costs a page fault every 4 kB."""

    _MOST = 2**29

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[NDArray[Any]] = []

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return a buffer, its contents arbitrary."""
        with self._lock:
            for k, buffer in enumerate(self._free):
                if buffer.shape == shape and buffer.dtype == dtype:
                    return self._free.pop(k)
        return np.empty(shape, dtype)

    def give(self, buffers: Sequence[NDArray[Any]]) -> None:
        """Take buffers back that nobody uses any more."""
        with self._lock:
            for buffer in buffers:
                if sum(b.nbytes for b in self._free) + buffer.nbytes <= self._MOST:
                    self._free.append(buffer)


class Segment:
    """The recorded steps of one segment, as they come in: rows until they are cut off, states until the end."""

    def __init__(
        self,
        group: zarr.Group,
        schema: Schema,
        corner: Corner,
        number: int,
        *,
        counted: int = 0,
        spare: Spare | None = None,
    ) -> None:
        """`counted` steps of it are committed already; they have to be appended first all the same."""
        self.group, self.schema, self.corner, self.number, self.counted = group, schema, corner, number, counted
        places = schema.snapshots_of(number)
        self._place = {step: k for k, step in enumerate(places)}
        self._spare = spare or Spare()
        self._rows: list[Row] = []
        self._cut = 0
        self.stored: list[int] = []
        """Places of the states so far."""
        self.states: dict[str, NDArray[Any]] = {}
        """Flat states, one a row."""
        self._digest, self._digested, self._digested_states = SegmentDigest(), 0, 0
        self._prefixes: list[list[int]] = []

    def __len__(self) -> int:
        return self._cut + len(self._rows)

    def append(self, observed: Observation) -> None:
        """Add one step; everything is copied."""
        row = _row_of(self.schema, observed)
        if observed.snapshot is not None:
            place = self._place[observed.step]
            for name, vector in zip(_STATES, observed.snapshot, strict=True):
                if name not in self.states:
                    self.states[name] = self._spare.take((len(self._place), len(vector)), vector.dtype)
                self.states[name][place] = vector
            self.stored.append(place)
        self._rows.append(row)  # last: whatever interrupts this, a row is there with all that belongs to it

    def cut(self) -> Cut:
        """Cut off the rows since the last cut."""
        rows, self._rows = tuple(self._rows), []
        self._cut += len(rows)
        return Cut(self, rows, tuple(self.stored))

    def release(self) -> None:
        """Give the buffers back: nobody will look at this segment again."""
        self._spare.give(list(self.states.values()))
        self.states = {}

    def record_with(self, rows: Sequence[Row]) -> tuple[list[int], list[list[int]]]:
        """Return the commit record with some more rows, and those that it may replace. Call in the order of cuts."""
        for row in rows:
            state = [self.states[name][self._place[row.step]] for name in _STATES] if row.stored else []
            self._digest.add(row.step, row.leg, row.measured, row.metrics, row.sketch, state)
            self._digested += 1
            self._digested_states += row.stored
            if self._digested == self.counted:
                self._prefixes.append(self._record())
        record, prefixes = self._record(), list(self._prefixes)
        self._prefixes.append(record)
        return record, prefixes

    def _record(self) -> list[int]:
        return [self._digested, self._digested_states, *self._digest.words().tolist()]


def _row_of(schema: Schema, observed: Observation) -> Row:
    """Return a step as a row, copied."""
    step, leg, metrics, sketch, snapshot = observed
    if unknown := set(metrics) - set(schema.metrics):
        raise ConfigurationError(f"step {step}: metric {min(unknown)!r} is not declared")
    names = [name for name in schema.metrics if name in metrics]
    measured = sum(1 << k for k, name in enumerate(schema.metrics) if name in metrics)
    values = tuple(float(metrics[name]) for name in names)
    return Row(step, leg, measured, values, np.array(sketch, dtype=np.float64), snapshot is not None)


@dataclass(frozen=True)
class Cut:
    """Rows of a segment that come after those of the cut before, and the states so far."""

    segment: Segment
    rows: tuple[Row, ...]
    stored: tuple[int, ...]
    """Places of all states of the segment, those of earlier cuts too: a chunk is written whole."""

    def blocks(self) -> Iterator[Callable[[], None]]:
        """Return what writes the states, one call a chunk, to be made in any order and by any thread."""
        if any(row.stored for row in self.rows):
            for name, states in self.segment.states.items():
                array = array_of(self.segment.group, name)
                for begin in range(0, states.shape[1], array.chunks[2]):
                    yield _Block(array, self.segment, states, begin, self.stored)

    def written(self) -> Written:
        """Digest the rows, and return what is to be written of them."""
        rows, schema = self.rows, self.segment.schema
        record, prefixes = self.segment.record_with(rows)
        if not rows:
            return Written(self.segment.number, np.array([], dtype=np.int64), {}, record, prefixes)
        measured = np.array([row.measured for row in rows])
        series = {
            "leg": np.array([row.leg for row in rows]),
            "measured": measured,
            "sketch": np.stack([row.sketch for row in rows]),
        }
        values = [iter(row.metrics) for row in rows]
        for bit, name in enumerate(schema.metrics):
            there = measured >> bit & 1 > 0
            series[name] = np.array([next(v) if has else np.nan for v, has in zip(values, there, strict=True)])
        return Written(self.segment.number, np.array([row.step for row in rows]), series, record, prefixes)


@dataclass(frozen=True)
class _Block:
    """Writes one chunk of states."""

    array: zarr.Array[Any]
    segment: Segment
    states: NDArray[Any]
    begin: int
    stored: Sequence[int]

    def __call__(self) -> None:
        rows = self.states[:, self.begin : self.begin + self.array.chunks[2]]
        block = _transposed(rows)
        missing = np.ones(len(rows), dtype=bool)
        missing[list(self.stored)] = False
        if missing.any():
            block[:, missing] = self.array.fill_value
        first = self.segment.number * self.segment.schema.snapshots_per_segment
        write_block(self.array, (*self.segment.corner, self.begin, first), block[None, None])


_own = threading.local()


def _transposed(rows: NDArray[Any]) -> NDArray[Any]:
    """Return a contiguous transpose in a buffer of this thread's own, valid until the next call.

    It is made in tiles that stay in the cache: several times faster than in one go.
    """
    block = getattr(_own, "block", None)
    if block is None or block.size < rows.size or block.dtype != rows.dtype:
        block = _own.block = np.empty(rows.size, rows.dtype)
    block = block[: rows.size].reshape(rows.shape[::-1])
    for begin in range(0, len(block), 256):
        block[begin : begin + 256] = rows[:, begin : begin + 256].T
    return block


def array_of(group: zarr.Group, name: str, schema: Schema | None = None) -> zarr.Array[Any]:
    """Return an array of an experiment. What is written to it is there, even where it is the fill value.

    With a schema its document must tell of what that declares, or be longer, where the experiment is just growing.
    """
    with damage_told(f"experiment {group.basename!r}: array {name!r}"):
        array = group[name]
        assert isinstance(array, zarr.Array), "it is no array"
        assert isinstance(array.metadata.attributes, Mapping), "its attributes are no table"
        attributes: Any = group.attrs
        refuse_strange(array, attributes["trajstore"]["schema"]["codec"] if name == "params" else None)
        if schema is not None:
            _refuse_other(array, next(spec for spec in schema.arrays() if spec.name == name), schema.lengths())
    if isinstance(group.store, Keeper):
        group.store.expected.most[array.path] = chunk_bytes(array)
    return array.with_config({"write_empty_chunks": True})


def _refuse_other(array: zarr.Array[Any], spec: ArraySpec, lengths: Mapping[str, int]) -> None:
    if len(array.shape) != len(spec.dims) or any(
        n < lengths[dim] for n, dim in zip(array.shape, spec.dims, strict=True)
    ):
        raise ValueError(f"the document of {spec.name!r} tells of a shorter array")
    if (array.chunks, array.dtype) != (spec.chunks, np.dtype(spec.dtype)):
        raise ValueError(f"the document of {spec.name!r} tells of other chunks, or another type, than declared")
