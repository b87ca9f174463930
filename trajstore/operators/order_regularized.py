"""A large step, and what small steps in every order would add to it, as strong as wanted: D.2.1 of the paper.

θ − h∇L_B(θ) + λ Σ_{i≠j} V'_iV_j(θ) with V_i = −∇L_i on the parts of the batch, λ in units of h². No matrix is formed:
the sum is Σ_i H_i (G − g_i), with the gradients g_i of the parts, their sum G, and one product with the Hessian H_i of
each.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trajstore.operators import Batch, Gradient, Operator, applications, learning_rate, require_range
from trajstore.operators._parts import OfParts, cut
from trajstore.operators.state import State

__all__ = ["FAMILY", "OrderRegularized"]


@dataclass(frozen=True)
class OrderRegularized(OfParts):
    """With strength 1/(2c²) it is the mean over orders (`order-mean`) up to O(h³)."""

    strength: float = 1.0
    """λ / h²."""
    name = "order-regularized"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self.name, "strength", self.strength, 0.0)

    def apply(self, gradient: Gradient, state: State, batch: Batch, index: Tensor) -> State:
        """Return T_index(state)."""
        k = applications(self.by, state, index)
        whole, buffers = gradient(state.params, state.buffers, batch)
        parts = cut(batch, self.parts)
        each = [gradient(state.params, state.buffers, part)[0] for part in parts]
        others = [{name: sum(g[name] for g in each) - mine[name] for name in mine} for mine in each]
        bent = [gradient.along(state.params, state.buffers, p, v) for p, v in zip(parts, others, strict=True)]
        params = {}
        for name, p in state.params.items():
            lr = learning_rate(self.lr, self.schedule, k, p)
            params[name] = p - lr * whole[name] + self.strength * lr * lr * sum(b[name] for b in bent)
        return State(params, buffers, {}, state.position + 1)


FAMILY: type[Operator] = OrderRegularized
