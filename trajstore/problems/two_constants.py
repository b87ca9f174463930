"""Two constant maps, Example 2.4 of the paper: T_i is x₀ for ever or y₀ for ever, a coin decides which.

Written as a finite sum of two examples, L_i(θ) = ½(θ − c_i)² with c_i ∈ {x₀, y₀}: with SGD at learning rate
1 each T_i is the constant map, exactly so in floating point for values on a grid of 2⁻¹⁰, like ±1. At learning
rate ½ the forward law is uniform between the two (a Bernoulli convolution).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trajstore.operators import Batch
from trajstore.operators.state import Tensors
from trajstore.problems import Batches, DType, LiveProblem, Problem, torch_dtype
from trajstore.problems._streams import RowBatches, normal_start
from trajstore.problems.batches import draws

__all__ = ["FAMILY", "TwoConstants"]


@dataclass(frozen=True)
class TwoConstants:
    """The two values; θ₀ is normal with standard deviation `start`."""

    x0: float = -1.0
    y0: float = 1.0
    start: float = 1.0
    dtype: DType = "float64"

    def build(self, device: torch.device) -> LiveProblem:
        """Return the live problem on a device."""
        return _Live(self, device)


class _Live:
    def __init__(self, family: TwoConstants, device: torch.device) -> None:
        self.examples = {"train_loss": 2}
        self._start = family.start
        self._values = torch.tensor([family.x0, family.y0], dtype=torch_dtype(family.dtype), device=device)

    def initial(self, init_seed: int) -> tuple[Tensors, Tensors]:
        # On a grid of 2⁻¹⁰, θ − (θ − c) is c exactly in either precision, as a constant map should give.
        theta = (normal_start(init_seed, self._start, 1) * 1024).round() / 1024
        return {"theta": theta.to(self._values)}, {}

    def batches(self, data_seed: int) -> Batches:
        return RowBatches(draws("iid", 2, 1, data_seed), 1, [self._values])

    def loss(self, params: Tensors, buffers: Tensors, batch: Batch) -> tuple[Tensor, Tensors]:
        (value,) = batch
        return 0.5 * (params["theta"] - value).square().sum(), buffers

    def evaluate(self, params: Tensors, buffers: Tensors) -> Tensors:
        return {"train_loss": 0.5 * (params["theta"].double() - self._values.double()).square().mean()}


FAMILY: type[Problem] = TwoConstants
