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
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trajstore._common import pytree
from trajstore.engine import Iterate, Work
from trajstore.engine.bracket import Brackets
from trajstore.engine.proving import Definition, Refusal, disproof
from trajstore.engine.reference import gradient_of
from trajstore.engine.ticks import PROVEN_TICKS, Advance, lane_of, lanes_of, stack
from trajstore.operators import Batch, Operator
from trajstore.operators.state import State, Tensors, beginning
from trajstore.problems import LiveProblem
from trajstore.problems._streams import stacked

__all__ = ["WavefrontEngine"]

_BLOCK_TICKS = 64
_BLOCK_BYTES = 2**24
_LANES_MEASURED = 4
"""The metrics of so many states of a wave are also computed by themselves, in each of its first calls."""


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
        self._measured: Counter[tuple[int, int]] = Counter()
        """How often vectorised metrics were compared with their definition, by (number of arguments, lane)."""
        self._on_trust = 0
        """So many states have metrics that were handed on before those of their lane were ever compared."""
        self._refused: tuple[Refusal, ...] = ()
        self._brackets: Brackets | None = None

    @property
    def refusals(self) -> Sequence[Refusal]:
        """What is not used because it gave something else than its definition."""
        return (*self._advance.refusals, *self._refused)

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
                    self._problem, self._operator, gradient_of(self._problem), self._streams
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
                self._advance(wave.states, wave.batches, wave.indices, range(ticks), [k for k, _ in busy])
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
        states = stack([chain.start] * self._lanes)
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

        def each(params: Tensors, buffers: Tensors, *batch: Tensor) -> Tensors:
            one: tuple[Any, ...] = params, buffers, *batch
            values = [measure(*pytree.tree_map(lambda t, k=k: t[k], one)) for k in range(len(params[first]))]
            return {name: torch.stack([value[name] for value in values]) for name in values[0]}

        with torch.no_grad():
            together = stack(states)
            first = next(iter(together.params))
            batches = stacked(self._streams, np.array(seeds), np.array(steps)) if steps[0] else ()
            given: tuple[Any, ...] = together.params, together.buffers, *batches
            if self._lanes == 1 or self._refused:
                values = each(*given)
            else:
                # A few large states at a time: an evaluation holds the activations of all its examples for each.
                few = None if sum(t[0].numel() for t in together.params.values()) < 10_000 else 8
                values = self._proven(torch.vmap(measure, chunk_size=few)(*given), each, given)
        columns = {name: value.tolist() for name, value in values.items()}
        return [{name: column[k] for name, column in columns.items()} for k in range(len(states))]

    def _proven(self, values: Tensors, definition: Definition, given: tuple[Any, ...]) -> Tensors:
        """Return vectorised metrics if they are what each state's are, or these.

        A few lanes are compared at a time, since an evaluation goes through all of the data: those that were least
        often, until all were often enough.
        """
        if not values:
            return values
        lanes = range(len(next(iter(values.values()))))
        kind = len(given)  # with the loss on a batch, or without
        seen = self._measured
        due = sorted((k for k in lanes if seen[kind, k] < PROVEN_TICKS), key=lambda k: seen[kind, k])[:_LANES_MEASURED]
        if not due:
            return values
        at = torch.tensor(due, device=next(iter(values.values())).device)
        told = disproof(lanes_of(values, at), definition, *lanes_of(given, at), lanes=due)
        if not told:
            seen.update((kind, k) for k in due)
            self._on_trust += sum(not seen[kind, k] for k in lanes)
            return values
        if self._on_trust:
            told += f"; those of {self._on_trust} states were handed on before: record them again"
        self._refused = (Refusal("vectorised evaluation of metrics", told),)
        each: Tensors = definition(*given)
        return each


def _chains(works: Sequence[Work]) -> Iterator[_Chain]:
    """Yield the chains of all works, forward legs first, since they are the longest and cannot be split."""
    for k, (seed, leg, last, steps) in enumerate(works):
        if leg.kind == "forward" and steps:
            yield _Chain(k, seed, last.state, range(last.step + 1, steps[-1] + 1), steps, last.step)
    for k, (seed, leg, last, steps) in enumerate(works):
        if leg.kind == "backward":
            for n in steps:
                yield _Chain(k, seed, last.state, leg.chain(n), [n], last.step)


def _take(wave: State, lane: int) -> State:
    state: State = pytree.tree_map(torch.clone, lane_of(wave, lane))
    return state


def _put(wave: State, lane: int, state: State) -> None:
    for slot, value in zip(pytree.tree_leaves(wave), pytree.tree_leaves(state), strict=True):
        slot[lane].copy_(value)
