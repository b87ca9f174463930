"""The approximate backward iterate of Corollary C.4: forward, and h² times the brackets of all pairs of batches.

    θ̃_n = θ_n + h² C_n,   C_n = C_{n−1} + H_n ∇L_n − ∇²L_n g_n,   all at the leg's start

with the sum g_n of the earlier gradients and the sum H_n of the earlier Hessians. No matrix is formed: H_n v is a
product with the Hessian of all earlier batches together, and over a finite data set that is one of its distinct
examples, each as often as it was drawn. Where the loss of a batch is not the mean over its examples, as with batch
normalisation, or batches are noise, it is the sum over the earlier batches.

The backward iterate differs by O(h³) at fixed n; the terms left out grow with n, so hn must be small.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from trajstore.engine import Iterate, Work
from trajstore.operators import Batch, Gradient, Operator
from trajstore.operators.sgd import SGD
from trajstore.operators.state import State, Tensors
from trajstore.problems import Batches, LiveProblem
from trajstore.problems._streams import RowBatches

__all__ = ["Brackets"]

_TOGETHER = 1024
"""Examples of one product."""
_LOOKED_AT = 16
"""Examples at the least by which to tell whether a loss is a mean."""
_ROUNDING = 64
"""Units in the last place: what a sum in another order may differ by."""


class Brackets:
    """Computes bracket legs, and goes on with each where it was left."""

    def __init__(
        self, problem: LiveProblem, operator: Operator, gradient: Gradient, streams: Sequence[Batches]
    ) -> None:
        assert isinstance(operator, SGD)  # an experiment has no bracket leg otherwise
        self._problem, self._operator, self._gradient, self._streams = problem, operator, gradient, streams
        self._begun: dict[int, _Bracket] = {}
        """The latest of each seed."""

    def run(self, work: Work) -> Iterator[tuple[int, State]]:
        """Yield (step, state) for the steps of a bracket leg."""
        begun = self._begun.get(work.seed)
        for n in work.steps:
            if begun is None or begun.anchor is not work.last or begun.step > n:
                stream = self._streams[work.seed]
                begun = _Bracket(self._problem, self._operator, self._gradient, stream, work.last)
                self._begun[work.seed] = begun
            while begun.step < n:
                begun.advance()
            yield n, begun.state()


class _Bracket:
    """One leg, as far as it has come."""

    def __init__(
        self, problem: LiveProblem, operator: SGD, gradient: Gradient, stream: Batches, anchor: Iterate
    ) -> None:
        self.anchor, self.step = anchor, anchor.step
        self._operator, self._gradient, self._stream = operator, gradient, stream
        self._forward = anchor.state
        zero = {name: torch.zeros_like(p) for name, p in anchor.state.params.items()}
        self._brackets, self._sum = zero, zero
        self._earlier = _Earlier(problem, gradient, stream, anchor)

    def advance(self) -> None:
        """Take the next batch."""
        self.step += 1
        batch, start = self._stream[self.step], self.anchor.state
        with torch.no_grad():
            forward = self._operator.apply(self._gradient, self._forward, batch, torch.tensor(self.step))
            here, _ = self._gradient(start.params, start.buffers, batch)
            bent = self._gradient.along(start.params, start.buffers, batch, self._sum)
            before = self._earlier.along(here)
            self._brackets = {name: c + before[name] - bent[name] for name, c in self._brackets.items()}
            self._sum = {name: g + here[name] for name, g in self._sum.items()}
        self._earlier.add(self.step)
        self._forward = forward

    def state(self) -> State:
        """Return θ̃ where it stands; what is no parameter is that of the forward iterate."""
        square = self._operator.lr**2
        params = {name: p + square * self._brackets[name] for name, p in self._forward.params.items()}
        return self._forward._replace(params=params)


class _Earlier:
    """The sum of the Hessians of the batches so far."""

    def __init__(self, problem: LiveProblem, gradient: Gradient, stream: Batches, anchor: Iterate) -> None:
        self._gradient, self._stream, self._start = gradient, stream, anchor.state
        self._indices: list[int] = []
        self._drawn: Counter[int] | None = None
        if (
            isinstance(stream, RowBatches)
            and not stream.keyed
            and _is_a_mean(problem, _some(stream, anchor.step), self._start)
        ):
            self._drawn = Counter()

    def add(self, index: int) -> None:
        """Take another batch."""
        if self._drawn is None:
            self._indices.append(index)
        else:
            self._drawn.update(self._stream.examples(index).tolist())

    def along(self, direction: Tensors) -> Tensors:
        """Return the sum times a direction."""
        total = {name: torch.zeros_like(p) for name, p in direction.items()}
        for weight, batch in self._weighted():
            bent = self._gradient.along(self._start.params, self._start.buffers, batch, direction)
            total = {name: t + weight * bent[name] for name, t in total.items()}
        return total

    def _weighted(self) -> Iterator[tuple[float, Batch]]:
        """Yield batches, and how often the Hessian of each counts."""
        if self._drawn is None:
            yield from ((1.0, self._stream[i]) for i in self._indices)
            return
        assert isinstance(self._stream, RowBatches)
        alike: dict[int, list[int]] = {}
        for example, often in sorted(self._drawn.items()):
            alike.setdefault(often, []).append(example)
        for often, examples in sorted(alike.items()):
            for begin in range(0, len(examples), _TOGETHER):
                rows = torch.tensor(examples[begin : begin + _TOGETHER]).to(self._stream.tensors[0].device)
                yield often * len(rows) / self._stream.batch_size, tuple(t[rows] for t in self._stream.tensors)


def _some(stream: Batches, step: int) -> Batch:
    """Return the next few batches as one."""
    batches = [stream[step + 1], stream[step + 2]]
    while sum(len(batch[0]) for batch in batches) < _LOOKED_AT:
        batches.append(stream[step + 1 + len(batches)])
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def _is_a_mean(problem: LiveProblem, batch: Batch, state: State) -> bool:
    """Tell whether the loss of examples is the mean of their losses, however they are put together."""
    with torch.no_grad():
        whole, after = problem.loss(state.params, state.buffers, batch)
        if any(not torch.equal(b, after[name]) for name, b in state.buffers.items()):
            return False  # it looks at the batch as a whole
        size = len(batch[0])
        cuts = sorted({0, max(1, size // 7), size // 2, size})  # of different sizes
        parts = [(b - a, problem.loss(state.params, state.buffers, tuple(t[a:b] for t in batch))[0])
                 for a, b in pairwise(cuts)]  # fmt: skip
        mean = torch.as_tensor(sum(k * loss for k, loss in parts) / size)
        return bool(torch.isclose(whole, mean, rtol=_ROUNDING * torch.finfo(whole.dtype).eps, atol=0))
