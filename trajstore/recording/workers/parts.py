"""Parts: a recording cut into pieces that can be computed by themselves, anywhere and in any order.

A part is some of the recorded steps of one stretch. A forward stretch is one part. A backward stretch is cut where
segments of the store begin, so that whoever computes a part can mostly write it too, and finer where that would
be too much for one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from trajstore.engine import Work
from trajstore.engine.walk import Stretch

__all__ = ["Part", "bundles", "parts_of"]


_AN_ITERATE = 64
"""To measure, sketch and store an iterate takes about as long as so many operator applications."""


class Part(NamedTuple):
    """Some recorded steps of a stretch."""

    stretch: int
    """Position among the stretches."""
    steps: tuple[int, ...]
    before: tuple[int, int] | None
    """(stretch, step) of the recorded iterate before the first of them; None before θ₀."""
    applications: int
    """How many operator applications they take, the iterate before included."""

    @property
    def cost(self) -> int:
        """About how long it takes, in operator applications."""
        return self.applications + _AN_ITERATE * len(self.steps)


def parts_of(
    stretches: Sequence[Stretch],
    grid: Sequence[int],
    segment_of: Callable[[int], int],
    most: int,
    missing: Callable[[Stretch, int], bool] = lambda _stretch, _segment: True,
) -> list[Part]:
    """Cut stretches into parts, none of more than `most` operator applications unless it is one iterate.

    Only segments that are `missing` are wanted.
    """
    parts = []
    for k, stretch in enumerate(stretches):
        here = grid[bisect_right(grid, stretch.begin) : bisect_right(grid, stretch.end)]
        if stretch.begin == 0:
            here = (0, *here)
        for steps in _pieces(stretch, here, segment_of, most, missing):
            before = _before(stretches, k, grid, steps[0])
            cost = stretch.work(steps).applications
            if before is not None:
                cost += work_to(stretches, before).applications
            parts.append(Part(k, tuple(steps), before, cost))
    return parts


def work_to(stretches: Sequence[Stretch], place: tuple[int, int]) -> Work:
    """Return the work that computes one iterate, given as (stretch, step); none where that stretch starts there."""
    stretch, step = stretches[place[0]], place[1]
    return stretch.work([] if step == stretch.last.step else [step])


def bundles(parts: Sequence[Part], least: int, chains: int) -> list[list[Part]]:
    """Put small parts together that follow each other, the dearest bundle first.

    A bundle costs at least `least` and has so many chains, or is what was left.
    """
    found: list[list[Part]] = [[]]
    for part in parts:
        if sum(p.cost for p in found[-1]) >= least and sum(len(p.steps) for p in found[-1]) >= chains:
            found.append([])
        found[-1].append(part)
    return sorted(filter(None, found), key=lambda bundle: -sum(p.cost for p in bundle))


def _pieces(
    stretch: Stretch,
    here: Sequence[int],
    segment_of: Callable[[int], int],
    most: int,
    missing: Callable[[Stretch, int], bool],
) -> Iterator[Sequence[int]]:
    if stretch.leg.kind != "backward":
        for wanted, run in groupby(here, lambda step: missing(stretch, segment_of(step))):
            if wanted:
                yield list(run)
        return
    for segment, group in groupby(here, segment_of):
        if not missing(stretch, segment):
            continue
        piece: list[int] = []
        cost = 0
        for step in group:
            if piece and cost + step - stretch.leg.start > most:
                yield piece
                piece, cost = [], 0
            piece.append(step)
            cost += step - stretch.leg.start
        yield piece


def _before(stretches: Sequence[Stretch], own: int, grid: Sequence[int], step: int) -> tuple[int, int] | None:
    if step == 0:
        return None
    before = grid[bisect_right(grid, step - 1) - 1]
    slab = stretches[own].slabs[0]
    if before == stretches[own].last.step:
        return own, before
    return next((k, before) for k, s in enumerate(stretches) if slab in s.slabs and s.begin < before <= s.end)
