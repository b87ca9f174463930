"""Codecs: how chunks become bytes.

`pcodec` compresses a weight's history best and needs the `pcodec` package to read; `portable` is made of core
Zarr v3 codecs only. Every chunk ends in a CRC-32C.

numcodecs' PCodec silently corrupts chunks that are not C-contiguous, so nothing in trajstore assigns to an
array of floats but `write_block`, which hands over one contiguous chunk at a time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import product
from typing import Any, Literal, get_args

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.codec import ArrayBytesCodec, BytesBytesCodec
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.codecs.numcodecs import PCodec

__all__ = [
    "CODECS",
    "Codec",
    "chunk_bytes",
    "chunk_codecs",
    "refuse_bomb",
    "refuse_large_chunks",
    "refuse_strange",
    "write_block",
    "zstd_size",
]

Codec = Literal["pcodec", "portable"]
CODECS: tuple[Codec, ...] = get_args(Codec)

# zarr says so at every opening of every array; `docs/format.md` says it once, and what reads it.
warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3")


def chunk_codecs(codec: Codec) -> tuple[ArrayBytesCodec, list[BytesBytesCodec]]:
    """Return the serializer and the compressors of a choice."""
    if codec == "portable":
        return BytesCodec(), [ZstdCodec(level=1), Crc32cCodec()]
    # Weights are plain floats: looking for other modes takes a fifth of the time and finds none.
    return PCodec(level=7, mode_spec="classic", delta_spec="try_consecutive", delta_encoding_order=1), [Crc32cCodec()]


_PLAIN = (("bytes", "zstd", "crc32c"), ("vlen-utf8", "zstd", "crc32c"), ("bytes", "crc32c"))
"""The codecs of everything but states: of numbers, of labels, and of what it takes to resume."""
_TYPES = frozenset({"float64", "float32", "int64", "uint8", "string"})
_TEXT_BYTES = 2**26
"""What a chunk of labels may take, decoded: their length is not declared."""
_MOST = 2**31 - 1
"""Bytes that a codec can take at a time."""


def refuse_strange(array: zarr.Array[Any], codec: Codec | None = None) -> None:
    """Refuse an array that no recording declares: other codecs or types, or chunks that no codec could take.

    `codec` is the choice that its schema declares, if the array holds states: what decodes them is bounded. What is
    bounded for others is one frame of zstd, so that neither another codec nor another order of them may stand there.
    """
    described = array.metadata.to_dict()
    codecs: Any = described.get("codecs", ())
    names = tuple(str(one.get("name")) for one in codecs)
    allowed = {None: _PLAIN, "pcodec": (("numcodecs.pcodec", "crc32c"),), "portable": _PLAIN[:1]}[codec]
    kind = str(described.get("data_type"))
    if any(one.get("configuration", {}).get("endian") == "big" for one in codecs):
        raise ValueError(f"the array {array.path!r} says that its numbers are big-endian, and no store's are")
    if names not in allowed:
        told = ", ".join(names[:4])
        raise ValueError(f"the array {array.path!r} has the codecs {told!r}, with which no store writes such an array")
    if kind not in _TYPES:
        raise ValueError(f"the array {array.path!r} is of type {kind!r}, of which no store has any")
    refuse_large_chunks(array.path, array.chunks, chunk_bytes(array) // max(1, math.prod(array.chunks)))


def refuse_large_chunks(array: str, chunks: Sequence[int], itemsize: int) -> None:
    """Refuse chunks of nothing, and those that no codec could take."""
    if not chunks or min(chunks) < 1 or math.prod(chunks) * itemsize > _MOST:
        raise ValueError(f"the array {array!r} has chunks of shape {tuple(chunks)}, which no store has")


def chunk_bytes(array: zarr.Array[Any]) -> int:
    """Return how many bytes a chunk decodes to, at most."""
    if array.dtype.kind in "TO":
        return _TEXT_BYTES
    return math.prod(array.chunks) * array.dtype.itemsize


def refuse_bomb(content: bytes | memoryview, most: int) -> None:
    """Refuse a chunk that would decode to more than its array declares, before memory is taken for it."""
    says = zstd_size(content)
    if says is not None and says > most:
        raise ValueError(f"a chunk says that it decodes to {says:,} bytes, and the array declares {most:,}")


def zstd_size(content: bytes | memoryview) -> int | None:
    """Return what a frame of zstd says it decodes to; None where it is no frame, and too much where it does not say."""
    head = bytes(content[:18])
    if head[:4] != b"\x28\xb5\x2f\xfd" or len(head) < 6:
        return None
    flag, single = head[4] >> 6, bool(head[4] & 0x20)
    size = (int(single), 2, 4, 8)[flag]
    start = 5 + (not single) + (0, 1, 2, 4)[head[4] & 3]
    if not size:  # every frame of ours says it; one that does not could decode to anything
        return 2**64
    return int.from_bytes(head[start : start + size], "little") + (256 if size == 2 else 0)


def write_block(array: zarr.Array[Any], start: tuple[int, ...], block: NDArray[Any]) -> None:
    """Write a block whose corner lies on the chunk grid, chunk by chunk, each contiguous.

    The block must end at chunk borders or at the array's end.
    """
    steps = [range(0, n, c) for n, c in zip(block.shape, array.chunks, strict=True)]
    for corner in product(*steps):
        inner = tuple(slice(o, o + c) for o, c in zip(corner, array.chunks, strict=True))
        chunk = np.ascontiguousarray(block[inner])
        outer = tuple(slice(s + o, s + o + n) for s, o, n in zip(start, corner, chunk.shape, strict=True))
        array[outer] = chunk
