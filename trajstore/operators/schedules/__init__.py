"""Learning-rate schedules: the factor on the learning rate as a function of a count k = 0, 1, 2, …

One family a file. What k counts is the operator's choice (see `trajstore.operators`): the position in the
chain, or the index of the batch. Factors are computed in float64 from an int64 tensor without branching
on its value, so that a stack of chains can carry a count each.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["FAMILIES", "Schedule", "warmed_up"]

FAMILIES = (
    "constant",
    "cosine",
    "inverse_sqrt",
    "step",
)
"""Modules that declare one."""


class Schedule(Protocol):
    """A function of the count k; a plain float where it is the same for every k."""

    def factor(self, k: Tensor) -> Tensor | float:
        """Return the factor on the learning rate of application k (the first has k = 0)."""


def warmed_up(k: Tensor, warmup: int, factor: Tensor) -> Tensor:
    """Replace a factor by the linear ramp 1/w, 2/w, …, 1 over the first w applications."""
    return torch.where(k < warmup, (k + 1).double() / warmup, factor) if warmup else factor
