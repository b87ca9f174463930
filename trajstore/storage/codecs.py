"""Codecs: how chunks become bytes.

`pcodec` compresses a weight's history best and needs the `pcodec` package to read; `portable` is made of core
Zarr v3 codecs only. Every chunk ends in a CRC-32C.

numcodecs' PCodec silently corrupts chunks that are not C-contiguous, so nothing in trajstore assigns to an
array of floats but `write_block`, which hands over one contiguous chunk at a time.
"""

from __future__ import annotations

import warnings
from itertools import product
from typing import Any, Literal, get_args

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.codec import ArrayBytesCodec, BytesBytesCodec
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.codecs.numcodecs import PCodec

__all__ = ["CODECS", "Codec", "chunk_codecs", "write_block"]

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
