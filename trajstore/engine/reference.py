"""The reference engine: the definition, plainly, in eager PyTorch.

For each n, start again at the leg's start and apply T_n first, T_{a+1} last. It is what every other engine
is tested against, and the naive cost to beat.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trajstore.engine import Iterate, Work
from trajstore.engine.bracket import Brackets
from trajstore.engine.proving import Refusal
from trajstore.operators import Batch, Gradient, Operator
from trajstore.operators.state import State, Tensors, beginning
from trajstore.problems import Batches, LiveProblem

__all__ = ["ReferenceEngine", "gradient_of"]


class ReferenceEngine:
    """Computes iterates one operator application at a time."""

    refusals: Sequence[Refusal] = ()
    """It is the definition."""

    def __init__(self, problem: LiveProblem, operator: Operator, seeds: Sequence[tuple[int, int]]) -> None:
        """Take the (init seed, data seed) of each seed."""
        self.measuring = 0.0
        self._problem = problem
        self._operator = operator
        self._gradient = gradient_of(problem)
        self._init_seeds = [init for init, _ in seeds]
        self._batches = [problem.batches(data) for _, data in seeds]
        self._brackets: Brackets | None = None

    def start(self, seed: int) -> Iterate:
        """Return θ₀ of a seed."""
        params, buffers = self._problem.initial(self._init_seeds[seed])
        return self._measure(seed, 0, beginning(params, buffers, self._operator.memory(params)))

    def run(self, works: Sequence[Work]) -> Iterator[tuple[int, Iterate]]:
        """Yield (position of the work, iterate), one work after the other."""
        for k, (seed, leg, last, steps) in enumerate(works):
            state, done = last.state, last.step
            if leg.kind == "bracket":
                self._brackets = self._brackets or Brackets(
                    self._problem, self._operator, self._gradient, self._batches
                )
                yield from ((k, self._measure(seed, n, state)) for n, state in self._brackets.run(works[k]))
                continue
            for n in steps:
                if leg.kind == "forward":
                    iterate = self._measure(seed, n, self._compose(range(done + 1, n + 1), state, self._batches[seed]))
                    state, done = iterate.state, n
                else:
                    iterate = self._measure(seed, n, self._compose(leg.chain(n), state, self._batches[seed]))
                yield k, iterate

    def _compose(self, indices: range, state: State, batches: Batches) -> State:
        for i in indices:
            with torch.no_grad():
                state = self._operator.apply(self._gradient, state, batches[i], torch.tensor(i))
        return state

    def _measure(self, seed: int, step: int, state: State) -> Iterate:
        begin = time.perf_counter()
        with torch.no_grad():
            values = self._problem.evaluate(state.params, state.buffers)
            if step > 0:
                batch = self._batches[seed][step]
                values = values | {"batch_loss": self._problem.loss(state.params, state.buffers, batch)[0]}
        numbers = {name: float(value) for name, value in values.items()}
        self.measuring += time.perf_counter() - begin
        return Iterate(step, state, numbers)


@dataclass(frozen=True)
class _Gradient:
    """Plain autograd."""

    problem: LiveProblem

    def __call__(self, params: Tensors, buffers: Tensors, batch: Batch) -> tuple[Tensors, Tensors]:
        leaves, gradients, after = self._of(params, buffers, batch)
        return dict(zip(leaves, gradients, strict=True)), {name: b.detach() for name, b in after.items()}

    def along(self, params: Tensors, buffers: Tensors, batch: Batch, direction: Tensors) -> Tensors:
        leaves, gradients, _ = self._of(params, buffers, batch, create_graph=True)
        with torch.enable_grad():
            # Where a gradient is constant, only the zeros depend on the leaves, and autograd wants something that does.
            of_each = [(p * 0 + g * direction[n]).sum() for (n, p), g in zip(leaves.items(), gradients, strict=True)]
            slope = torch.stack(of_each).sum()
            bent = torch.autograd.grad(slope, list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, bent, strict=True))

    def _of(
        self, params: Tensors, buffers: Tensors, batch: Batch, create_graph: bool = False
    ) -> tuple[Tensors, tuple[Tensor, ...], Tensors]:
        with torch.enable_grad():
            leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
            loss, after = self.problem.loss(leaves, buffers, batch)
            at = list(leaves.values())
            gradients = torch.autograd.grad(loss, at, materialize_grads=True, create_graph=create_graph)
        return leaves, gradients, after


def gradient_of(problem: LiveProblem) -> Gradient:
    """Return the gradient of a problem's loss on a batch, by plain autograd, and the buffers after it."""
    return _Gradient(problem)
