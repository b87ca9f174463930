"""What is known of a store's files before they are read: how large each is at most, and which must be there.

To Zarr a chunk that is not there is one that was never written, full of NaN, which here would mean that a run diverged.
So whoever reads commit records says which chunks they vouch for, and of these a missing one is damage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numcodecs import Zstd  # type: ignore[import-untyped]
from numpy.typing import NDArray

from trajstore.errors import DamageError, slab_named
from trajstore.storage.format.codecs import refuse_bomb
from trajstore.storage.format.schema import Schema
from trajstore.storage.places.identity import Identity, Versioned, refuse_another

__all__ = ["Expected", "Vouched", "remedy"]

_CHECKSUM = 4
"""Bytes at the end of a chunk."""
Read = Callable[[str], bytes | None]


def remedy(again: str) -> str:
    """Say what to do about a missing file of a slab; `again` is what writes its steps again."""
    return f"restore it from a copy, or have `trajstore verify --repair` take it out, and {again} writes it again"


@dataclass(frozen=True)
class _Chunks:
    """The chunks of arrays that are cut alike."""

    axis: int
    """The dimension along steps or states."""
    length: int
    """How many of these a chunk has."""
    there: NDArray[np.bool_]
    """(order, seed, chunk): something in it is committed."""
    first: NDArray[np.int64]
    """The first step of each, and the first after all."""


@dataclass(frozen=True)
class Vouched:
    """Which chunks of an experiment hold something that is committed."""

    experiment: str
    orders: tuple[str, ...]
    seeds: tuple[int, ...]
    again: str
    """What writes steps again."""
    chunks: Mapping[str, _Chunks]
    """By array."""
    bits: Mapping[str, int]
    """Metric → its bit in `measured`: an array of a metric that came later has no chunk for steps before."""
    batches: int
    """Chunks of a seed's batches."""
    last: NDArray[np.int64]
    """(order, seed): the last committed step."""

    @classmethod
    def of(
        cls,
        experiment: str,
        schema: Schema,
        committed: tuple[NDArray[np.bool_], NDArray[np.bool_]],
        corner: tuple[int, int] | None,
        before: Vouched | None,
    ) -> Vouched:
        """Return what is vouched for: `committed` are the steps and the states of all slabs, or of the one at `corner`.

        What was known `before` of the other slabs stays.
        """
        steps, states = committed
        slabs = (len(schema.orders), len(schema.seeds))
        at = (slice(None), slice(None)) if corner is None else tuple(slice(k, k + 1) for k in corner)
        cut: dict[tuple[int, int], _Chunks] = {}
        chunks, batches = {}, 0
        for spec in schema.arrays():
            if spec.name == "batch_index":
                batches = -(-schema.steps // spec.chunks[1])
            axis = next((spec.dims.index(dim) for dim in ("step", "snapshot") if dim in spec.dims), None)
            if axis is None or spec.name in (*schema.late, "leg"):  # with the records, `leg` says what counts
                continue
            length = spec.chunks[axis]
            if (axis, length) not in cut:
                mask = states if spec.dims[axis] == "snapshot" else steps
                begins = np.arange(0, mask.shape[-1], length)
                first = begins if mask is steps else np.array([schema.snapshots[k] for k in begins.tolist()])
                there = np.zeros((*slabs, len(begins)), dtype=bool)
                if before is not None and spec.name in before.chunks:
                    _keep(there, before.chunks[spec.name].there)
                there[at] = np.logical_or.reduceat(mask, begins, axis=-1)
                cut[axis, length] = _Chunks(axis, length, there, np.append(first, schema.steps + 1))
            chunks[spec.name] = cut[axis, length]
        last = np.full(slabs, -1)
        if before is not None:
            _keep(last, before.last)
        last[at] = np.where(steps.any(axis=-1), steps.shape[-1] - 1 - np.argmax(steps[..., ::-1], axis=-1), -1)
        bits = {name: bit for bit, name in enumerate(schema.metrics)}
        return cls(experiment, schema.orders, schema.seeds, schema.again, chunks, bits, batches, last)

    def lost(self, key: str, read: Read) -> str | None:
        """Tell what is lost if the chunk at a key is not there, None where nothing of it counts.

        `read` returns what is at other keys.
        """
        _, array, *rest = key.split("/")
        if rest[:1] != ["c"] or not all(part.isdigit() for part in rest[1:]):
            return None
        index = [int(part) for part in rest[1:]]
        if array == "batch_index":
            if index[0] < len(self.seeds) and index[1] < self.batches:
                what = f"experiment {self.experiment!r}, seed {self.seeds[index[0]]}: the record of its batches"
                return f"{what} is not whole: {key} is missing; restore it from a copy"
            return None
        cut = self.chunks.get(array)
        if cut is None or any(k >= n for k, n in zip((*index[:2], index[cut.axis]), cut.there.shape, strict=True)):
            return None
        slab, at = (index[0], index[1]), index[cut.axis]
        last = int(self.last[slab])
        if cut.there[(*slab, at)] and self._measured(array, slab, at, last, read):
            steps = f"steps {cut.first[at]} to {min(int(cut.first[at + 1]) - 1, last)}"
            where = slab_named(self.experiment, self.orders[slab[0]], self.seeds[slab[1]])
            return f"{where}: {steps} were committed, and {key} is missing; {remedy(self.again)}"
        return None

    def _measured(self, metric: str, slab: tuple[int, int], at: int, last: int, read: Read) -> bool:
        """Tell whether there is a value of a metric, if it is one, in the part of `measured` that is cut alike."""
        if metric not in self.bits:
            return True
        content = read(f"{self.experiment}/measured/c/{slab[0]}/{slab[1]}/{at}")
        if content is None:
            return True
        cut = self.chunks["measured"]
        try:
            refuse_bomb(content, 8 * cut.length)
            bits = np.frombuffer(Zstd().decode(content[:-_CHECKSUM]), "<i8")[: last + 1 - at * cut.length]
        except (ValueError, RuntimeError):
            return True  # that one is damaged: it is said of the first of the two
        return bool((bits >> self.bits[metric] & 1).any())


@dataclass
class Expected:
    """What is known of a store's files."""

    most: dict[str, int] = field(default_factory=dict)
    """Path of an array → what its chunks decode to, at most."""
    vouched: dict[str, Vouched] = field(default_factory=dict)
    """Path of an experiment → what its commit records vouch for, as they were read last."""
    identities: dict[str, Identity] = field(default_factory=dict)
    """Path of an experiment → which one was opened there."""

    def refuse_another(self, key: str, place: Versioned) -> None:
        """Raise where what was just read at a key is not of the experiment that was opened."""
        name = key.partition("/")[0]
        if (opened := self.identities.get(name)) is not None:
            refuse_another(place, name, opened)

    def lost(self, key: str, read: Read) -> str | None:
        """Tell what is lost if a file is not there, None where nothing is; `read` returns what is at other keys."""
        vouched = self.vouched.get(key.partition("/")[0])
        return None if vouched is None else vouched.lost(key, read)

    def refuse_missing(self, key: str, read: Read) -> None:
        """Raise where a file is not there in which something is committed; `read` returns what is at other keys."""
        if (lost := self.lost(key, read)) is not None:
            raise DamageError(lost)


def _keep(values: NDArray[Any], before: NDArray[Any]) -> None:
    """Keep what was known before, also where there were fewer slabs and steps."""
    kept = tuple(slice(0, min(a, b)) for a, b in zip(values.shape, before.shape, strict=True))
    values[kept] = before[kept]
