"""Noise that is a pure function of a key: the same for any engine, any tiling, any device.

torch's own generator gives numbers in the order in which they are asked for, so a mask drawn for sixteen chains
at once differs from the one drawn for each alone. Here every number is an integer hash of (key, salt, position).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["keyed_uniform"]

_LOW = 0xFFFF_FFFF


def keyed_uniform(key: Tensor, salt: int, shape: Sequence[int]) -> Tensor:
    """Return float32 numbers in [0, 1) from an int64 key (0-dimensional, below 2^62) and a salt."""
    position = torch.arange(math.prod(shape), device=key.device).reshape(shape)
    seed = _mix(_mix(key & _LOW) ^ (key >> 32) ^ _mix(torch.tensor(salt, device=key.device)))
    return (_mix(_mix(position ^ seed) + seed) >> 8).float() * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    """Hash 32 bits into 32 bits. Both factors are below 2^31, so int64 products do not overflow."""
    x = x & _LOW
    x = x ^ (x >> 16)
    x = (x * 0x21F0_AAAD) & _LOW
    x = x ^ (x >> 15)
    x = (x * 0x735A_2D97) & _LOW
    return x ^ (x >> 15)
