"""Step decay, as `torch.optim.lr_scheduler.StepLR`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trajstore.errors import ConfigurationError
from trajstore.operators.schedules import Schedule

__all__ = ["FAMILY", "Step"]


@dataclass(frozen=True)
class Step:
    """Multiply by `gamma` after every `every` applications."""

    every: int
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigurationError(f"step schedule: every is {self.every}; it must be at least 1")

    def factor(self, k: Tensor) -> Tensor:
        """Return gamma^⌊k / every⌋."""
        return torch.pow(
            torch.tensor(self.gamma, dtype=torch.float64, device=k.device),
            torch.div(k, self.every, rounding_mode="floor"),
        )


FAMILY: type[Schedule] = Step
