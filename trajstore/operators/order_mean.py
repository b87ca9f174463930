"""The mean over orders, Equation 12 of the paper: small steps on the parts of a batch, in every order, averaged.

With c parts and h' = h/c it equals one large step plus ½h'² Σ_{i≠j} V'_iV_j + O(h'³) (D.2): what is left of the second
order of small steps once no order is preferred.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trajstore._common.keyed import keyed_uniform
from trajstore.errors import ConfigurationError
from trajstore.operators import Batch, Gradient, Operator, applications, learning_rate
from trajstore.operators._parts import OfParts, cut
from trajstore.operators.state import State, Tensors

__all__ = ["FAMILY", "OrderMean"]

_EXACT = 4
"""So many parts have all their orders taken: 24 of them."""

Small = Callable[[Tensors, Tensors, Batch], tuple[Tensors, Tensors]]
"""A small step: (parameters, buffers, part) → (parameters, buffers)."""


@dataclass(frozen=True)
class OrderMean(OfParts):
    """The mean of T'_σ(c) ⋯ T'_σ(1)(θ) over orders σ; T'_i is a step on the i-th part at learning rate h/c.

    Up to 4 parts it is over all orders. Beyond, it is over `samples` orders that are drawn for each batch index, the
    same ones for all seeds.
    """

    samples: int = 16
    name = "order-mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise ConfigurationError(f"operator order-mean: samples is {self.samples}; it must be at least 1")

    def apply(self, gradient: Gradient, state: State, batch: Batch, index: Tensor) -> State:
        """Return T_index(state)."""
        k = applications(self.by, state, index)

        def small(params: Tensors, buffers: Tensors, part: Batch) -> tuple[Tensors, Tensors]:
            gradients, after = gradient(params, buffers, part)
            lr = {name: learning_rate(self.lr / self.parts, self.schedule, k, p) for name, p in params.items()}
            return {name: p - lr[name] * gradients[name] for name, p in params.items()}, after

        parts = cut(batch, self.parts)
        if self.parts <= _EXACT:
            ends = _all_orders(small, state.params, state.buffers, parts)
        else:
            orders = keyed_uniform(index, 0, (self.samples, self.parts)).argsort(-1)
            ends = [self._in_order(small, state, batch, order) for order in orders]
        params = {name: p + _mean([end[name] - p for end, _ in ends]) for name, p in state.params.items()}
        buffers = {name: _mean([after[name] for _, after in ends]) for name in state.buffers}
        return State(params, buffers, {}, state.position + 1)

    def _in_order(self, small: Small, state: State, batch: Batch, order: Tensor) -> tuple[Tensors, Tensors]:
        params, buffers = state.params, state.buffers
        stacked = [t.reshape(self.parts, -1, *t.shape[1:]) for t in batch]
        for at in order:
            part = tuple(t.index_select(0, at[None])[0] for t in stacked)
            params, buffers = small(params, buffers, part)
        return params, buffers


def _all_orders(
    small: Small, params: Tensors, buffers: Tensors, parts: Sequence[Batch]
) -> list[tuple[Tensors, Tensors]]:
    """Return where every order of the parts ends. Orders that begin alike share their beginning."""
    if not parts:
        return [(params, buffers)]
    ends = []
    for k, part in enumerate(parts):
        ends += _all_orders(small, *small(params, buffers, part), [*parts[:k], *parts[k + 1 :]])
    return ends


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """Return the mean; of integers, which count the same in every order, the first."""
    return torch.stack(list(tensors)).mean(0) if tensors[0].is_floating_point() else tensors[0]


FAMILY: type[Operator] = OrderMean
