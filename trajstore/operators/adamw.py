"""AdamW as `torch.optim.AdamW` defines it: the weights decay apart from the gradient."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from trajstore.operators import Batch, By, Gradient, Operator, applications, learning_rate
from trajstore.operators.adam import adam_memory, adam_step, check_adam
from trajstore.operators.schedules import Schedule
from trajstore.operators.schedules.constant import Constant
from trajstore.operators.state import Memory, State, Tensors

__all__ = ["FAMILY", "AdamW"]


@dataclass(frozen=True)
class AdamW:
    """Adam whose parameters are first multiplied by 1 − lr · weight_decay."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    schedule: Schedule = field(default_factory=Constant)
    by: By = "position"

    def __post_init__(self) -> None:
        check_adam("adamw", self.lr, self.beta1, self.beta2, self.eps, self.weight_decay)

    def memory(self, params: Tensors) -> Memory:
        """Return the two zero moments."""
        return adam_memory(params)

    def apply(self, gradient: Gradient, state: State, batch: Batch, index: Tensor) -> State:
        """Return T_index(state)."""
        gradients, buffers = gradient(state.params, state.buffers, batch)
        k = applications(self.by, state, index)

        def lr(p: Tensor) -> Tensor | float:
            return learning_rate(self.lr, self.schedule, k, p)

        decayed = {n: p * (1 - lr(p) * self.weight_decay) for n, p in state.params.items()}
        return adam_step(state._replace(params=decayed), buffers, gradients, k, self.beta1, self.beta2, self.eps, lr)


FAMILY: type[Operator] = AdamW
