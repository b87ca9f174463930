"""What the seconds of a recording go into."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from trajstore.engine import Engine

__all__ = ["Clock", "Spent"]


class Spent(NamedTuple):
    """Seconds, summed over processes."""

    applications: float = 0.0
    """Operator applications, and what it takes to hand them their batches."""
    metrics: float = 0.0
    """The problem's metrics and the loss on B_n."""
    storing: float = 0.0
    """Norms, distances, sketches, digests, compression, writing."""

    def plus(self, other: Spent) -> Spent:
        """Return the sums."""
        return Spent(*(a + b for a, b in zip(self, other, strict=True)))


class Clock:
    """Tells the seconds since it was made apart, while an engine runs in this process."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._storing = engine, 0.0
        self._began, self._measured = time.perf_counter(), engine.measuring

    @contextmanager
    def storing(self) -> Iterator[None]:
        """Count what happens inside as storing."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._storing += time.perf_counter() - begin

    def spent(self) -> Spent:
        """Return what was spent so far."""
        metrics = self._engine.measuring - self._measured
        return Spent(time.perf_counter() - self._began - metrics - self._storing, metrics, self._storing)
