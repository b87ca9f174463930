"""The quadratic loss with gradient noise: Sections 3.1 and 3.2 of the paper.

L_i(θ) = ½ θᵀHθ − ε_i·θ, whose gradient Hθ − ε_i gives T_i(θ) = (1 − hH)θ + hε_i. The noise ε_i is normal
with standard deviation `noise`, independent of everything but the key (data seed, i). H has the given
spectrum, in a basis that `rotation_seed` turns at random (None: along the axes).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trajstore.errors import ConfigurationError
from trajstore.operators import Batch
from trajstore.operators.state import Tensors
from trajstore.problems import Batches, DType, LiveProblem, Problem, torch_dtype
from trajstore.problems._streams import NoiseBatches, normal_start
from trajstore.problems.batches import generator

__all__ = ["FAMILY", "Quadratic"]


@dataclass(frozen=True)
class Quadratic:
    """½ θᵀHθ with additive gradient noise; θ₀ is normal with standard deviation `start`."""

    spectrum: tuple[float, ...] = (1.0,)
    noise: float = 1.0
    rotation_seed: int | None = None
    start: float = 1.0
    dtype: DType = "float64"

    def __post_init__(self) -> None:
        if not self.spectrum or not np.isfinite(self.spectrum).all():
            raise ConfigurationError("problem quadratic: spectrum needs at least one finite eigenvalue")
        if not 0 <= self.noise < float("inf"):
            raise ConfigurationError(f"problem quadratic: noise is {self.noise}; it must be finite and at least 0")

    @property
    def hessian(self) -> NDArray[np.float64]:
        """H, symmetric with the given spectrum."""
        if self.rotation_seed is None:
            return np.diag(np.asarray(self.spectrum, dtype=np.float64))
        d = len(self.spectrum)
        gaussian = generator(self.rotation_seed, "problem").standard_normal((d, d))
        basis, _ = np.linalg.qr(gaussian)
        rotated = (basis * np.asarray(self.spectrum)) @ basis.T
        return np.asarray((rotated + rotated.T) / 2)

    def build(self, device: torch.device) -> LiveProblem:
        """Return the live problem on a device."""
        return _Live(self, device)


class _Live:
    def __init__(self, family: Quadratic, device: torch.device) -> None:
        self.examples = {"train_loss": None}
        self._family = family
        self._hessian = torch.from_numpy(family.hessian).to(device, torch_dtype(family.dtype))

    def initial(self, init_seed: int) -> tuple[Tensors, Tensors]:
        theta = normal_start(init_seed, self._family.start, len(self._family.spectrum))
        return {"theta": theta.to(self._hessian)}, {}

    def batches(self, data_seed: int) -> Batches:
        def noise(i: int) -> Tensor:
            vector = generator(data_seed, "noise", i).standard_normal(len(self._family.spectrum))
            return torch.from_numpy(self._family.noise * vector).to(self._hessian)

        return NoiseBatches(noise)

    def loss(self, params: Tensors, buffers: Tensors, batch: Batch) -> tuple[Tensor, Tensors]:
        theta, (noise,) = params["theta"], batch
        return 0.5 * theta @ (self._hessian @ theta) - noise @ theta, buffers

    def evaluate(self, params: Tensors, buffers: Tensors) -> Tensors:
        theta = params["theta"].double()
        return {"train_loss": 0.5 * theta @ (self._hessian.double() @ theta)}


FAMILY: type[Problem] = Quadratic
