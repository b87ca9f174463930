"""Regression of a curve by a ReLU network, Figures 4 to 6 of the paper.

The training points are x_i = −1 + 2i/100 for i = 0…100, the test points the 100 midpoints between them; the
loss is the mean squared error. The parameters are those of `torch.nn.Sequential(Linear, ReLU, …, Linear)`
with torch's default initialisation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trajstore.errors import ConfigurationError
from trajstore.operators import Batch
from trajstore.operators.state import Tensors
from trajstore.problems import PROBES, Batches, DType, LiveProblem, Problem, torch_dtype
from trajstore.problems._module import seeded
from trajstore.problems._streams import RowBatches
from trajstore.problems.batches import Sampling, draws

__all__ = ["FAMILY", "Regression"]

CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    "x^2": lambda x: x**2,
    "cos(10x)": lambda x: torch.cos(10 * x),
    "x^3": lambda x: x**3,
}


@dataclass(frozen=True)
class Regression:
    """A network of `depth` hidden layers of `width` ReLU units, fitted to a curve."""

    curve: Literal["x^2", "cos(10x)", "x^3"] = "x^2"
    depth: int = 3
    width: int = 300
    points: int = 101
    batch_size: int = 1
    sampling: Sampling = "iid"
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        if self.depth < 0 or self.width < 1 or self.points < 2:
            raise ConfigurationError(
                f"problem regression: depth {self.depth}, width {self.width}, points {self.points}; "
                "depth must be at least 0, width at least 1, points at least 2"
            )
        draws(self.sampling, self.points, self.batch_size, 0)  # refuses a batch that cannot be drawn

    def module(self) -> nn.Module:
        """Return the network as a module, freshly initialised from torch's global generator."""
        sizes = [1] + [self.width] * self.depth
        hidden = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(sizes[-1], 1)).to(torch_dtype(self.dtype))

    def build(self, device: torch.device) -> LiveProblem:
        """Return the live problem on a device."""
        return _Live(self, device)


class _Live:
    def __init__(self, family: Regression, device: torch.device) -> None:
        n = family.points
        self.examples = {"train_loss": n, "test_loss": n - 1}
        self._family = family
        self._device = device
        grid = torch.arange(2 * n - 1, dtype=torch.float64) / (n - 1) - 1  # points and midpoints in turn
        values = CURVES[family.curve](grid)
        x, y = (t.to(device, torch_dtype(family.dtype))[:, None] for t in (grid, values))
        self._train, test = (x[0::2], y[0::2]), (x[1::2], y[1::2])
        self._probe = test[0][:PROBES]
        # Evaluated together: the weights are read once instead of twice.
        self._both = tuple(torch.cat(pair) for pair in zip(self._train, test, strict=True))
        # Written out instead of called through the module: a quarter less time per step at batch size 1.
        self._layers = [(f"{2 * k}.weight", f"{2 * k}.bias") for k in range(family.depth + 1)]

    def initial(self, init_seed: int) -> tuple[Tensors, Tensors]:
        module = seeded(self._family.module, init_seed)
        return {name: p.detach().to(self._device) for name, p in module.named_parameters()}, {}

    def batches(self, data_seed: int) -> Batches:
        f = self._family
        return RowBatches(draws(f.sampling, f.points, f.batch_size, data_seed), f.batch_size, self._train)

    def loss(self, params: Tensors, buffers: Tensors, batch: Batch) -> tuple[Tensor, Tensors]:
        x, y = batch
        return F.mse_loss(self._network(params, x), y), buffers

    def evaluate(self, params: Tensors, buffers: Tensors) -> Tensors:
        x, y = self._both
        errors = (self._network(params, x).double() - y.double()).square()
        n = self._family.points
        return {"train_loss": errors[:n].mean(), "test_loss": errors[n:].mean()}

    def outputs(self, params: Tensors, buffers: Tensors) -> Tensor:
        return self._network(params, self._probe)

    def _network(self, params: Tensors, x: Tensor) -> Tensor:
        for weight, bias in self._layers[:-1]:
            x = F.relu(F.linear(x, params[weight], params[bias]))
        weight, bias = self._layers[-1]
        return F.linear(x, params[weight], params[bias])


FAMILY: type[Problem] = Regression
