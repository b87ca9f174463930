"""Take all orders of one seed through time together.

Time is cut where any order turns into a new leg. Within a cut, orders that came the same way (the same legs
from the same starts) want the same iterates: these are computed once and handed to each. An order whose legs
depend on a metric decides at its turns, when the iterate there is known; until it decides differently it
shares too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from trajstore.engine import Engine, Iterate
from trajstore.orders import Leg, Order
from trajstore.state import State

__all__ = ["Visit", "applications", "walk"]

Way = tuple[tuple[str, int], ...]
"""How an order came to where it is: (kind, start) of each leg so far."""


@dataclass(frozen=True)
class Visit:
    """An iterate, the orders that it belongs to, and the start step of the leg that made it."""

    orders: tuple[Order, ...]
    leg_start: int
    iterate: Iterate


@dataclass(frozen=True)
class _Traveller:
    order: Order
    leg: Leg
    way: Way
    anchor: Iterate
    """Where the leg started."""
    last: Iterate
    """What the next work starts from: the anchor, or for a forward leg the latest iterate."""

    def onto(self, leg: Leg, here: Iterate) -> _Traveller:
        return replace(self, leg=leg, way=(*self.way, (leg.kind, leg.start)), anchor=here, last=here)


def walk(orders: Sequence[Order], steps: int, grid: Sequence[int], engine: Engine) -> Iterator[Visit]:
    """Yield every wanted iterate of every order, for each order by increasing step, θ₀ first.

    `grid` holds the wanted steps in increasing order, 0 among them. Iterates at turns are computed in any
    case, and yielded only if wanted.
    """
    origin = engine.start()
    yield Visit(tuple(orders), 0, origin)
    travellers = [_Traveller(o, o.legs[0], ((o.legs[0].kind, 0),), origin, origin) for o in orders]
    turns = {order: order.turns(steps) for order in orders}
    for begin, end in pairwise(_cuts(orders, steps)):
        wanted = [n for n in grid if begin < n <= end]
        moved: list[_Traveller] = []
        for together in _by_way(travellers):
            needs_end = end < steps and (
                together[0].leg.kind == "forward" or any(end in turns[t.order] for t in together)
            )
            lead, arrived = together[0], together[0].last
            for arrived in engine.iterates(lead.leg, lead.last, _with(wanted, end) if needs_end else wanted):
                if arrived.step in wanted:
                    yield Visit(tuple(t.order for t in together), lead.leg.start, arrived)
            for t in together:
                moved.append(_turn(t, turns[t.order].get(end), arrived))
        travellers = moved


def applications(orders: Sequence[Order], steps: int, grid: Sequence[int]) -> int:
    """Count the operator applications of a walk.

    Exact, unless legs depend on a metric: then it is an upper bound, since a chain that is not reset is the
    longest.
    """
    plain = [order for order in orders if not order.metrics]
    counter = _Counter()
    for _ in walk(plain, steps, grid, counter):
        pass
    for order in orders:
        if order.metrics:
            for _ in walk([order], steps, grid, counter):
                pass
    return counter.total


def _turn(t: _Traveller, leg: Leg | None, here: Iterate) -> _Traveller:
    if t.leg.kind == "forward":
        t = replace(t, last=here)
    if leg is None or (leg.metric and not here.metrics[leg.metric] < t.anchor.metrics[leg.metric]):
        return t
    return t.onto(leg, here)


def _cuts(orders: Sequence[Order], steps: int) -> list[int]:
    return sorted({0, steps}.union(*(order.turns(steps) for order in orders)))


def _by_way(travellers: Sequence[_Traveller]) -> list[list[_Traveller]]:
    groups: dict[Way, list[_Traveller]] = {}
    for t in travellers:
        groups.setdefault(t.way, []).append(t)
    return list(groups.values())


def _with(wanted: list[int], end: int) -> list[int]:
    return wanted if wanted and wanted[-1] == end else [*wanted, end]


class _AnyMetric(dict[str, float]):
    """Metrics of an iterate nobody computed: never lower, so nothing is reset."""

    def __missing__(self, name: str) -> float:
        return 0.0


class _Counter:
    """An engine that counts instead of computing."""

    total = 0

    def start(self) -> Iterate:
        return _placeholder(0)

    def iterates(self, leg: Leg, last: Iterate, steps: Sequence[int]) -> Iterator[Iterate]:
        self.total += leg.applications(steps, last.step)
        return map(_placeholder, steps)


def _placeholder(step: int) -> Iterate:
    return Iterate(step, State({}, {}, {}, torch.tensor(step)), _AnyMetric())
