"""The state: everything one step of an optimizer changes.

A plain named tuple of dictionaries of tensors, so that `torch.func` sees it as a pytree. Nothing here is
ever changed in place: an operator takes a state and returns another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Memory", "State", "Tensors", "move"]

Tensors = dict[str, Tensor]
Memory = dict[str, Tensors]


class State(NamedTuple):
    """Parameters, buffers, optimizer memory, and how many operators were applied since θ₀."""

    params: Tensors
    buffers: Tensors
    memory: Memory
    position: Tensor
    """0-dimensional int64: the position in the chain. Schedules and bias corrections follow it."""


def move(state: State, device: torch.device) -> State:
    """Return the state on a device."""
    return State(
        {name: t.to(device) for name, t in state.params.items()},
        {name: t.to(device) for name, t in state.buffers.items()},
        {slot: {name: t.to(device) for name, t in ts.items()} for slot, ts in state.memory.items()},
        state.position.to(device),
    )
