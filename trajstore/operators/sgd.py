"""Stochastic gradient descent as `torch.optim.SGD` defines it: weight decay, momentum, Nesterov."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from torch import Tensor

from trajstore.errors import ConfigurationError
from trajstore.operators import Batch, By, Gradient, Operator, applications, learning_rate, require_range
from trajstore.operators.schedules import Schedule
from trajstore.operators.schedules.constant import Constant
from trajstore.operators.state import Memory, State, Tensors

__all__ = ["FAMILY", "SGD", "is_plain"]


@dataclass(frozen=True)
class SGD:
    """T_i(θ) = θ − h ∇L_{B_i}(θ), with torch's momentum buffer where momentum is asked for."""

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    schedule: Schedule = field(default_factory=Constant)
    by: By = "position"

    def __post_init__(self) -> None:
        require_range("sgd", "lr", self.lr, 0.0)
        require_range("sgd", "momentum", self.momentum, 0.0, 1.0)
        require_range("sgd", "weight_decay", self.weight_decay, 0.0)
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ConfigurationError("operator sgd: nesterov needs a momentum and zero dampening")

    def memory(self, params: dict[str, Tensor]) -> Memory:
        """Return a zero momentum buffer, or nothing without momentum."""
        if self.momentum == 0:
            return {}
        return {"momentum_buffer": {name: torch.zeros_like(p) for name, p in params.items()}}

    def apply(self, gradient: Gradient, state: State, batch: Batch, index: Tensor) -> State:
        """Return T_index(state)."""
        gradients, buffers = gradient(state.params, state.buffers, batch)
        k = applications(self.by, state, index)
        params, momentum = {}, {}
        for name, p in state.params.items():
            d = gradients[name]
            if self.weight_decay:
                d = d.add(p, alpha=self.weight_decay)
            if self.momentum:
                new = d if not self.dampening else d * self._undamped_at_first(state, d)
                momentum[name] = self.momentum * state.memory["momentum_buffer"][name] + new
                d = d.add(momentum[name], alpha=self.momentum) if self.nesterov else momentum[name]
            lr = learning_rate(self.lr, self.schedule, k, p)
            params[name] = p - lr * d if isinstance(lr, Tensor) else p.sub(d, alpha=lr)
        memory: Memory = {"momentum_buffer": momentum} if self.momentum else {}
        return State(params, buffers, memory, state.position + 1)

    def push(self, gradient: Gradient, state: State, tangent: Tensors, batch: Batch, index: Tensor) -> Tensors:
        """Return what T_index makes of an infinitely small difference of the parameters, the momentum being 0."""
        bent = gradient.along(state.params, state.buffers, batch, tangent)
        k = applications(self.by, state, index)
        return {
            name: v - learning_rate(self.lr, self.schedule, k, v) * (bent[name] + self.weight_decay * v)
            for name, v in tangent.items()
        }

    def _undamped_at_first(self, state: State, like: Tensor) -> Tensor:
        # torch fills its buffer with the whole first gradient and dampens only the later ones.
        return torch.where(state.position == 0, 1.0, 1.0 - self.dampening).to(like.dtype)


def is_plain(operator: Operator) -> TypeGuard[SGD]:
    """Tell whether an operator is a gradient step with a constant learning rate and nothing else."""
    return isinstance(operator, SGD) and operator == SGD(operator.lr, by=operator.by)


FAMILY: type[Operator] = SGD
