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

__all__ = ["GROUP", "ResumeSlots", "create_slot"]

GROUP = "resume"
_HEAD = 8
"""Bytes of the step in front of a state, little-endian."""


class ResumeSlots:
    """The resume states of one (order, seed)."""

    def __init__(self, group: zarr.Group, order: str, seed: int) -> None:
        self._group = group
        self.paths = [f"{GROUP}/{quote(order, safe='')}.{seed}.{slot}" for slot in (0, 1)]
        self._steps: list[int | None] | None = None

    def get(self, step: int) -> bytes | None:
        """Return the state that was put for a step; None where there is none that is whole."""
        for path in self.paths:
            content = self._read(path)
            if content is not None and content[0] == step:
                return content[1]
        return None

    def put(self, step: int, state: bytes, committed: int) -> None:
        """Store the state for a step, beside that of the step which is committed now."""
        if self._steps is None:
            contents = [self._read(path) for path in self.paths]
            self._steps = [None if content is None else content[0] for content in contents]
        slot = 1 if self._steps[0] == committed else 0
        content = np.frombuffer(step.to_bytes(_HEAD, "little", signed=True) + state, dtype=np.uint8)
        path, size = self.paths[slot], len(content)
        array = self._group.get(path)
        if not isinstance(array, zarr.Array) or array.shape != (size,) or array.chunks != (size,):
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
            content = np.asarray(array[...]).tobytes()
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
