"""Resume states: what it takes to go on with a slab, as bytes that mean something to whoever records.

A slab has two slots. The state of a commit goes to the slot that does not hold the state of the commit before, so
whichever of them counts in the end, its state is there. A slot is one chunk: it is replaced whole.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from trajstore.errors import TrajstoreError
from trajstore.storage.format.checking import most_bytes
from trajstore.storage.format.codecs import refuse_strange

__all__ = ["GROUP", "ResumeSlots", "create_slot"]

GROUP = "resume"
_HEAD = 8
"""Bytes of the step in front of a state, little-endian."""


class ResumeSlots:
    """The resume states of one (order, seed)."""

    def __init__(self, group: zarr.Group, order: str, seed: int) -> None:
        self._group = group
        self.paths = [f"{GROUP}/{quote(order, safe='')}.{seed}.{slot}" for slot in (0, 1)]
        self._steps: list[int] | None = None

    def latest(self, committed: int) -> tuple[int, bytes] | None:
        """Return the latest state that is whole, not later than the last committed step, and its step."""
        return max((content for content in self.contents() if content[0] <= committed), default=None)

    def contents(self) -> list[tuple[int, bytes]]:
        """Return the states that are whole, and their steps."""
        return [content for path in self.paths if (content := self._read(path)) is not None]

    def put(self, step: int, state: bytes, committed: int) -> None:
        """Store the state for a step, beside the latest that counts already."""
        if self._steps is None:
            contents = [self._read(path) for path in self.paths]
            self._steps = [-1 if content is None else content[0] for content in contents]
        # What lies beyond the last commit is of a recording that died before it could commit.
        counts = [one if one <= committed else -1 for one in self._steps]
        slot = 0 if counts[0] < counts[1] else 1
        content = np.frombuffer(step.to_bytes(_HEAD, "little", signed=True) + state, dtype=np.uint8)
        path, size = self.paths[slot], len(content)
        array: Any = self._group.get(path) if self._read(path) is not None else None
        if array is None or array.shape != (size,):
            array = create_slot(self._group, path, size)
        array[...] = content
        self._steps[slot] = step

    def whole(self, path: str) -> bool:
        """Tell whether a slot can be read."""
        return self._read(path) is not None

    def _read(self, path: str) -> tuple[int, bytes] | None:
        try:
            array: Any = self._group.get(path)
            if not isinstance(array, zarr.Array):
                return None
            refuse_strange(array)
            if array.ndim != 1 or array.dtype != np.uint8 or array.chunks != array.shape or array.size > most_bytes():
                return None
            content = np.asarray(array[...]).tobytes()
        except TrajstoreError:
            raise
        except (ValueError, RuntimeError, TypeError, KeyError):
            return None  # damaged: `verify` says so, and a recording starts further back
        if not any(content[_HEAD:]):
            return None  # declared, and not written before its process ended
        return int.from_bytes(content[:_HEAD], "little", signed=True), content[_HEAD:]


def create_slot(group: zarr.Group, path: str, size: int) -> zarr.Array[Any]:
    """Create the array of a slot, one chunk of bytes."""
    return group.create_array(
        path, shape=(size,), chunks=(size,), dtype="uint8", fill_value=0, overwrite=True,
        serializer=BytesCodec(), compressors=[Crc32cCodec()], config={"write_empty_chunks": True},
        dimension_names=(f"byte of {path.rpartition('/')[2]}",),
        attributes={"description": "the step, and what it takes to go on from there, as safetensors"},
    )  # fmt: skip
