"""Adam as `torch.optim.Adam` defines it, weight decay as an addition to the gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trajstore.operators import Batch, By, Gradient, Operator, applications, learning_rate, require_range
from trajstore.operators.schedules import Schedule
from trajstore.operators.schedules.constant import Constant
from trajstore.operators.state import Memory, State, Tensors

__all__ = ["FAMILY", "Adam", "adam_memory", "adam_step", "check_adam"]


@dataclass(frozen=True)
class Adam:
    """Adaptive moments; bias corrections count applications in the chain, or batches with by="index"."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Schedule = field(default_factory=Constant)
    by: By = "position"

    def __post_init__(self) -> None:
        check_adam("adam", self.lr, self.beta1, self.beta2, self.eps, self.weight_decay)

    def memory(self, params: Tensors) -> Memory:
        """Return the two zero moments."""
        return adam_memory(params)

    def apply(self, gradient: Gradient, state: State, batch: Batch, index: Tensor) -> State:
        """Return T_index(state)."""
        gradients, buffers = gradient(state.params, state.buffers, batch)
        if self.weight_decay:
            gradients = {n: g.add(state.params[n], alpha=self.weight_decay) for n, g in gradients.items()}
        k = applications(self.by, state, index)
        return adam_step(
            state, buffers, gradients, k, self.beta1, self.beta2, self.eps,
            lambda p: learning_rate(self.lr, self.schedule, k, p),
        )  # fmt: skip


def check_adam(name: str, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
    """Refuse what torch.optim refuses."""
    require_range(name, "lr", lr, 0.0)
    require_range(name, "beta1", beta1, 0.0, 1.0)
    require_range(name, "beta2", beta2, 0.0, 1.0)
    require_range(name, "eps", eps, 0.0)
    require_range(name, "weight_decay", weight_decay, 0.0)


def adam_memory(params: Tensors) -> Memory:
    """Return the zero first and second moment of every parameter."""
    return {slot: {n: torch.zeros_like(p) for n, p in params.items()} for slot in ("exp_avg", "exp_avg_sq")}


def adam_step(
    state: State,
    buffers: Tensors,
    gradients: Tensors,
    k: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    lr: Callable[[Tensor], Tensor | float],
) -> State:
    """Advance both moments and move every parameter by the bias-corrected ratio."""
    t = (k + 1).double()  # 1 − β^t cancels badly in float32
    correction1, correction2 = 1 - beta1**t, (1 - beta2**t).sqrt()
    params, first, second = {}, {}, {}
    for name, p in state.params.items():
        g = gradients[name]
        m = first[name] = torch.lerp(state.memory["exp_avg"][name], g, 1 - beta1)
        v = second[name] = beta2 * state.memory["exp_avg_sq"][name] + (1 - beta2) * g * g
        size = (lr(p) / correction1).to(p.dtype)
        params[name] = p - size * (m / (v.sqrt() / correction2.to(p.dtype) + eps))
    return State(params, buffers, {"exp_avg": first, "exp_avg_sq": second}, state.position + 1)


FAMILY: type[Operator] = Adam
