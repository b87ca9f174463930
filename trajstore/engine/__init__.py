"""Engines compute iterates. They know problems and operators, and nothing of disks.

`walk` takes all orders of all seeds through time together, so that legs they share are computed once; an
`Engine` computes the work that it is handed. `reference` is the definition written plainly; `wavefront` advances
many chains at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from trajstore.engine.orders import Leg

if TYPE_CHECKING:  # what reads orders needs no torch
    from trajstore.engine.proving import Refusal
    from trajstore.operators.state import State

__all__ = ["Engine", "Iterate", "Work"]


class Iterate(NamedTuple):
    """One θ_n, and what the problem's metrics say of it."""

    step: int
    state: State
    metrics: dict[str, float]


class Work(NamedTuple):
    """Iterates to compute: increasing steps of one leg of one seed."""

    seed: int
    """Position among the engine's seeds."""
    leg: Leg
    last: Iterate
    """Where to start from: the leg's start for a backward leg, any earlier iterate for a forward leg."""
    steps: Sequence[int]

    @property
    def applications(self) -> int:
        """How many operator applications that takes."""
        return self.leg.applications(self.steps, self.last.step)


class Engine(Protocol):
    """Computes the iterates of several seeds."""

    @property
    def measuring(self) -> float:
        """How many seconds went into metrics so far."""

    @property
    def refusals(self) -> Sequence[Refusal]:
        """What is not used because it gave something else than its definition."""

    def start(self, seed: int) -> Iterate:
        """Return θ₀ of a seed."""

    def run(self, works: Sequence[Work]) -> Iterator[tuple[int, Iterate]]:
        """Yield (position of the work, iterate), for each work by increasing step."""
