"""The wavefront engine: many chains advance together, one operator application each a tick.

A wave has a fixed number of lanes, so there is one compiled shape. Each lane holds the state of one chain and
walks through that chain's operator indices; what the lanes do in a tick need not agree in seed, leg, index or
position. A lane whose chain has ended takes the next one from the queue. So no application is spent on waiting
for other chains, sparse record grids keep the lanes full, forward legs ride along with backward ones, and many
seeds of a small problem share a wave.

Chains of one leg begin in increasing step and are longer the later they begin, so they also end in
increasing step, as the `Engine` protocol wants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from trajstore.engine import Iterate, Work
from trajstore.operators import Batch, Operator
from trajstore.problems import LiveProblem
from trajstore.problems._streams import stacked
from trajstore.state import State, Tensors, beginning

__all__ = ["Tick", "WavefrontEngine", "eager_tick"]

Tick = Callable[[State, Batch, Tensor], None]
"""Advance a stack of states in place: (states, batches, indices), each with the lanes as first dimension."""


@dataclass
class _Chain:
    """Operators to apply one after the other to a start state, and when to show the state."""

    work: int
    seed: int
    start: State
    indices: range
    shows: Sequence[int]
    """Steps to show; the chain's applications count up to each."""
    first: int
    """The step at which the chain stands before its first application."""
    applied: int = field(default=0, init=False)

    @property
    def index(self) -> int:
        """The operator that comes next."""
        return self.indices[self.applied]

    @property
    def ended(self) -> bool:
        return self.applied == len(self.indices)


class WavefrontEngine:
    """Computes iterates many at a time."""

    def __init__(
        self, problem: LiveProblem, operator: Operator, seeds: Sequence[tuple[int, int]], lanes: int, tick: Tick
    ) -> None:
        """Take the (init seed, data seed) of each seed, the width of the wave, and how it advances."""
        self._problem = problem
        self._operator = operator
        self._init_seeds = [init for init, _ in seeds]
        self._streams = [problem.batches(data) for _, data in seeds]
        self._lanes = lanes
        self._tick = tick

    def start(self, seed: int) -> Iterate:
        """Return θ₀ of a seed."""
        params, buffers = self._problem.initial(self._init_seeds[seed])
        state = beginning(params, buffers, self._operator.memory(params))
        (metrics,) = self._measure(_stack([state]), 1)
        return Iterate(0, state, metrics)

    def run(self, works: Sequence[Work]) -> Iterator[tuple[int, Iterate]]:
        """Yield (position of the work, iterate) as chains end."""
        queue = _chains(works)
        first = next(queue, None)
        if first is None:
            return
        wave = _stack([first.start] * self._lanes)
        device = wave.position.device
        lanes: list[_Chain | None] = [None] * self._lanes
        picks = [(self._streams[first.seed], first.index)] * self._lanes  # idle lanes go on with their last pick
        shown: list[tuple[int, int, State]] = []
        waiting: _Chain | None = first
        while True:
            for k, chain in enumerate(lanes):
                if chain is None and waiting is not None:
                    lanes[k] = waiting
                    _put(wave, k, waiting.start)
                    waiting = next(queue, None)
            busy = [(k, chain) for k, chain in enumerate(lanes) if chain is not None]
            if not busy:
                break
            for k, chain in busy:
                picks[k] = (self._streams[chain.seed], chain.index)
            indices = torch.tensor([i for _, i in picks]).to(device)
            with torch.no_grad():
                self._tick(wave, stacked(picks), indices)
            for k, chain in busy:
                chain.applied += 1
                if chain.shows and chain.applied == _count(chain):
                    shown.append((chain.work, chain.shows[0], _take(wave, k)))
                    chain.shows = chain.shows[1:]
                if chain.ended:
                    lanes[k] = None
            if len(shown) >= self._lanes:
                yield from self._shown(shown)
                shown = []
        yield from self._shown(shown)

    def _shown(self, shown: Sequence[tuple[int, int, State]]) -> Iterator[tuple[int, Iterate]]:
        if shown:
            measured = self._measure(_stack([state for _, _, state in shown]), len(shown))
            for (work, step, state), metrics in zip(shown, measured, strict=True):
                yield work, Iterate(step, state, metrics)

    def _measure(self, states: State, count: int) -> list[dict[str, float]]:
        with torch.no_grad():
            # A few large states at a time: an evaluation holds the activations of all its examples for each.
            together = None if sum(t[0].numel() for t in states.params.values()) < 10_000 else 8
            evaluate = torch.vmap(self._problem.evaluate, chunk_size=together)
            values: Tensors = evaluate(states.params, states.buffers)
        columns = {name: value.tolist() for name, value in values.items()}
        return [{name: column[k] for name, column in columns.items()} for k in range(count)]


def eager_tick(problem: LiveProblem, operator: Operator) -> Tick:
    """Return the tick of a problem and an operator, to be run as it is or compiled."""

    def gradient(params: Tensors, buffers: Tensors, batch: Batch) -> tuple[Tensors, Tensors]:
        def loss(p: Tensors) -> tuple[Tensor, Tensors]:
            return problem.loss(p, buffers, batch)

        gradients, after = torch.func.grad(loss, has_aux=True)(params)
        return gradients, after

    def apply(state: State, batch: Batch, index: Tensor) -> State:
        return operator.apply(gradient, state, batch, index)

    def tick(states: State, batches: Batch, indices: Tensor) -> None:
        after = _apart(torch.vmap(apply)(states, batches, indices), states)
        # In place: fresh memory for every tick would cost up to half as much again in page faults.
        for old, new in zip(pytree.tree_leaves(states), pytree.tree_leaves(after), strict=True):
            old.copy_(new)

    return tick


def _apart(after: State, before: State) -> State:
    """Copy what an operator hands through, such as the last parameters kept as memory, before it is written over."""
    if torch.compiler.is_compiling():  # the compiler leaves out what is not needed
        copied: State = pytree.tree_map(torch.clone, after)
        return copied
    held = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves(before)}
    apart: State = pytree.tree_map(lambda t: t.clone() if t.untyped_storage().data_ptr() in held else t, after)
    return apart


def _chains(works: Sequence[Work]) -> Iterator[_Chain]:
    """Yield the chains of all works, forward legs first, since they are the longest and cannot be split."""
    for k, (seed, leg, last, steps) in enumerate(works):
        if leg.kind == "forward" and steps:
            yield _Chain(k, seed, last.state, range(last.step + 1, steps[-1] + 1), steps, last.step)
    for k, (seed, leg, last, steps) in enumerate(works):
        if leg.kind == "backward":
            for n in steps:
                yield _Chain(k, seed, last.state, leg.chain(n), [n], last.step)


def _count(chain: _Chain) -> int:
    """Return after how many applications a chain shows its next step."""
    return chain.shows[0] - chain.first


def _stack(states: Sequence[State]) -> State:
    stack: State = pytree.tree_map(lambda *tensors: torch.stack(tensors), *states)
    return stack


def _take(wave: State, lane: int) -> State:
    state: State = pytree.tree_map(lambda t: t[lane].clone(), wave)
    return state


def _put(wave: State, lane: int, state: State) -> None:
    for slot, value in zip(pytree.tree_leaves(wave), pytree.tree_leaves(state), strict=True):
        slot[lane].copy_(value)
