"""Copy what is committed of a slab into another store, also while it is being recorded.

Nothing is locked where it is copied from. The commit records are read first, and the chunks after them: what is
committed never changes, so a chunk that was written meanwhile still has all that the records speak of. What was copied
is read back and compared with the records before it counts. Only a repair takes something back; the slab is then copied
once more, by the records as they are after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.buffer.cpu import Buffer
from zarr.storage import MemoryStore

from trajstore.errors import BusyError, ConflictError, DamageError, damage_told
from trajstore.storage.format.codecs import chunk_bytes
from trajstore.storage.format.schema import ArraySpec, Schema
from trajstore.storage.places.place import DOCUMENT, keeper_of
from trajstore.storage.writing.late_metrics import LateSeries
from trajstore.storage.writing.resume_slots import ResumeSlots
from trajstore.storage.writing.segment import Corner, array_of
from trajstore.storage.writing.slab_writer import Ledger
from trajstore.store import StoredExperiment

__all__ = ["copy_slab"]

_TRIES = 5
"""How often a slab is copied of which something is taken back meanwhile."""
_Index = tuple[int, ...]


def copy_slab(source: StoredExperiment, target: StoredExperiment, order: str, seed: int) -> bool:
    """Copy what the target has less of; tell whether there was anything to copy. Hold the slab's lock in the target."""
    theirs, ours = _ledger(source, order, seed), _ledger(target, order, seed)
    _copy_late(source, target, theirs.corner, ours.corner)
    if not _Slab(source, target, theirs, ours).differing:
        return False
    slots, found = ResumeSlots(source.group, order, seed), 0
    for _ in range(_TRIES):
        states = slots.contents()  # before the records: at least one of the two is then of a step that counts
        theirs = _ledger(source, order, seed)
        try:
            return _Slab(source, target, theirs, ours).copied(slots, states)
        except _UnlikeError as error:
            found = error.number
            if (_ledger(source, order, seed).records[found] == theirs.records[found]).all():
                raise error.told from None
    raise BusyError(
        f"{theirs.steps_named(found)} were taken back in {source.store} each of the {_TRIES} times that they were "
        f"copied; what counted in {target.store} before counts still; copy again when nobody repairs the other"
    )


def _ledger(experiment: StoredExperiment, order: str, seed: int) -> Ledger:
    schema = experiment.schema
    return Ledger(experiment.group, schema, schema.orders.index(order), schema.seeds.index(seed))


def _copy_late(source: StoredExperiment, target: StoredExperiment, theirs: Corner, ours: Corner) -> None:
    """Copy the late metrics of a slab; a value that both have must be the same."""
    for name in source.schema.late:
        known, values = LateSeries(source.group, source.schema, theirs, name).read()
        series = LateSeries(target.group, target.schema, ours, name)
        here, own = series.read()
        here, own = here[: len(known)], own[: len(known)]
        both = known & here
        if (known & ~here).any() or values[both].tobytes() != own[both].tobytes():
            series.put(np.flatnonzero(known), values[known])


class _UnlikeError(Exception):
    """A segment is not what its record says."""

    def __init__(self, number: int, told: DamageError) -> None:
        super().__init__(number)
        self.number, self.told = number, told


@contextmanager
def _of(number: int, also: str = "") -> Iterator[None]:
    try:
        yield
    except DamageError as error:
        raise _UnlikeError(number, DamageError(f"{error}{also}")) from None


@dataclass(frozen=True)
class _Slab:
    """A slab in two stores, by the commit records that were read of each."""

    source: StoredExperiment
    target: StoredExperiment
    theirs: Ledger
    ours: Ledger

    @property
    def differing(self) -> list[int]:
        """The segments whose records differ, as far as the source has any."""
        theirs = self.theirs.records
        same = (theirs == self.ours.records[: len(theirs)]).all(axis=-1)
        return [int(number) for number in np.flatnonzero(~same & (theirs[:, 0] >= 0))]

    def copied(self, slots: ResumeSlots, states: Sequence[tuple[int, bytes]]) -> bool:
        """Copy segments that go further in the source, and have them count; tell whether there were any.

        `states` are the resume states as they were before the records were read.
        """
        numbers = [number for number in self.differing if self._goes_further(number)]
        if not numbers:
            return False
        if (self.ours.records[: len(self.theirs.records), 0] > self.theirs.records[:, 0]).any():
            raise ConflictError(
                f"{self.ours.name}: each of the two stores has steps that the other lacks; resume one of them first"
            )
        for spec in self.source.schema.arrays():
            if {"step", "snapshot"} & set(spec.dims) and spec.name not in self.source.schema.late:
                self._copy_array(spec, numbers)
        self._copy_resume_state(slots, states)
        copied = self.ours.with_records_of(self.theirs)
        where = f"; that was copied from {self.source.store}, and counts in {self.target.store} only when it is again"
        for number in numbers:
            with _of(number, where):
                copied.read(number)
        self.ours.take_over(self.theirs.records)
        return True

    def _goes_further(self, number: int) -> bool:
        """Read a segment of the source whose record differs: it must be what that says, and begin as it does here."""
        record, own = (ledger.records[number].tolist() for ledger in (self.theirs, self.ours))
        with _of(number):
            checked = self.theirs.read(number, counted=max(0, own[0]))
        if own[0] > record[0]:
            self.ours.read(number, counted=record[0]).refuse_other(record, self.theirs.steps_named(number))
            return False
        checked.refuse_other(own, self.ours.steps_named(number))
        return True

    def _copy_array(self, spec: ArraySpec, numbers: Sequence[int]) -> None:
        """Copy the chunks of an array in which something is committed of these segments."""
        array, own = array_of(self.source.group, spec.name, self.source.schema), array_of(self.target.group, spec.name)
        axis, length = _axis(spec), array.chunks[_axis(spec)]
        steps = _steps_along(spec, self.source.schema)
        wanted = self.theirs.committed[steps] & np.isin(_segments(self.source.schema, steps), numbers)
        parts: list[Sequence[int]] = [range(-(-n // c)) for n, c in zip(array.shape, array.chunks, strict=True)]
        parts[axis] = np.unique(np.flatnonzero(wanted) // length).tolist()
        for rest in product(*parts[2:]):
            here, there = (_key(spec.name, (*ledger.corner, *rest)) for ledger in (self.theirs, self.ours))
            content = self.source.store.place.read(f"{self.source.name}/{here}", chunk_bytes(array))
            if content is not None:  # else it is of a metric that was declared later, or what is read back says so
                self._refuse_less(spec, own, (*self.ours.corner, *rest), content)
                keeper_of(self.target.group).set_sync(f"{self.target.name}/{there}", Buffer.from_bytes(content))

    def _refuse_less(self, spec: ArraySpec, own: zarr.Array[Any], index: _Index, content: bytes) -> None:
        """Refuse to replace a chunk by one that has not all of what is committed in it."""
        axis = _axis(spec)
        where = tuple(slice(k * c, (k + 1) * c) for k, c in zip(index, own.chunks, strict=True))
        steps = _steps_along(spec, self.target.schema)[where[axis]]
        counts = np.flatnonzero(self.ours.committed[steps])
        if not len(counts):
            return
        numbers = _segments(self.target.schema, steps[counts])
        told = f"{_key(spec.name, index)} as it was read in {self.source.store}"
        with _of(int(numbers[0])), damage_told(f"{self.ours.steps_named(int(numbers[0]))}: {told}"):
            document = self.target.store.place.read(f"{self.target.name}/{spec.name}/{DOCUMENT}") or b""
            files = {DOCUMENT: document, _key("", index): content}
            memory = MemoryStore({key: Buffer.from_bytes(value) for key, value in files.items()})
            found = np.asarray(zarr.open_array(memory, mode="r", zarr_format=3)[where])
        new, old = (_rows(values, counts, axis) for values in (found, np.asarray(own[where])))
        if (other := np.flatnonzero((new != old).any(axis=-1))).size:
            number = int(numbers[other[0]])
            lacks = f"{self.ours.steps_named(number)}: {told} has not what is committed in {self.target.store}"
            raise _UnlikeError(number, DamageError(f"{lacks}; `trajstore verify` tells which of them is damaged"))

    def _copy_resume_state(self, slots: ResumeSlots, states: Sequence[tuple[int, bytes]]) -> None:
        """Copy the latest state of a step that counts, into the slot that does not hold what counts here so far."""
        last = self.theirs.last_step
        there = [state for state in states if state[0] <= last]
        if not any(step == last for step, _ in there):  # it was put in between
            there += [state for state in slots.contents() if state[0] <= last]
        if there:
            self.ours.slots.put(*max(there, key=lambda state: state[0]), self.ours.last_step)


def _key(array: str, index: _Index) -> str:
    """Return where a chunk lies in an experiment, or without an array in its folder."""
    return f"{array}/c/{'/'.join(map(str, index))}".lstrip("/")


def _axis(spec: ArraySpec) -> int:
    return next(axis for axis, dim in enumerate(spec.dims) if dim in ("step", "snapshot"))


def _rows(values: NDArray[np.generic], positions: NDArray[np.int64], axis: int) -> NDArray[np.uint8]:
    """Return the bytes of what is at some positions along an axis, a row each."""
    taken = np.moveaxis(np.take(values, positions, axis), axis, 0).reshape(len(positions), -1)
    return np.ascontiguousarray(taken).view(np.uint8)


def _steps_along(spec: ArraySpec, schema: Schema) -> NDArray[np.int64]:
    """Return the step of each position along an array."""
    return np.arange(schema.steps + 1) if "step" in spec.dims else np.array(schema.snapshots, dtype=np.int64)


def _segments(schema: Schema, steps: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.searchsorted(schema.segment_starts, steps, side="right") - 1
