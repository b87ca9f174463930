"""Engines compute iterates. They know problems and operators, and nothing of disks.

`walk` takes all orders of one seed through time together, so that legs they share are computed once; an
`Engine` computes the iterates of one leg. `reference` is the definition written plainly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from trajstore.orders import Leg
from trajstore.state import State

__all__ = ["Engine", "Iterate"]


class Iterate(NamedTuple):
    """One θ_n, and what the problem's metrics say of it."""

    step: int
    state: State
    metrics: dict[str, float]


class Engine(Protocol):
    """Computes the iterates of one seed."""

    def start(self) -> Iterate:
        """Return θ₀."""

    def iterates(self, leg: Leg, last: Iterate, steps: Sequence[int]) -> Iterator[Iterate]:
        """Yield the iterates of a leg at increasing steps.

        `last` is where the work starts from: the leg's start for a backward leg, and for a forward leg any
        earlier iterate of it.
        """
