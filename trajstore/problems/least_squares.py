"""Linear least squares on a finite sum, with its minimiser and Hessian known.

L_B(θ) = mean over B of ½(x·θ − y)² + ½ ridge ‖θ‖². Every T_i is affine, θ ↦ A_iθ + b_i, so compositions fold
into one matrix and one vector: an exact oracle. Without noise and ridge all T_i share the fixed point
(interpolation), and forward iterates converge to a point as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trajstore.errors import ConfigurationError
from trajstore.operators import Batch
from trajstore.operators.state import Tensors
from trajstore.problems import PROBES, Batches, DType, LiveProblem, Problem, torch_dtype
from trajstore.problems._streams import RowBatches, normal_start
from trajstore.problems.batches import Sampling, draws, generator

__all__ = ["FAMILY", "LeastSquares"]


@dataclass(frozen=True)
class LeastSquares:
    """Gaussian rows X, targets y = Xθ_true + noise; all drawn from `problem_seed`."""

    n: int = 50
    d: int = 5
    noise: float = 0.5
    ridge: float = 0.0
    batch_size: int = 1
    sampling: Sampling = "iid"
    problem_seed: int = 0
    start: float = 1.0
    dtype: DType = "float64"

    def __post_init__(self) -> None:
        if self.n < 1 or self.d < 1:
            raise ConfigurationError(f"problem least-squares: n = {self.n} and d = {self.d} must be at least 1")
        draws(self.sampling, self.n, self.batch_size, 0)  # refuses a batch that cannot be drawn

    @cached_property
    def data(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """X (n, d) and y (n,) in float64."""
        rng = generator(self.problem_seed, "problem")
        X, truth = rng.standard_normal((self.n, self.d)), rng.standard_normal(self.d)
        return X, X @ truth + self.noise * rng.standard_normal(self.n)

    @property
    def hessian(self) -> NDArray[np.float64]:
        """The Hessian of the full loss."""
        X, _ = self.data
        return np.asarray(X.T @ X / self.n + self.ridge * np.eye(self.d))

    @property
    def minimiser(self) -> NDArray[np.float64]:
        """The minimiser of the full loss (of least norm, where there are several)."""
        X, y = self.data
        return np.asarray(np.linalg.lstsq(self.hessian, X.T @ y / self.n)[0])

    def build(self, device: torch.device) -> LiveProblem:
        """Return the live problem on a device."""
        return _Live(self, device)


class _Live:
    def __init__(self, family: LeastSquares, device: torch.device) -> None:
        self.examples = {"train_loss": family.n}
        self._family = family
        self._X, self._y = (torch.from_numpy(a).to(device, torch_dtype(family.dtype)) for a in family.data)

    def initial(self, init_seed: int) -> tuple[Tensors, Tensors]:
        return {"theta": normal_start(init_seed, self._family.start, self._family.d).to(self._X)}, {}

    def batches(self, data_seed: int) -> Batches:
        f = self._family
        return RowBatches(draws(f.sampling, f.n, f.batch_size, data_seed), f.batch_size, [self._X, self._y])

    def loss(self, params: Tensors, buffers: Tensors, batch: Batch) -> tuple[Tensor, Tensors]:
        return self._loss(params["theta"], *batch), buffers

    def evaluate(self, params: Tensors, buffers: Tensors) -> Tensors:
        return {"train_loss": self._loss(params["theta"].double(), self._X.double(), self._y.double())}

    def outputs(self, params: Tensors, buffers: Tensors) -> Tensor:
        return self._X[:PROBES] @ params["theta"]

    def _loss(self, theta: Tensor, X: Tensor, y: Tensor) -> Tensor:
        loss = 0.5 * (X @ theta - y).square().mean()
        return loss + 0.5 * self._family.ridge * theta.square().sum() if self._family.ridge else loss


FAMILY: type[Problem] = LeastSquares
