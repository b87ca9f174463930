"""The wavefront engine: many chains advance together, one operator application each a tick.

A wave has a fixed number of lanes, so there is one compiled shape. Each lane holds the state of one chain and
walks through that chain's operator indices; what the lanes do in a tick need not agree in seed, leg, index or
position. A lane whose chain has ended takes the next one from the queue. So no application is spent on waiting
for other chains, sparse record grids keep the lanes full, forward legs ride along with backward ones, and many
seeds of a small problem share a wave. With one lane it is a plain loop over chains, without `vmap`.

States, batches and indices lie in tensors that never move. The operators of the coming ticks, until the next
chain ends, are laid out in a block, and then applied one after the other without a look back: a compiled tick is
replayed, and on a GPU nothing waits for the host in between.

Chains of one leg begin in increasing step and are longer the later they begin, so they also end in
increasing step, as the `Engine` protocol wants.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trajstore import pytree
from trajstore.engine import Iterate, Work
from trajstore.engine.bracket import Brackets
from trajstore.operators import Batch, Gradient, Operator
from trajstore.problems import LiveProblem
from trajstore.problems._streams import stacked
from trajstore.state import State, Tensors, beginning

__all__ = ["Advance", "Tick", "WavefrontEngine", "eager", "functional_gradient", "tick_of"]

Tick = Callable[[State, Batch, Tensor], None]
"""Advance a stack of states in place by one operator each: (states, batches, indices), lanes first."""
Advance = Callable[[State, Batch, Tensor, int], None]
"""Advance a stack of states in place by a block: batches and indices have ticks first, so many of which count."""

_BLOCK_TICKS = 64
_BLOCK_BYTES = 2**24


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
    def until_shown(self) -> int:
        """How many applications until the next step to show."""
        return self.shows[0] - self.first - self.applied

    @property
    def ended(self) -> bool:
        return self.applied == len(self.indices)


class _Wave(NamedTuple):
    """The tensors that never move."""

    states: State
    batches: Batch
    """(ticks, lanes, …)"""
    indices: Tensor
    """(ticks, lanes)"""


class _Shown(NamedTuple):
    """A state on its way out."""

    work: int
    seed: int
    step: int
    state: State


class WavefrontEngine:
    """Computes iterates many at a time."""

    def __init__(
        self, problem: LiveProblem, operator: Operator, seeds: Sequence[tuple[int, int]], lanes: int, advance: Advance
    ) -> None:
        """Take the (init seed, data seed) of each seed, the width of the wave, and how it advances."""
        self.measuring = 0.0
        self._problem = problem
        self._operator = operator
        self._init_seeds = [init for init, _ in seeds]
        self._streams = [problem.batches(data) for _, data in seeds]
        self._lanes = lanes
        self._advance = advance
        self._wave: _Wave | None = None
        self._brackets: Brackets | None = None

    def start(self, seed: int) -> Iterate:
        """Return θ₀ of a seed."""
        params, buffers = self._problem.initial(self._init_seeds[seed])
        state = beginning(params, buffers, self._operator.memory(params))
        (metrics,) = self._measure([state], [seed], [0])
        return Iterate(0, state, metrics)

    def run(self, works: Sequence[Work]) -> Iterator[tuple[int, Iterate]]:
        """Yield (position of the work, iterate) as chains end, and then the steps of bracket legs."""
        yield from self._chained(works)
        for k, work in enumerate(works):
            if work.leg.kind == "bracket":
                self._brackets = self._brackets or Brackets(
                    self._problem, self._operator, functional_gradient(self._problem), self._streams
                )
                for n, state in self._brackets.run(work):
                    yield from self._shown([_Shown(k, work.seed, n, state)])

    def _chained(self, works: Sequence[Work]) -> Iterator[tuple[int, Iterate]]:
        queue = _chains(works)
        waiting = next(queue, None)
        if waiting is None:
            return
        if self._wave is None:
            self._wave = self._room(waiting)
        wave = self._wave
        lanes: list[_Chain | None] = [None] * self._lanes
        # Idle lanes repeat an operator that there is; what comes out of it is never looked at.
        seeds, at, stride = (np.full(self._lanes, v) for v in (waiting.seed, waiting.indices[0], 0))
        shown: list[_Shown] = []
        while True:
            for k, chain in enumerate(lanes):
                if chain is None and waiting is not None:
                    lanes[k] = waiting
                    _put(wave.states, k, waiting.start)
                    seeds[k], at[k], stride[k] = waiting.seed, waiting.indices.start, waiting.indices.step
                    waiting = next(queue, None)
            busy = [(k, chain) for k, chain in enumerate(lanes) if chain is not None]
            if not busy:
                break
            ticks = min(len(wave.indices), *(chain.until_shown for _, chain in busy))
            self._lay_out(wave, seeds, at + stride * np.arange(ticks)[:, None])
            with torch.no_grad():
                self._advance(wave.states, wave.batches, wave.indices, ticks)
            at += stride * ticks
            for k, chain in busy:
                chain.applied += ticks
                if chain.until_shown == 0:
                    shown.append(_Shown(chain.work, chain.seed, chain.shows[0], _take(wave.states, k)))
                    chain.shows = chain.shows[1:]
                if chain.ended:
                    lanes[k] = None
                    at[k] -= stride[k]
                    stride[k] = 0
            if len(shown) >= self._lanes:
                yield from self._shown(shown)
                shown = []
        yield from self._shown(shown)

    def _room(self, chain: _Chain) -> _Wave:
        """Return room for states like a chain's, and for as many ticks of batches as make a block."""
        states = _stack([chain.start] * self._lanes)
        batch = self._streams[chain.seed][chain.indices[0]]
        a_tick = self._lanes * sum(t.numel() * t.element_size() for t in batch)
        ticks = max(1, min(_BLOCK_TICKS, _BLOCK_BYTES // max(1, a_tick)))
        batches = tuple(t.new_zeros((ticks, self._lanes, *t.shape)) for t in batch)
        return _Wave(states, batches, torch.ones((ticks, self._lanes), dtype=torch.int64).to(states.position.device))

    def _lay_out(self, wave: _Wave, seeds: np.ndarray, indices: np.ndarray) -> None:
        """Fill the block with what comes, (ticks, lanes)."""
        ticks = len(indices)
        coming = stacked(self._streams, np.broadcast_to(seeds, indices.shape).ravel(), indices.ravel())
        for room, batch in zip(wave.batches, coming, strict=True):
            room[:ticks].copy_(batch.view(ticks, *room.shape[1:]), non_blocking=True)
        wave.indices[:ticks].copy_(torch.from_numpy(indices), non_blocking=True)

    def _shown(self, shown: Sequence[_Shown]) -> Iterator[tuple[int, Iterate]]:
        if shown:
            begin = time.perf_counter()
            measured = self._measure([s.state for s in shown], [s.seed for s in shown], [s.step for s in shown])
            self.measuring += time.perf_counter() - begin
            for (work, _, step, state), metrics in zip(shown, measured, strict=True):
                yield work, Iterate(step, state, metrics)

    def _measure(self, states: Sequence[State], seeds: Sequence[int], steps: Sequence[int]) -> list[dict[str, float]]:
        """Return the metrics of iterates of the same or different seeds, and the loss on B_n of θ_n, n ≥ 1."""

        def measure(params: Tensors, buffers: Tensors, *batch: Tensor) -> Tensors:
            values = self._problem.evaluate(params, buffers)
            return values | {"batch_loss": self._problem.loss(params, buffers, batch)[0]} if batch else values

        with torch.no_grad():
            if self._lanes == 1:
                picks = zip(states, seeds, steps, strict=True)
                each = [measure(s.params, s.buffers, *(self._streams[k][n] if n else ())) for s, k, n in picks]
                return [{name: float(value) for name, value in values.items()} for values in each]
            stack = _stack(states)
            batches = stacked(self._streams, np.array(seeds), np.array(steps)) if steps[0] else ()
            # A few large states at a time: an evaluation holds the activations of all its examples for each.
            together = None if sum(t[0].numel() for t in stack.params.values()) < 10_000 else 8
            values = torch.vmap(measure, chunk_size=together)(stack.params, stack.buffers, *batches)
        columns = {name: value.tolist() for name, value in values.items()}
        return [{name: column[k] for name, column in columns.items()} for k in range(len(states))]


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


def tick_of(problem: LiveProblem, operator: Operator, lanes: int) -> Tick:
    """Return the tick of a problem and an operator: vectorised over the lanes, or plain for one lane."""

    gradient = functional_gradient(problem)

    def apply(state: State, batch: Batch, index: Tensor) -> State:
        return operator.apply(gradient, state, batch, index)

    def alone(states: State, batches: Batch, indices: Tensor) -> State:
        after = apply(pytree.tree_map(lambda t: t[0], states), tuple(t[0] for t in batches), indices[0])
        stack: State = pytree.tree_map(lambda t: t[None], after)
        return stack

    together = alone if lanes == 1 else torch.vmap(apply)

    def tick(states: State, batches: Batch, indices: Tensor) -> None:
        after = _apart(together(states, batches, indices), states)
        # In place: fresh memory for every tick would cost up to half as much again in page faults.
        for old, new in zip(pytree.tree_leaves(states), pytree.tree_leaves(after), strict=True):
            old.copy_(new)

    return tick


def eager(tick: Tick) -> Advance:
    """Return what runs the ticks of a block as they are."""

    def advance(states: State, batches: Batch, indices: Tensor, ticks: int) -> None:
        for j in range(ticks):
            tick(states, tuple(t[j] for t in batches), indices[j])

    return advance


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


def _stack(states: Sequence[State]) -> State:
    stack: State = pytree.tree_map(lambda *tensors: torch.stack(tensors), *states)
    return stack


def _take(wave: State, lane: int) -> State:
    state: State = pytree.tree_map(lambda t: t[lane].clone(), wave)
    return state


def _put(wave: State, lane: int, state: State) -> None:
    for slot, value in zip(pytree.tree_leaves(wave), pytree.tree_leaves(state), strict=True):
        slot[lane].copy_(value)
