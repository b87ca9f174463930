"""Late metrics: scalars that are known of a step after it was recorded, in any order of steps.

They are no part of the steps' commit records, so each has records of its own: for every span of steps, which of them
have a value that counts, and the digest of these values. A value never changes once it counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import zarr
from numpy.typing import NDArray

from trajstore.errors import ConflictError, DamageError, TrajstoreError, slab_named
from trajstore.storage.codecs import write_block
from trajstore.storage.place import Keeper, keeper_of
from trajstore.storage.schema import LATE_SPAN, LATE_WORDS, Schema, late_records
from trajstore.storage.segment import Corner, array_of

__all__ = ["LateSeries"]

_DECODING = (ValueError, RuntimeError, LookupError, AssertionError)


class LateSeries:
    """A late metric of one slab. Hold the slab's lock to put values."""

    def __init__(self, group: zarr.Group, schema: Schema, corner: Corner, name: str) -> None:
        self._group, self._schema, self._corner, self._name = group, schema, corner, name
        self.what = slab_named(group.basename, schema.orders[corner[0]], schema.seeds[corner[1]])

    def put(self, steps: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """Make values durable, then true."""
        store = keeper_of(self._group)
        array = array_of(self._group, self._name)
        for span in np.unique(steps // LATE_SPAN).tolist():
            here = steps // LATE_SPAN == span
            begin = span * LATE_SPAN
            stored, known, fence = self._checked(span)
            at = steps[here] - begin
            again = known[at]
            if stored[at[again]].tobytes() != values[here][again].tobytes():
                differs = int(at[again][stored[at[again]] != values[here][again]][0]) + begin
                raise ConflictError(f"{self.what}: {self._name!r} already has another value at step {differs}")
            stored[at], known[at] = values[here], True
            if not self._exists(late_records(self._name), span):  # so that a value without a record is damage
                self._write_record(span, np.zeros(LATE_WORDS, dtype=np.int64))
                store.flush()
            width = min(LATE_SPAN, self._schema.steps + 1 - begin)
            write_block(array, (*self._corner, begin), stored[:width][None, None])
            store.flush()
            self._write_record(span, np.array([*_words(known), *_digest(begin, stored, known), fence]))
            store.flush()

    def read(self) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Return for which steps there is a value, and the values."""
        known, values = [], []
        for span in range(self._schema.spans):
            stored, there, _ = self._checked(span)
            known.append(there)
            values.append(stored)
        length = self._schema.steps + 1
        return np.concatenate(known)[:length], np.concatenate(values)[:length]

    def damaged(self) -> Iterator[int]:
        """Yield the spans that are not what was committed."""
        for span in range(self._schema.spans):
            try:
                self._checked(span)
            except DamageError:
                yield span

    def discard(self, span: int) -> None:
        """Have the values of a span count no more."""
        self._write_record(span, np.zeros(LATE_WORDS, dtype=np.int64))

    def raise_fence(self, fence: int) -> None:
        """Write a fence into all records that are whole."""
        records = array_of(self._group, late_records(self._name))
        for span in range(self._schema.spans):
            try:
                *words, _ = np.asarray(records[(*self._corner, span)]).tolist()
            except TrajstoreError:
                raise
            except _DECODING:
                continue  # nobody who saw it whole can replace it any more
            self._write_record(span, np.array([*words, fence]))

    def _write_record(self, span: int, record: NDArray[np.int64]) -> None:
        records = array_of(self._group, late_records(self._name))
        write_block(records, (*self._corner, span, 0), record[None, None, None])

    def _checked(self, span: int) -> tuple[NDArray[np.float64], NDArray[np.bool_], int]:
        """Return values, which of them count, and their fence, if they are those that were committed."""
        begin = span * LATE_SPAN
        stored, known, (*digest, fence) = self._span(span)
        if known.any() and digest != _digest(begin, stored, known).tolist():
            raise self._damage(begin, "a chunk is missing, or not what was committed")
        records, chunk = late_records(self._name), begin // LATE_SPAN
        if not known.any() and self._exists(self._name, chunk) and not self._exists(records, chunk):
            raise self._damage(
                begin, f"there are values, and a chunk of {records!r} is missing, which says which count"
            )
        return stored, known, int(fence)

    def _exists(self, array: str, chunk: int) -> bool:
        if not isinstance(self._group.store, Keeper):
            return True
        at = "/".join(map(str, (*self._corner, chunk)))
        key = f"{self._group.path}/{array}/c/{at}{'/0' if array == late_records(self._name) else ''}"
        return self._group.store.place.exists(key)

    def _damage(self, begin: int, why: str) -> DamageError:
        told = f"{self.what}: {self._name!r} of steps {begin} to {begin + LATE_SPAN - 1} is damaged ({why})"
        return DamageError(f"{told}; `trajstore verify --repair` takes it out")

    def _span(self, span: int) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]]:
        """Return values, which of them count, and their digest and fence; what does not count is NaN."""
        begin = span * LATE_SPAN
        try:
            record = np.asarray(array_of(self._group, late_records(self._name))[(*self._corner, span)])
            found = np.asarray(array_of(self._group, self._name)[(*self._corner, slice(begin, begin + LATE_SPAN))])
            if record.shape != (LATE_WORDS,) or record.dtype != np.int64 or found.ndim != 1:
                raise ValueError("a document tells of another shape or type")
        except TrajstoreError:
            raise  # a lock that was lost is no damage
        except _DECODING as error:
            raise self._damage(begin, str(error)) from None
        known = np.unpackbits(record[: LATE_SPAN // 64].astype("<i8").view(np.uint8), bitorder="little").astype(bool)
        stored = np.full(LATE_SPAN, np.nan)
        stored[: len(found)] = found
        return np.where(known, stored, np.nan), known, record[LATE_SPAN // 64 :]


def _words(known: NDArray[np.bool_]) -> NDArray[np.int64]:
    return np.packbits(known, bitorder="little").view("<i8").astype(np.int64)


def _digest(begin: int, values: NDArray[np.float64], known: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the SHA-256 of the steps, then of the values that count, as four numbers."""
    steps = begin + np.flatnonzero(known)
    content = steps.astype("<i8").tobytes() + values[known].astype("<f8").tobytes()
    return np.frombuffer(hashlib.sha256(content).digest(), dtype="<i8").astype(np.int64)
