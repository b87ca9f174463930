"""The two kinds of batch stream that the families share, and how several batches are stacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trajstore.batches import Draw, generator
from trajstore.operators import Batch
from trajstore.problems import Batches

__all__ = ["NoiseBatches", "RowBatches", "normal_start", "stacked"]


def stacked(picks: Sequence[tuple[Batches, int]]) -> Batch:
    """Return several batches, of any streams of one problem, stacked along a new first dimension."""
    first = picks[0][0]
    if not isinstance(first, RowBatches):
        return tuple(map(torch.stack, zip(*(stream[i] for stream, i in picks), strict=True)))
    # One gather for all of them, and one more for their rows where they share a stream.
    if all(stream is first for stream, _ in picks):
        drawn = first.table([i for _, i in picks])
    else:
        drawn = np.stack([stream.examples(i) for stream, i in picks])
    rows = torch.from_numpy(drawn).to(first.tensors[0].device)
    keys = [stream.keys(i) for stream, i in picks if isinstance(stream, RowBatches)]
    return (*(t[rows] for t in first.tensors), *(torch.tensor(k, device=rows.device) for k in zip(*keys, strict=True)))


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
        self._table = np.empty((0, batch_size), dtype=np.int64)

    def table(self, indices: Sequence[int]) -> NDArray[np.int64]:
        """Return the rows of several batches, one a row of the result."""
        known = len(self._table)
        if known < (needed := max(indices)):
            more = [self.examples(i) for i in range(known + 1, max(needed, 2 * known) + 1)]
            self._table = np.concatenate([self._table, more])
        rows: NDArray[np.int64] = self._table[np.asarray(indices) - 1]
        return rows

    def __getitem__(self, i: int) -> Batch:
        rows = torch.from_numpy(self.examples(i)).to(self.tensors[0].device)
        return (*(t[rows] for t in self.tensors), *(torch.tensor(k, device=rows.device) for k in self.keys(i)))

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
