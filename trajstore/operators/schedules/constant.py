"""The constant schedule, the paper's choice everywhere."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trajstore.operators.schedules import Schedule

__all__ = ["FAMILY", "Constant"]


@dataclass(frozen=True)
class Constant:
    """The learning rate itself, for ever."""

    def factor(self, k: Tensor) -> float:
        """Return 1."""
        return 1.0


FAMILY: type[Schedule] = Constant
