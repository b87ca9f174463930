"""The reference engine: the definition, plainly, in eager PyTorch.

For each n, start again at the leg's start and apply T_n first, T_{a+1} last. It is what every other engine
is tested against, and the naive cost to beat.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from trajstore.engine import Iterate
from trajstore.operators import Batch, Operator
from trajstore.orders import Leg
from trajstore.problems import LiveProblem
from trajstore.state import State, Tensors

__all__ = ["ReferenceEngine"]


class ReferenceEngine:
    """Computes iterates one operator application at a time."""

    def __init__(self, problem: LiveProblem, operator: Operator, init_seed: int, data_seed: int) -> None:
        self._problem = problem
        self._operator = operator
        self._init_seed = init_seed
        self._batches = problem.batches(data_seed)

    def start(self) -> Iterate:
        """Return θ₀."""
        params, buffers = self._problem.initial(self._init_seed)
        device = next(iter(params.values())).device
        position = torch.zeros((), dtype=torch.int64, device=device)
        return self._measure(0, State(params, buffers, self._operator.memory(params), position))

    def iterates(self, leg: Leg, last: Iterate, steps: Sequence[int]) -> Iterator[Iterate]:
        """Yield the iterates of a leg at increasing steps."""
        if leg.kind == "forward":
            state, done = last.state, last.step
            for n in steps:
                state = self._compose(range(done + 1, n + 1), state)
                done = n
                yield self._measure(n, state)
        else:
            for n in steps:
                yield self._measure(n, self._compose(leg.chain(n), last.state))

    def _compose(self, indices: range, state: State) -> State:
        for i in indices:
            with torch.no_grad():
                state = self._operator.apply(self._gradient, state, self._batches[i], torch.tensor(i))
        return state

    def _gradient(self, params: Tensors, buffers: Tensors, batch: Batch) -> tuple[Tensors, Tensors]:
        with torch.enable_grad():
            leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
            loss, after = self._problem.loss(leaves, buffers, batch)
            gradients = torch.autograd.grad(loss, list(leaves.values()))
        return dict(zip(leaves, gradients, strict=True)), {name: b.detach() for name, b in after.items()}

    def _measure(self, step: int, state: State) -> Iterate:
        with torch.no_grad():
            values = self._problem.evaluate(state.params, state.buffers)
        return Iterate(step, state, {name: float(value) for name, value in values.items()})
