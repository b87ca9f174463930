"""Late metrics: scalars that are known of a step after it was recorded, in any order of steps.

They are no part of the steps' commit records, so each has records of its own: for every span of steps, which of them
have a value that counts, and the digest of these values. A value never changes once it counts. A slab of which a value
is to be written is noted in the document of the records, once they are there: where one is missing later, it is lost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from trajstore.errors import ConflictError, DamageError, TrajstoreError, slab_named
from trajstore.storage.format.codecs import write_block
from trajstore.storage.format.schema import LATE_SPAN, LATE_WORDS, Schema, late_records
from trajstore.storage.places.place import DECLARING, Keeper, keeper_of
from trajstore.storage.writing.segment import Corner, array_of

__all__ = ["LateSeries", "unnoted"]

_NOTED = "slabs_begun"
"""Attribute of the records: positions of order and seed, and how many spans from the first on have a record."""
_DECODING = (ValueError, RuntimeError, LookupError, AssertionError)


class LateSeries:
    """A late metric of one slab. Hold the slab's lock to put values."""

    def __init__(self, group: zarr.Group, schema: Schema, corner: Corner, name: str) -> None:
        self._group, self._schema, self._corner, self._name = group, schema, corner, name
        self._records, self._begun = late_records(name), 0
        self.what = slab_named(group.basename, schema.orders[corner[0]], schema.seeds[corner[1]])

    def put(self, steps: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """Make values durable, then true."""
        store = keeper_of(self._group)
        array = array_of(self._group, self._name)
        self._begin(int(steps.max(initial=-1)) // LATE_SPAN + 1)
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
            width = min(LATE_SPAN, self._schema.steps + 1 - begin)
            write_block(array, (*self._corner, begin), stored[:width][None, None])
            store.flush()
            self._write_record(span, np.array([*_words(known), *_digest(begin, stored, known), fence]))
            store.flush()

    def _begin(self, spans: int) -> None:
        """Have a record of each of the first spans, and a note that there is: of a value without one it is known."""
        if self._begun >= spans:
            return
        store = keeper_of(self._group)
        missing = [span for span in range(spans) if self._checked(span) and not self._exists(self._records, span)]
        for span in missing:
            self._write_record(span, np.zeros(LATE_WORDS, dtype=np.int64))
        store.flush()
        if _noted(array_of(self._group, self._records)).get(self._corner, 0) < spans:
            with store.place.lock(DECLARING, f"store {store.place}", patience=60):
                store.check()
                # Anew, under this lock: the document may be another process's by now.
                keeper = store.place.keeper(read_only=False)
                group = zarr.open_group(keeper, path=self._group.path, mode="r+", zarr_format=3)
                records = array_of(group, self._records)
                noted = sorted((_noted(records) | {self._corner: spans}).items())
                records.update_attributes({_NOTED: [[*corner, begun] for corner, begun in noted]})
                keeper_of(group).flush()
        self._begun = spans

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
        records = array_of(self._group, self._records)
        begun = _noted(records).get(self._corner, 0)
        for span in range(self._schema.spans):
            if self._is_lost(span, span < begun):
                continue  # a new one would say that it never was
            try:
                *words, _ = np.asarray(records[(*self._corner, span)]).tolist()
            except TrajstoreError:
                raise
            except _DECODING:
                continue  # nobody who saw it whole can replace it any more
            self._write_record(span, np.array([*words, fence]))

    def _write_record(self, span: int, record: NDArray[np.int64]) -> None:
        records = array_of(self._group, self._records)
        write_block(records, (*self._corner, span, 0), record[None, None, None])

    def _checked(self, span: int) -> tuple[NDArray[np.float64], NDArray[np.bool_], int]:
        """Return values, which of them count, and their fence, if they are those that were committed."""
        begin = span * LATE_SPAN
        stored, known, (*digest, fence), begun = self._span(span)
        if known.any() and digest != _digest(begin, stored, known).tolist():
            raise self._damage(begin, "a chunk is missing, or not what was committed")
        if not known.any() and self._is_lost(span, begun):
            raise self._damage(
                begin, f"it was begun, and a chunk of {self._records!r} is missing, which says which values count"
            )
        return stored, known, int(fence)

    def _is_lost(self, span: int, begun: bool) -> bool:
        """Tell whether a record that was there is not; `begun` is whether that is noted."""
        return not self._exists(self._records, span) and (begun or self._exists(self._name, span))

    def _exists(self, array: str, chunk: int) -> bool:
        if not isinstance(self._group.store, Keeper):
            return True
        at = "/".join(map(str, (*self._corner, chunk)))
        key = f"{self._group.path}/{array}/c/{at}{'/0' if array == self._records else ''}"
        return self._group.store.place.exists(key)

    def _damage(self, begin: int, why: str) -> DamageError:
        told = f"{self.what}: {self._name!r} of steps {begin} to {begin + LATE_SPAN - 1} is damaged ({why})"
        return DamageError(f"{told}; `trajstore verify --repair` takes it out")

    def _span(self, span: int) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64], bool]:
        """Return values, which of them count, their digest and fence, and whether there was a record at first.

        What does not count is NaN.
        """
        begin = span * LATE_SPAN
        try:
            records = array_of(self._group, self._records)  # the note is older than what is read of the records
            begun = span < _noted(records).get(self._corner, 0)
            record = np.asarray(records[(*self._corner, span)])
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
        return np.where(known, stored, np.nan), known, record[LATE_SPAN // 64 :], begun


def _noted(records: zarr.Array[Any]) -> dict[Corner, int]:
    """Return for slabs that were begun how many spans have a record."""
    noted: Any = records.attrs.get(_NOTED, [])
    if not _is_note(noted):
        name = records.path.partition("/")[0]
        told = f"experiment {name!r}: {records.path}/zarr.json is damaged ({_NOTED!r} is no list of order, seed, spans)"
        raise DamageError(f"{told}; `trajstore verify --repair` writes it anew")
    return {(order, seed): spans for order, seed, spans in noted}


def _is_note(noted: object) -> bool:
    return isinstance(noted, list) and all(
        isinstance(one, list) and len(one) == 3 and all(type(k) is int and k >= 0 for k in one) for one in noted
    )


def unnoted(document: Any) -> Any:  # noqa: ANN401
    """Return the document of an array as it was declared: without a note of slabs that were begun since."""
    attributes = document.get("attributes") if isinstance(document, dict) else None
    if not isinstance(attributes, dict) or not _is_note(attributes.get(_NOTED)):
        return document
    return document | {"attributes": {key: value for key, value in attributes.items() if key != _NOTED}}


def _words(known: NDArray[np.bool_]) -> NDArray[np.int64]:
    return np.packbits(known, bitorder="little").view("<i8").astype(np.int64)


def _digest(begin: int, values: NDArray[np.float64], known: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the SHA-256 of the steps, then of the values that count, as four numbers."""
    steps = begin + np.flatnonzero(known)
    content = steps.astype("<i8").tobytes() + values[known].astype("<f8").tobytes()
    return np.frombuffer(hashlib.sha256(content).digest(), dtype="<i8").astype(np.int64)
