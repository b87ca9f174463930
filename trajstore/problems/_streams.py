"""The two kinds of batch stream that the families share: rows of tensors, and noise vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trajstore.batches import Draw, generator
from trajstore.operators import Batch

__all__ = ["NoiseBatches", "RowBatches", "normal_start"]


def normal_start(init_seed: int, scale: float, size: int) -> Tensor:
    """Return a θ₀ in float64 whose entries are normal with standard deviation `scale`."""
    return torch.from_numpy(scale * generator(init_seed, "start").standard_normal(size))


class RowBatches:
    """B_i as the drawn rows of each of several tensors."""

    def __init__(self, draw: Draw, batch_size: int, tensors: Sequence[Tensor]) -> None:
        self.examples = draw
        self.batch_size = batch_size
        self._tensors = tensors

    def __getitem__(self, i: int) -> Batch:
        rows = torch.from_numpy(self.examples(i)).to(self._tensors[0].device)
        return tuple(t[rows] for t in self._tensors)


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
