"""What engines have in common that run another one, and do something more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trajstore.engine import Engine, Iterate, Work
from trajstore.engine.proving import Refusal

__all__ = ["Over"]


class Over:
    """An engine that is another one in everything but how it runs."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def measuring(self) -> float:
        """How many seconds went into metrics so far."""
        return self.engine.measuring

    @property
    def refusals(self) -> Sequence[Refusal]:
        """What is not used because it gave something else than its definition."""
        return self.engine.refusals

    def start(self, seed: int) -> Iterate:
        """Return θ₀ of a seed."""
        return self.engine.start(seed)

    def run(self, works: Sequence[Work]) -> Iterator[tuple[int, Iterate]]:
        """Yield (position of the work, iterate), for each work by increasing step."""
        return self.engine.run(works)
