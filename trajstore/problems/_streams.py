"""The two kinds of batch stream that the families share, and how several batches are stacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trajstore.operators import Batch
from trajstore.problems import Batches
from trajstore.problems.batches import Draw, Sampling, draws, generator

__all__ = ["NoiseBatches", "RowBatches", "normal_start", "stacked"]


def stacked(streams: Sequence[Batches], seeds: NDArray[np.int64], indices: NDArray[np.int64]) -> Batch:
    """Return several batches, given by stream and index, stacked along a new first dimension."""
    first = streams[0]
    if not isinstance(first, RowBatches):
        picks = (streams[k][i] for k, i in zip(seeds.tolist(), indices.tolist(), strict=True))
        return tuple(map(torch.stack, zip(*picks, strict=True)))
    # One gather for all of them.
    rows, keys = np.empty((len(indices), first.batch_size), np.int64), np.empty((len(indices), first.keyed), np.int64)
    for k in np.unique(seeds):
        stream, here = streams[k], seeds == k
        assert isinstance(stream, RowBatches)
        rows[here], keys[here] = stream.table(indices[here])
    device = first.tensors[0].device
    drawn = torch.from_numpy(rows).to(device)
    return (*(t[drawn] for t in first.tensors), *torch.from_numpy(keys).to(device).unbind(1))


def normal_start(init_seed: int, scale: float, size: int) -> Tensor:
    """Return a θ₀ in float64 whose entries are normal with standard deviation `scale`."""
    return torch.from_numpy(scale * generator(init_seed, "start").standard_normal(size))


class RowBatches:
    """B_i as the drawn rows of each of several tensors, and where asked for a noise key behind them."""

    def __init__(self, draw: Draw, batch_size: int, tensors: Sequence[Tensor], key_seed: int | None = None) -> None:
        self.examples = draw
        self.batch_size = batch_size
        self.tensors = tensors
        self._key_seed = key_seed
        self.keyed = 0 if key_seed is None else 1
        self._rows = np.empty((0, batch_size), dtype=np.int64)
        self._keys = np.empty((0, self.keyed), dtype=np.int64)

    def table(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the rows and the keys of several batches, one a row of each result."""
        known, needed = len(self._rows), int(indices.max())
        if known < needed:
            more = range(known + 1, max(needed, 2 * known) + 1)
            self._rows = np.concatenate([self._rows, [self.examples(i) for i in more]])
            keys = np.array([self.keys(i) for i in more], dtype=np.int64)
            self._keys = np.concatenate([self._keys, keys.reshape(len(more), self.keyed)])
        return self._rows[indices - 1], self._keys[indices - 1]

    def __getitem__(self, i: int) -> Batch:
        rows = torch.from_numpy(self.examples(i)).to(self.tensors[0].device)
        return (*(t[rows] for t in self.tensors), *(torch.tensor(k, device=rows.device) for k in self.keys(i)))

    def redrawn(self, sampling: Sampling, seed: int) -> RowBatches:
        """Return batches of as many of the same rows, drawn as is asked for."""
        draw = draws(sampling, len(self.tensors[0]), self.batch_size, seed)
        return RowBatches(draw, self.batch_size, self.tensors, None if self._key_seed is None else seed)

    def keys(self, i: int) -> list[int]:
        """Return the noise key of (data seed, i), or nothing."""
        return [] if self._key_seed is None else [int(generator(self._key_seed, "noise", i).integers(2**62))]


class NoiseBatches:
    """B_i as one noise vector; it holds no examples."""

    batch_size = 0

    def __init__(self, noise: Callable[[int], Tensor]) -> None:
        self._noise = noise
        self._known: dict[int, Tensor] = {}

    def __getitem__(self, i: int) -> Batch:
        if i not in self._known:  # a backward recording asks once per chain
            self._known[i] = self._noise(i)
        return (self._known[i],)

    def examples(self, i: int) -> NDArray[np.int64]:
        """Return no indices."""
        return np.empty(0, dtype=np.int64)
