"""Ticks: how a stack of states advances by one operator each, as it is defined and in faster ways.

A tick is defined by the reference engine: one lane after the other, by plain autograd. It can be vectorised over the
lanes, and compiled. Both depend on what is between the definition and the machine, so both are proven before they are
used (`Proven`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trajstore._common import pytree
from trajstore.engine.proving import FastWay, Refusal, disproof
from trajstore.engine.reference import gradient_of
from trajstore.operators import Batch, Gradient, Operator
from trajstore.operators.state import State, Tensors
from trajstore.problems import LiveProblem

__all__ = [
    "PROVEN_TICKS",
    "Advance",
    "Eager",
    "Proven",
    "Step",
    "Tick",
    "definition_of",
    "functional_gradient",
    "lane_of",
    "lanes_of",
    "stack",
    "step_of",
    "tick_of",
]

PROVEN_TICKS = 4
"""So many ticks of every lane are compared with their definitions."""

Step = Callable[[State, Batch, Tensor], State]
"""Return a stack of states after one operator each: (states, batches, indices), lanes first."""
Tick = Callable[[State, Batch, Tensor], None]
"""Advance a stack of states in place by one operator each."""


class Advance(Protocol):
    """How a wave advances."""

    @property
    def refusals(self) -> Sequence[Refusal]:
        """What was tried and gave something else than its definition, so that it is not used."""

    def __call__(self, states: State, batches: Batch, indices: Tensor, ticks: range, busy: Sequence[int]) -> None:
        """Advance a stack of states in place by some ticks of a block; batches and indices have ticks first.

        What comes out of lanes that are not busy is never looked at.
        """


@dataclass(frozen=True)
class _Gradient:
    """The gradient as a function that can be vectorised and compiled."""

    problem: LiveProblem

    def __call__(self, params: Tensors, buffers: Tensors, batch: Batch) -> tuple[Tensors, Tensors]:
        def loss(p: Tensors) -> tuple[Tensor, Tensors]:
            return self.problem.loss(p, buffers, batch)

        gradients, after = torch.func.grad(loss, has_aux=True)(params)
        return gradients, after

    def along(self, params: Tensors, buffers: Tensors, batch: Batch, direction: Tensors) -> Tensors:
        def slope(p: Tensors) -> Tensor:
            gradients, _ = self(p, buffers, batch)
            return torch.stack([(g * direction[name]).sum() for name, g in gradients.items()]).sum()

        bent: Tensors = torch.func.grad(slope)(params)
        return bent


def functional_gradient(problem: LiveProblem) -> Gradient:
    """Return the gradient of a problem's loss on a batch as `torch.func` sees it: to be differentiated, vectorised."""
    return _Gradient(problem)


def step_of(problem: LiveProblem, operator: Operator, lanes: int) -> Step:
    """Return what a tick makes of a stack of states: vectorised over the lanes, or plain for one lane."""
    gradient = functional_gradient(problem)

    def apply(state: State, batch: Batch, index: Tensor) -> State:
        return operator.apply(gradient, state, batch, index)

    def alone(states: State, batches: Batch, indices: Tensor) -> State:
        after = apply(pytree.tree_map(lambda t: t[0], states), tuple(t[0] for t in batches), indices[0])
        stack: State = pytree.tree_map(lambda t: t[None], after)
        return stack

    return alone if lanes == 1 else torch.vmap(apply)


def definition_of(problem: LiveProblem, operator: Operator) -> Step:
    """Return the same as the reference engine defines it: one lane after the other, by plain autograd."""
    gradient = gradient_of(problem)

    def each(states: State, batches: Batch, indices: Tensor) -> State:
        lanes = range(len(indices))
        return stack(
            [operator.apply(gradient, lane_of(states, k), tuple(t[k] for t in batches), indices[k]) for k in lanes]
        )

    return each


def tick_of(step: Step) -> Tick:
    """Return a step that happens in place."""

    def tick(states: State, batches: Batch, indices: Tensor) -> None:
        after = _apart(step(states, batches, indices), states, indices)
        # In place: fresh memory for every tick would cost up to half as much again in page faults.
        for old, new in zip(pytree.tree_leaves(states), pytree.tree_leaves(after), strict=True):
            old.copy_(new)

    return tick


class Eager:
    """Runs the ticks of a block as they are."""

    refusals: Sequence[Refusal] = ()

    def __init__(self, step: Step) -> None:
        self._tick = tick_of(step)

    def __call__(self, states: State, batches: Batch, indices: Tensor, ticks: range, busy: Sequence[int]) -> None:
        """Advance a stack of states in place."""
        for j in ticks:
            self._tick(states, tuple(t[j] for t in batches), indices[j])


class Proven:
    """A fast way to advance, and what is used instead if it turns out to give something else.

    The first few ticks of every lane are taken by the definitions as well, each from the state that the fast way had
    before it. A definition that takes one lane after the other is asked for a few lanes only.
    """

    def __init__(self, fast: Advance, name: FastWay, slow: Advance, *definitions: tuple[Step, int | None]) -> None:
        """Take what to call the fast way, and each definition with how many lanes it is asked for; None: all."""
        self._fast, self._name, self._slow, self._definitions = fast, name, slow, definitions
        self._seen: Counter[int] = Counter()
        self._refused: tuple[Refusal, ...] = ()

    @property
    def refusals(self) -> Sequence[Refusal]:
        """What was found to give something else."""
        return (*self._refused, *self._slow.refusals)

    def __call__(self, states: State, batches: Batch, indices: Tensor, ticks: range, busy: Sequence[int]) -> None:
        """Advance a stack of states in place, by the way that is known to be right."""
        due = [k for k in busy if self._seen[k] < PROVEN_TICKS]
        unproven = ticks[:PROVEN_TICKS] if due else ticks[:0]
        for j in unproven:
            if self._refused:
                self._slow(states, batches, indices, range(j, j + 1), busy)
            else:
                self._prove(states, batches, indices, j, busy, due)
        way = self._slow if self._refused else self._fast
        way(states, batches, indices, ticks[len(unproven) :], busy)

    def _prove(
        self, states: State, batches: Batch, indices: Tensor, j: int, busy: Sequence[int], due: Sequence[int]
    ) -> None:
        before: State = pytree.tree_map(torch.clone, states)
        self._fast(states, batches, indices, range(j, j + 1), busy)
        for step, most in self._definitions:
            lanes = torch.tensor(due[:most], device=indices.device)
            here = lanes_of((before, tuple(t[j] for t in batches), indices[j]), lanes)
            if told := disproof(lanes_of(states, lanes), step, *here, lanes=due[:most]):
                self._refused = (Refusal(self._name, told),)
                _write(states, before)
                self._slow(states, batches, indices, range(j, j + 1), busy)
                return
        self._seen.update(due)


def _apart(after: State, before: State, indices: Tensor) -> State:
    """Copy what an operator hands through, such as the last parameters kept as memory, before it is written over."""
    if torch.compiler.is_compiling():
        # A copy would not do: the compiler takes it for superfluous, and then some releases of torch (2.14 is one) read
        # what was handed through where it was, when it is written over already. The same goes for what an operator
        # copies itself, or multiplies by one. A choice that hangs on a number only known later has to be computed.
        never = indices[0] < 0
        computed: State = pytree.tree_map(lambda t: torch.where(never, t.new_zeros(()), t), after)
        return computed
    held = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves(before)}
    apart: State = pytree.tree_map(lambda t: t.clone() if t.untyped_storage().data_ptr() in held else t, after)
    return apart


def lane_of(wave: State, lane: int) -> State:
    """Return the state of one lane, where it lies."""
    state: State = pytree.tree_map(lambda t: t[lane], wave)
    return state


def lanes_of(trees: Any, lanes: Tensor) -> Any:  # noqa: ANN401
    """Return a few lanes of trees of tensors, copied."""
    return pytree.tree_map(lambda t: t.index_select(0, lanes), trees)


def _write(wave: State, other: State) -> None:
    for slot, value in zip(pytree.tree_leaves(wave), pytree.tree_leaves(other), strict=True):
        slot.copy_(value)


def stack(states: Sequence[State]) -> State:
    """Return states as one, lanes first."""
    stacked: State = pytree.tree_map(lambda *tensors: torch.stack(tensors), *states)
    return stacked
