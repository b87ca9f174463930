"""Inverse square root decay, with an optional linear warm-up."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trajstore.errors import ConfigurationError
from trajstore.operators.schedules import Schedule, warmed_up

__all__ = ["FAMILY", "InverseSqrt"]


@dataclass(frozen=True)
class InverseSqrt:
    """√(w / (k + 1)) after w applications of warm-up; 1 / √(k + 1) without."""

    warmup: int = 0

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise ConfigurationError(f"inverse-sqrt schedule: warmup is {self.warmup}; it cannot be negative")

    def factor(self, k: Tensor) -> Tensor:
        """Return the factor, 1 at the end of the warm-up."""
        return warmed_up(k, self.warmup, (max(self.warmup, 1) / (k + 1).double()).sqrt())


FAMILY: type[Schedule] = InverseSqrt
