"""The state: everything one step of an optimizer changes.

A plain named tuple of dictionaries of tensors, so that `torch.func` sees it as a pytree. Nothing here is
ever changed in place: an operator takes a state and returns another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Memory", "State", "Tensors", "beginning"]

Tensors = dict[str, Tensor]
Memory = dict[str, Tensors]


class State(NamedTuple):
    """Parameters, buffers, optimizer memory, and how many operators were applied since θ₀."""

    params: Tensors
    buffers: Tensors
    memory: Memory
    position: Tensor
    """0-dimensional int64: the position in the chain. Schedules and bias corrections follow it."""


def beginning(params: Tensors, buffers: Tensors, memory: Memory) -> State:
    """Return the state before any operator was applied."""
    device = next(iter(params.values())).device
    return State(params, buffers, memory, torch.zeros((), dtype=torch.int64, device=device))
