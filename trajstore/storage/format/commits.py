"""What of an experiment counts: the commit records, read as masks over steps and snapshots.

Arrays may hold more than was committed, for example while a run is being written; everything that shows data
to a person goes through here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from trajstore.errors import DamageError, FormatError, TrajstoreError, slab_named
from trajstore.storage.format.checking import refuse_beyond_memory
from trajstore.storage.format.schema import COMMIT_FIELDS, Schema
from trajstore.storage.places.expected import Vouched, remedy
from trajstore.storage.places.place import Keeper
from trajstore.storage.writing.fills import stored_fills
from trajstore.storage.writing.segment import Corner, array_of

__all__ = ["Commits", "blocks", "refuse_to_hold"]

_AT_ONCE = 2**26
"""Bytes of a series that are held to find out which of its steps were recorded."""


@dataclass(frozen=True)
class Commits:
    """The commit records of an experiment at one moment."""

    schema: Schema
    records: NDArray[np.int64]
    """(order, seed, segment, field), without the fences."""
    fence: int
    """The lowest of the fences under which they were written; see `place.Keeper.guard`."""
    recorded: NDArray[np.bool_]
    """(order, seed, step): an iterate was recorded, whether it counts or not."""

    @classmethod
    def of(
        cls, group: zarr.Group, schema: Schema, slab: tuple[int, int] | None = None, *, whole: bool = True
    ) -> Commits:
        """Read the records first and the data after: what they vouch for is then on disk.

        `slab` gives the positions of one order and one seed to read; the dimensions stay. Without `whole` it is no
        error if what says that something counts is missing itself.
        """
        (i, k), slabs = slab or (0, 0), (len(schema.orders), len(schema.seeds)) if slab is None else (1, 1)
        length, number = schema.steps + 1, slabs[0] * slabs[1]
        # Two yes or no a step, and the records; the rest is held for some slabs at a time.
        needed = number * (2 * length + 8 * len(COMMIT_FIELDS) * schema.segments)
        refuse_to_hold(group, needed, f"to find out what counts of {number:,} slabs of {schema.steps:,} steps")
        held = slice(i, i + slabs[0]), slice(k, k + slabs[1])
        records = _values(group, "committed", (*held, slice(0, schema.segments)))
        recorded = np.empty((*slabs, length), dtype=bool)
        for some in blocks(slabs, length):
            first, then, steps = some
            where = slice(i + first.start, i + first.stop), slice(k + then.start, k + then.stop), steps
            recorded[some] = _values(group, "leg", where) >= 0
        commits = cls(schema, records[..., :-1], max(0, int(records[..., -1].min(initial=2**62))), recorded)
        together = next(spec.chunks[2] for spec in schema.arrays() if spec.name == "committed")
        ended = cache(lambda: _ended(group))
        for at in np.ndindex(*slabs) if whole else ():
            _refuse_gone(group, commits, at, (i + at[0], k + at[1]), together, ended)
        if isinstance(group.store, Keeper):
            known, name = group.store.expected.vouched, group.path
            known[name] = Vouched.of(name, schema, (commits.steps, commits.snapshots), slab, known.get(name))
        return commits

    @cached_property
    def steps(self) -> NDArray[np.bool_]:
        """(order, seed, step): recorded and committed."""
        counted, starts = np.empty_like(self.recorded), self.schema.segment_starts
        for slab in np.ndindex(*counted.shape[:-1]):
            recorded = self.recorded[slab]
            before = np.concatenate([[0], np.cumsum(recorded)])
            rank = before[:-1] - np.repeat(before[starts], self._widths)  # within its segment
            counted[slab] = recorded & (rank < np.repeat(np.maximum(self.records[slab][:, 0], 0), self._widths))
        return counted

    @cached_property
    def snapshots(self) -> NDArray[np.bool_]:
        """(order, seed, snapshot): stored and committed."""
        per_segment, places = self.schema.snapshots_per_segment, np.array(self.schema.snapshots)
        segments = np.arange(len(places)) // per_segment
        counted = np.empty((*self.recorded.shape[:-1], len(places)), dtype=bool)
        for slab in np.ndindex(*counted.shape[:-1]):
            stored = self.recorded[slab][places]
            before: NDArray[np.int64] = np.cumsum(stored) - stored
            rank = before - before[segments * per_segment]  # within its segment
            counted[slab] = stored & (rank < np.maximum(self.records[slab][:, 1], 0)[segments])
        return counted

    @property
    def complete(self) -> NDArray[np.bool_]:
        """(order, seed): the last step counts, and every segment before it."""
        return np.asarray(self.steps[..., -1] & (self.records[..., 0] >= 0).all(axis=-1))

    @property
    def last_step(self) -> NDArray[np.int64]:
        """(order, seed): the last committed step, −1 where there is none."""
        any_step = self.steps.any(axis=-1)
        last = self.steps.shape[-1] - 1 - np.argmax(self.steps[..., ::-1], axis=-1)
        return np.where(any_step, last, -1)

    @cached_property
    def _widths(self) -> NDArray[np.int64]:
        """Steps of each segment."""
        return np.diff(self.schema.segment_starts, append=self.schema.steps + 1)


def refuse_to_hold(group: zarr.Group, needed: int, what: str) -> None:
    """Refuse to read more of an experiment at once than there is memory for."""
    try:
        refuse_beyond_memory(needed, what)
    except ValueError as error:
        raise FormatError(f"experiment {group.basename!r}: {error}; read it where there is more") from None


def blocks(slabs: tuple[int, int], length: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield some slabs at a time, as positions of order, seed and step: as many as a series should be held of."""
    together = max(1, _AT_ONCE // (8 * length))
    for i, k in product(range(slabs[0]), range(0, slabs[1], together)):
        yield slice(i, i + 1), slice(k, min(k + together, slabs[1])), slice(0, length)


def _refuse_gone(
    group: zarr.Group,
    commits: Commits,
    at: Corner,
    corner: Corner,
    together: int,
    ended: Callable[[], set[tuple[str, int]]],
) -> None:
    """Raise where what is missing is what says that something is there: records, or which steps were recorded.

    So many records lie `together` in a chunk; `ended` returns the slabs that came to their end once.
    """
    schema, counts, recorded = commits.schema, commits.records[at][:, 0], commits.recorded[at]
    slab = slab_named(group.basename, schema.orders[corner[0]], schema.seeds[corner[1]])
    found = np.add.reduceat(recorded, schema.segment_starts, dtype=np.int64)
    short = np.flatnonzero(found < counts)
    if len(short) and not (short[0] == len(counts) - 1 and _has_grown(group, schema)):
        begin, end = schema.steps_of(int(short[0]))
        raise DamageError(
            f"{slab}: steps {begin} to {end - 1} were committed, and a chunk below {group.path}/leg/c/{corner[0]}/"
            f"{corner[1]} is missing, which says which of them were recorded; {remedy(schema.again)}"
        )
    for begin in range(0, len(counts), together):
        if (counts[begin : begin + together] >= 0).any() or not isinstance(group.store, Keeper):
            continue
        something = schema.made_by == "problem" or bool(recorded.any())  # a loop may end before it recorded anything
        came = begin == 0 and something and (schema.orders[corner[0]], schema.seeds[corner[1]]) in ended()
        if came or (counts[begin + together :] >= 0).any():
            key = f"{group.path}/committed/c/{corner[0]}/{corner[1]}/{begin // together}/0"
            if not group.store.place.exists(key):
                what = f"it was recorded, and {key}, which says what counts, is missing"
                raise DamageError(f"{slab}: {what}; {remedy(schema.again)}")


def _has_grown(group: zarr.Group, schema: Schema) -> bool:
    """Tell whether there are more steps by now: the last segment may then have more than were declared before."""
    return Schema.of(zarr.open_group(group.store, path=group.path, mode="r", zarr_format=3)).steps > schema.steps


def _ended(group: zarr.Group) -> set[tuple[str, int]]:
    """Return the slabs that came to their end once, as order and seed."""
    return {(order, seed) for fill in stored_fills(group) if fill["ended"] for order, seed in fill["slabs"]}


def _values(group: zarr.Group, name: str, where: tuple[slice, ...]) -> NDArray[Any]:
    array = array_of(group, name)
    try:
        if array.dtype != np.int64:
            raise ValueError("its document tells of another type")
        found = np.asarray(array[where])
        if found.shape[: len(where)] != tuple(part.stop - part.start for part in where):
            raise ValueError("its document tells of a shorter array")
        return found
    except TrajstoreError:
        raise  # a lock that was lost is no damage
    except (ValueError, RuntimeError) as error:
        raise DamageError(f"experiment {group.basename!r}: a chunk of {name!r} is damaged ({error})") from None
