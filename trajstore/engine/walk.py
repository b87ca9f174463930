"""Take all orders of all seeds through time together.

Time is cut where any order turns into a new leg. Within a cut, orders of a seed that came the same way (the same
legs from the same starts) want the same iterates: these are computed once and handed to each. An order whose legs
depend on a metric decides at its turns, when the iterate there is known; until it decides differently it
shares too.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch

from trajstore.engine import Engine, Iterate, Work
from trajstore.engine.orders import Leg, Order
from trajstore.engine.proving import Refusal
from trajstore.operators.state import State

__all__ = ["Progress", "Slab", "Stretch", "Visit", "Way", "applications", "stretches_of", "walk"]

Way = tuple[tuple[str, int], ...]
"""How an order came to where it is: (kind, start) of each leg so far."""


class Slab(NamedTuple):
    """One order of one seed."""

    order: Order
    seed: int
    """Position among the engine's seeds."""


@dataclass(frozen=True)
class Progress:
    """How far a slab has come: what it takes to go on from there."""

    way: Way
    anchor: Iterate
    """Where the present leg started."""
    last: Iterate
    """The iterate where it stands."""


@dataclass(frozen=True)
class Visit:
    """An iterate, the slabs that it belongs to, and how they came there."""

    slabs: tuple[Slab, ...]
    progress: Progress

    @property
    def iterate(self) -> Iterate:
        """The iterate."""
        return self.progress.last

    @property
    def leg_start(self) -> int:
        """The start step of the leg that made it."""
        return self.progress.way[-1][1]


@dataclass(frozen=True)
class Stretch:
    """Steps that one leg makes for the same slabs: begin < n ≤ end."""

    slabs: tuple[Slab, ...]
    way: Way
    leg: Leg
    anchor: Iterate
    last: Iterate
    """What a work on these steps starts from: the leg's start; for a forward leg maybe a later iterate."""
    begin: int
    end: int

    def work(self, steps: Sequence[int]) -> Work:
        """Return the work that computes some of the steps."""
        return Work(self.slabs[0].seed, self.leg, self.last, steps)


@dataclass(frozen=True)
class _Traveller:
    slab: Slab
    leg: Leg
    way: Way
    anchor: Iterate
    """Where the leg started."""
    last: Iterate
    """What the next work starts from: the anchor, or for a forward leg the latest iterate."""
    at: int
    """The step where it stands."""
    here: Iterate
    """The iterate there, as far as it is wanted for anything."""


def walk(
    slabs: Sequence[Slab],
    steps: int,
    grid: Sequence[int],
    engine: Engine,
    asked: Mapping[Slab, Sequence[int]] | None = None,
    progress: Mapping[Slab, Progress] | None = None,
) -> Iterator[Visit]:
    """Yield every wanted iterate of every slab, for each slab by increasing step, θ₀ first.

    `grid` holds the steps that may be wanted, in increasing order, 0 among them; `asked` those that the engine is
    asked for, all by default: it may add some of its own accord. Iterates at turns are computed in any
    case, and yielded only if wanted. A slab that has made progress goes on from there; slabs that came the same way
    are all taken on from the one that is the least far.
    """
    visible, progress = frozenset(grid), progress or {}
    origins = {seed: engine.start(seed) for seed in dict.fromkeys(slab.seed for slab in slabs)}
    for kind, seed in dict.fromkeys((slab.order.legs[0].kind, slab.seed) for slab in slabs):
        alike = tuple(slab for slab in slabs if (slab.order.legs[0].kind, slab.seed) == (kind, seed))
        yield Visit(alike, Progress(((kind, 0),), origins[seed], origins[seed]))
    for slab, made in progress.items():
        yield Visit((slab,), made)
    journey = _journey(slabs, steps, origins, progress)
    cut = next(journey, None)
    while cut is not None:
        end, stretches, turning = cut
        works = []
        for stretch, turns in zip(stretches, turning, strict=True):
            wanted = grid if asked is None else _union([asked[slab] for slab in stretch.slabs])
            between = list(wanted[bisect_right(wanted, stretch.begin) : bisect_right(wanted, end)])
            works.append(_work(stretch, between, end, turns))
        arrived = [s.last for s in stretches]
        for k, iterate in engine.run(works):
            if iterate.step == end:
                arrived[k] = iterate
            if iterate.step in visible:
                yield Visit(stretches[k].slabs, Progress(stretches[k].way, stretches[k].anchor, iterate))
        cut = _after(journey, arrived)


def stretches_of(slabs: Sequence[Slab], steps: int, engine: Engine) -> list[Stretch]:
    """Return the stretches that the slabs are made of, computing only the iterates at turns.

    After that every stretch can be computed by itself, and of a backward stretch every step.
    """
    found: list[Stretch] = []
    open_ones: dict[tuple[Slab, ...], int] = {}
    journey = _journey(slabs, steps, {seed: engine.start(seed) for seed in dict.fromkeys(s.seed for s in slabs)})
    cut = next(journey, None)
    while cut is not None:
        end, stretches, turning = cut
        for stretch in stretches:
            at = open_ones.get(stretch.slabs)
            if at is not None and found[at].leg == stretch.leg and found[at].last is stretch.last:
                found[at] = replace(found[at], end=end)
            else:
                open_ones[stretch.slabs] = len(found)
                found.append(stretch)
        arrived = [s.last for s in stretches]
        asked = [k for k, turns in enumerate(turning) if turns]
        for k, iterate in engine.run([stretches[k].work([end]) for k in asked]):
            arrived[asked[k]] = iterate
        cut = _after(journey, arrived)
    return found


_Cut = tuple[int, list[Stretch], list[bool]]
"""The end, who is on the way how, and whether any of them turns at the end."""


def _journey(
    slabs: Sequence[Slab], steps: int, origins: Mapping[int, Iterate], progress: Mapping[Slab, Progress] | None = None
) -> Generator[_Cut, Sequence[Iterate], None]:
    """Yield the cuts; wants to be sent where each stretch arrived, or has come to so far."""
    turns = {slab.order: slab.order.turns(steps) for slab in slabs}
    travellers = [
        _on_the_way(slab, turns[slab.order], origins[slab.seed], (progress or {}).get(slab)) for slab in slabs
    ]
    for begin, end in pairwise(sorted({0, steps}.union(*turns.values()))):
        groups = _by_way([t for t in travellers if t.at < end])
        stretches = [_stretch(group, begin, end) for group in groups]
        arrived = {}
        if groups:
            came = yield end, stretches, [any(end in turns[t.slab.order] for t in g) for g in groups]
            arrived = {t.slab: here for group, here in zip(groups, came, strict=True) for t in group}
        travellers = [
            t
            if t.at > end
            else _turned(replace(t, at=end, here=arrived.get(t.slab, t.here)), turns[t.slab.order].get(end))
            for t in travellers
        ]


def _on_the_way(slab: Slab, turns: Mapping[int, Leg], origin: Iterate, made: Progress | None) -> _Traveller:
    if made is None:
        leg = slab.order.legs[0]
        return _Traveller(slab, leg, ((leg.kind, 0),), origin, origin, 0, origin)
    start = made.way[-1][1]
    leg, anchor = (turns[start], made.anchor) if start else (slab.order.legs[0], origin)
    last = made.last if leg.kind == "forward" else anchor
    return _Traveller(slab, leg, made.way, anchor, last, made.last.step, made.last)


def _stretch(group: Sequence[_Traveller], begin: int, end: int) -> Stretch:
    """Return what travellers do together; those who are ahead see again what they have seen."""
    first = min(group, key=lambda t: t.at)
    slabs = tuple(t.slab for t in group)
    return Stretch(slabs, first.way, first.leg, first.anchor, first.last, max(begin, first.at), end)


def _union(grids: Sequence[Sequence[int]]) -> Sequence[int]:
    first = grids[0]
    return first if all(grid is first or grid == first for grid in grids) else sorted(set().union(*grids))


def _after(journey: Generator[_Cut, Sequence[Iterate], None], arrived: Sequence[Iterate]) -> _Cut | None:
    try:
        return journey.send(arrived)
    except StopIteration:
        return None


def applications(orders: Sequence[Order], steps: int, grid: Sequence[int]) -> int:
    """Count the operator applications of one seed.

    Exact, unless legs depend on a metric: then it is an upper bound, since a chain that is not reset is the
    longest.
    """
    plain = [Slab(order, 0) for order in orders if not order.metrics]
    counter = _Counter()
    for together in (plain, *([Slab(order, 0)] for order in orders if order.metrics)):
        for _ in walk(together, steps, grid, counter):
            pass
    return counter.total


def _work(stretch: Stretch, wanted: list[int], end: int, turning: bool) -> Work:
    """Return what a stretch wants, and the end of the cut where something goes on from it."""
    needs_end = turning or stretch.leg.kind == "forward"
    reached = bool(wanted) and wanted[-1] == end
    return stretch.work(wanted if reached or not needs_end else [*wanted, end])


def _turned(t: _Traveller, leg: Leg | None) -> _Traveller:
    if t.leg.kind == "forward":
        t = replace(t, last=t.here)
    if leg is None or (leg.metric and not t.here.metrics[leg.metric] < t.anchor.metrics[leg.metric]):
        return t
    return replace(t, leg=leg, way=(*t.way, (leg.kind, leg.start)), anchor=t.here, last=t.here)


def _by_way(travellers: Sequence[_Traveller]) -> list[list[_Traveller]]:
    groups: dict[tuple[int, Way], list[_Traveller]] = {}
    for t in travellers:
        groups.setdefault((t.slab.seed, t.way), []).append(t)
    return list(groups.values())


class _NoMetric(dict[str, float]):
    """Metrics of an iterate that nobody computed: never lower, so nothing is reset."""

    def __missing__(self, name: str) -> float:
        return 0.0


class _Counter:
    """An engine that counts instead of computing."""

    total = 0

    measuring = 0.0
    refusals: Sequence[Refusal] = ()

    def start(self, seed: int) -> Iterate:
        return Iterate(0, State({}, {}, {}, torch.tensor(0)), _NoMetric())

    def run(self, works: Sequence[Work]) -> Iterator[tuple[int, Iterate]]:
        for k, work in enumerate(works):
            self.total += work.applications
            for n in work.steps:
                yield k, self.start(work.seed)._replace(step=n)
