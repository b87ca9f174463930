"""Reading states: chunks decoded where they are needed, in memory that is used again.

Zarr would decode each chunk into fresh memory and copy from there into more of it, which takes as long as decoding.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs import Zstd  # type: ignore[import-untyped]
from numpy.typing import NDArray
from pcodec.standalone import simple_decompress_into  # type: ignore[import-untyped]

from trajstore.errors import FormatError
from trajstore.storage.format.codecs import Codec, refuse_bomb, zstd_size
from trajstore.storage.places.elsewhere import refuse_only_here, refuse_unseen
from trajstore.storage.places.expected import Expected
from trajstore.storage.places.opening import place_of
from trajstore.storage.places.place import Keeper, Place

__all__ = ["States"]

_CHECK = 4
"""Bytes of the checksum at the end of a chunk, little-endian."""
_SOUND = 0x48674BC7
"""The checksum of anything that ends in its own checksum: so nothing need be copied to leave its end out."""
_own = threading.local()


def _span(part: slice | int, length: int) -> range:
    whole = range(length)
    if isinstance(part, slice):
        return whole[part]
    at = whole[part]
    return range(at, at + 1)


@cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Return threads that stay, with their buffers; a fork has none of them."""
    return ThreadPoolExecutor(os.cpu_count(), "reading")


@dataclass(frozen=True)
class States:
    """The array `params` of an experiment, to be indexed by slices and positions, one a dimension."""

    address: str
    path: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype[Any]
    codec: Codec
    expected: Expected = field(default_factory=Expected, compare=False)
    """What is known of the store's files."""
    place: Place | None = field(default=None, compare=False)
    """Where that is, in the process that has it open."""

    @classmethod
    def of(cls, place: Place, array: zarr.Array[Any], codec: Codec) -> States:
        """Read an array at its place."""
        expected = array.store.expected if isinstance(array.store, Keeper) else Expected()
        return cls(place.address, array.path, array.shape, array.chunks, array.dtype, codec, expected, place)

    @property
    def ndim(self) -> int:
        """Dimensions."""
        return len(self.shape)

    def __getitem__(self, where: tuple[slice | int, ...]) -> NDArray[Any]:
        spans = [_span(part, n) for part, n in zip(where, self.shape, strict=True)]
        shown = self._read([span if span.step > 0 else span[::-1] for span in spans])
        turned = [slice(None, None, 1 if span.step > 0 else -1) for span in spans]
        return shown[tuple(turn if isinstance(part, slice) else 0 for part, turn in zip(where, turned, strict=True))]

    def __reduce__(self) -> tuple[Any, ...]:
        if place_of(self.address).only_here:
            refuse_only_here(self.address)
        described = self.address, self.path, self.shape, self.chunks, self.dtype, self.codec, self.expected
        return _states_elsewhere, described

    def _read(self, spans: list[range]) -> NDArray[Any]:
        out = np.empty(tuple(map(len, spans)), self.dtype)
        if not out.size:
            return out
        parts = [
            range(span[0] // length, span[-1] // length + 1) for span, length in zip(spans, self.chunks, strict=True)
        ]
        indices = list(product(*parts))
        if len(indices) == 1 and all(
            span == range(k * length, (k + 1) * length)
            for k, length, span in zip(indices[0], self.chunks, spans, strict=True)
        ):
            self._decode(indices[0], out)
        elif len(indices) == 1:
            self._copy(indices[0], spans, out)
        else:
            list(_threads(os.getpid()).map(lambda index: self._copy(index, spans, out), indices))
        return out

    def _copy(self, index: tuple[int, ...], spans: list[range], out: NDArray[Any]) -> None:
        """Copy what is asked for of one chunk."""
        chunk, inner, outer = self._chunk(index), [], []
        for k, length, span in zip(index, self.chunks, spans, strict=True):
            begin = max(0, -(-(k * length - span.start) // span.step))
            stop = min(len(span), -(-((k + 1) * length - span.start) // span.step))
            outer.append(slice(begin, stop))
            first = span.start + begin * span.step - k * length
            inner.append(slice(first, first + (stop - begin - 1) * span.step + 1, span.step))
        out[tuple(outer)] = chunk[tuple(inner)]

    def _chunk(self, index: tuple[int, ...]) -> NDArray[Any]:
        """Return a chunk, in a buffer of this thread's own, valid until the next call."""
        buffer: NDArray[Any] | None = getattr(_own, "buffer", None)
        if buffer is None or buffer.shape != self.chunks or buffer.dtype != self.dtype:
            buffer = _own.buffer = np.empty(self.chunks, self.dtype)
        self._decode(index, buffer)
        return buffer

    def _decode(self, index: tuple[int, ...], out: NDArray[Any]) -> None:
        """Fill an array with a chunk."""
        key = f"{self.path}/c/{'/'.join(map(str, index))}"
        place = self.place or place_of(self.address)
        content = place.read(key, out.nbytes)
        self.expected.refuse_another(key, place)
        if content is None:
            self.expected.refuse_missing(key, place.read)
            out.fill(np.nan)
            return
        if google_crc32c.value(content) != _SOUND:
            raise ValueError(f"stored and computed checksum do not match: {self.path}, chunk {index}")
        chunk = memoryview(content)[:-_CHECK]
        if self.codec == "pcodec":
            try:
                done = simple_decompress_into(bytes(chunk), out.reshape(-1))
            except RuntimeError as error:
                if "Compatibility" not in str(error):
                    raise
                told = f"{self.path}, chunk {index} is of a later pcodec than is installed ({error})"
                raise FormatError(f"{told}; nothing is damaged: `pip install --upgrade pcodec`") from None
            whole = done.finished and done.n_processed == out.size
        else:
            refuse_bomb(chunk, out.nbytes)
            whole = Zstd().decode(chunk, out=out).nbytes == out.nbytes and zstd_size(chunk) == out.nbytes
        if not whole:  # the rest of the buffer is of whatever was decoded before
            raise ValueError(f"{self.path}, chunk {index} holds another number of values than the array declares")


def _states_elsewhere(address: str, *described: Any) -> States:  # noqa: ANN401
    if "://" not in address:
        refuse_unseen(address)
    return States(address, *described)
