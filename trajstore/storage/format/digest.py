"""Digests: what a commit record vouches for.

The digest of a segment is the SHA-256 of its recorded steps one after the other, each as the little-endian
bytes of its decoded values. A digest of the first k steps is therefore a digest of a prefix.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["SegmentDigest", "config_digest"]


class SegmentDigest:
    """A running digest over the recorded steps of one segment."""

    WORDS = 4

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(
        self,
        step: int,
        leg: int,
        measured: int,
        metrics: Sequence[float],
        sketch: NDArray[np.float64],
        state: Sequence[NDArray[Any]],
    ) -> None:
        """Add one recorded step: the metrics that were measured; params and counters where a state is stored."""
        head, measurements = np.array([step, leg, measured], dtype=np.int64), np.array(metrics, dtype=np.float64)
        for values in (head, measurements, sketch, *state):
            self._hash.update(np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).data)

    def words(self) -> NDArray[np.int64]:
        """Return the 32 bytes so far as four little-endian int64."""
        return np.frombuffer(self._hash.digest(), dtype="<i8").astype(np.int64)


def config_digest(config: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a configuration in canonical JSON (sorted keys, no spaces)."""
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(canonical.encode(errors="surrogatepass")).hexdigest()
