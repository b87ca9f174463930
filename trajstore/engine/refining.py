"""An engine that computes further iterates where a metric's curve is not known well enough.

Of a work's steps, each interval between neighbours is bisected, and its halves in turn, until the metric at the
middle was within a tolerance of the straight line between the ends twice in a row: once may be chance. What comes of
an interval depends on nothing but its iterates, so not on the width of the wave or on what is computed beside it.

Iterates of a backward leg are chains of their own, and only those asked for are computed. A forward leg passes
through all of its steps; it is run once for its values and once for the iterates that are kept.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from trajstore.engine import Engine, Iterate, Work
from trajstore.engine.over import Over

__all__ = ["Refining", "Wanted"]

_IN_A_ROW = 2
"""So many middles in a row must lie near the line."""
_ABREAST = 64
"""So many intervals of a work are bisected at once, the earliest first: what is held stays small."""


@dataclass(frozen=True)
class Wanted:
    """What is to be known."""

    metric: str
    tolerance: float
    grid: Sequence[int]
    """The steps that there may be."""


class Refining(Over):
    """Runs works of another engine, and refines them."""

    def __init__(self, engine: Engine, wanted: Wanted) -> None:
        super().__init__(engine)
        self._wanted = wanted

    def run(self, works: Sequence[Work]) -> Iterator[tuple[int, Iterate]]:
        """Yield (position of the work, iterate), for each work by increasing step, those in between too."""
        forward = [k for k, work in enumerate(works) if work.leg.kind == "forward"]
        kept = [works[k]._replace(steps=self._chosen(works[k])) for k in forward]
        for j, iterate in self.engine.run(kept):
            yield forward[j], iterate
        curves = {k: _Curve(self._wanted, work.steps) for k, work in enumerate(works) if k not in forward}
        held: dict[int, dict[int, Iterate]] = {k: {} for k in curves}
        asked = [(k, works[k].steps) for k in curves if works[k].steps]
        while asked:
            for j, iterate in self.engine.run([works[k]._replace(steps=steps) for k, steps in asked]):
                held[asked[j][0]][iterate.step] = iterate
            for k, curve in curves.items():
                curve.learn({step: self._value(iterate) for step, iterate in held[k].items()})
                for step in sorted(step for step in held[k] if step <= curve.settled):
                    yield k, held[k].pop(step)
            asked = [(k, steps) for k, curve in curves.items() if (steps := curve.next())]

    def _chosen(self, work: Work) -> Sequence[int]:
        """Return the steps of a forward work that will be kept."""
        if not work.steps:
            return work.steps
        grid = self._wanted.grid
        between = grid[bisect_left(grid, work.steps[0]) : bisect_left(grid, work.steps[-1])]
        every = sorted({*work.steps, *between})
        values = {it.step: self._value(it) for _, it in self.engine.run([work._replace(steps=every)])}
        curve = _Curve(self._wanted, work.steps)
        curve.learn({step: values[step] for step in work.steps})
        chosen = set(work.steps)
        while steps := curve.next():
            chosen.update(steps)
            curve.learn({step: values[step] for step in steps})
        return sorted(chosen)

    def _value(self, iterate: Iterate) -> float:
        return iterate.metrics[self._wanted.metric]


class _Curve:
    """A metric along the steps of a work, as far as it is known."""

    def __init__(self, wanted: Wanted, steps: Sequence[int]) -> None:
        self._wanted = wanted
        self._values: dict[int, float] = {}
        self._open: list[tuple[int, int, int]] = []
        """Begin and end of intervals to bisect, and how often in a row the curve was straight there."""
        for a, b in pairwise(steps):
            self._bisect(a, b, 0)

    @property
    def settled(self) -> float:
        """The step up to which no more iterates will be wanted."""
        return self._open[0][0] if self._open else math.inf

    def next(self) -> list[int]:
        """Return the middles of the earliest open intervals."""
        return [self._middle(a, b) for a, b, _ in self._open[:_ABREAST]]

    def learn(self, values: Mapping[int, float]) -> None:
        """Take values, close the intervals that they show to be straight, and halve the others."""
        self._values |= values
        for interval in list(self._open):
            a, b, straight = interval
            middle = self._middle(a, b)
            if middle in self._values:
                self._open.remove(interval)
                straight = straight + 1 if self._straight(a, middle, b) else 0
                if straight < _IN_A_ROW:
                    self._bisect(a, middle, straight)
                    self._bisect(middle, b, straight)

    def _bisect(self, a: int, b: int, straight: int) -> None:
        if a < self._middle(a, b):
            insort(self._open, (a, b, straight))

    def _middle(self, a: int, b: int) -> int:
        """Return the step of the grid in the middle of two; the first of them where there is none between them."""
        grid = self._wanted.grid
        return grid[(bisect_left(grid, a) + bisect_left(grid, b)) // 2]

    def _straight(self, a: int, middle: int, b: int) -> bool:
        left, here, right = (self._values[n] for n in (a, middle, b))
        if not all(map(math.isfinite, (left, here, right))):
            return not any(map(math.isfinite, (left, here, right)))  # where it begins to diverge is worth knowing
        line = left + (right - left) * (middle - a) / (b - a)
        return abs(here - line) <= self._wanted.tolerance
