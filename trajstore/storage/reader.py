"""What of an experiment counts: the commit records, read as masks over steps and snapshots.

Arrays may hold more than was committed, for example while a run is being written; everything that shows data
to a person goes through here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from trajstore.errors import DamageError, TrajstoreError
from trajstore.storage.schema import Schema
from trajstore.storage.segment import array_of

__all__ = ["Commits"]


@dataclass(frozen=True)
class Commits:
    """The commit records of an experiment at one moment."""

    schema: Schema
    records: NDArray[np.int64]
    """(order, seed, segment, field), without the fences."""
    fence: int
    """The lowest of the fences under which they were written; see `place.Keeper.guard`."""
    leg: NDArray[np.int64]
    """(order, seed, step): ≥ 0 where an iterate was recorded."""

    @classmethod
    def of(cls, group: zarr.Group, schema: Schema, slab: tuple[int, int] | None = None) -> Commits:
        """Read the records first and the data after: what they vouch for is then on disk.

        `slab` gives the positions of one order and one seed to read; the dimensions stay.
        """
        orders, seeds = (slice(0, n) for n in (len(schema.orders), len(schema.seeds)))
        if slab is not None:
            orders, seeds = (slice(k, k + 1) for k in slab)
        records = _values(group, "committed", (orders, seeds, slice(0, schema.segments)))
        leg = _values(group, "leg", (orders, seeds, slice(0, schema.steps + 1)))
        return cls(schema, records[..., :-1], max(0, int(records[..., -1].min(initial=2**62))), leg)

    @cached_property
    def steps(self) -> NDArray[np.bool_]:
        """(order, seed, step): recorded and committed."""
        recorded = self.leg >= 0
        starts = self.schema.segment_starts
        before = np.concatenate(
            [np.zeros_like(recorded[..., :1], dtype=np.int64), np.cumsum(recorded, axis=-1)], axis=-1
        )
        rank = before[..., :-1] - np.repeat(before[..., starts], self._widths, axis=-1)  # within its segment
        counts = np.repeat(np.maximum(self.records[..., 0], 0), self._widths, axis=-1)
        return np.asarray(recorded & (rank < counts))

    @cached_property
    def snapshots(self) -> NDArray[np.bool_]:
        """(order, seed, snapshot): stored and committed."""
        stored = self.leg[..., list(self.schema.snapshots)] >= 0
        per_segment, places = self.schema.snapshots_per_segment, np.arange(len(self.schema.snapshots))
        before: NDArray[np.int64] = np.cumsum(stored, axis=-1) - stored
        rank: NDArray[np.int64] = before - before[..., places // per_segment * per_segment]  # within its segment
        counts = np.repeat(np.maximum(self.records[..., 1], 0), per_segment, axis=-1)[..., : len(places)]
        return np.asarray(stored & (rank < counts))

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
