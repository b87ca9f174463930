"""Half a cosine from 1 down to `final`, with an optional linear warm-up."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from trajstore.errors import ConfigurationError
from trajstore.operators.schedules import Schedule, warmed_up

__all__ = ["FAMILY", "Cosine"]


@dataclass(frozen=True)
class Cosine:
    """Warm up over `warmup` applications, reach `final` after `total`, stay there."""

    total: int
    warmup: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.total:
            raise ConfigurationError(
                f"cosine schedule: warmup {self.warmup} must be at least 0 and below total {self.total}"
            )

    def factor(self, k: Tensor) -> Tensor:
        """Return the factor; without warm-up it is `CosineAnnealingLR` with T_max = total."""
        done = ((k - self.warmup).double() / (self.total - self.warmup)).clamp(0.0, 1.0)
        return warmed_up(k, self.warmup, self.final + (1 - self.final) * 0.5 * (1 + (math.pi * done).cos()))


FAMILY: type[Schedule] = Cosine
