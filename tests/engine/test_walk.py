"""Legs that several orders share are computed once, and the count of the work is exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.test_orders import orders
from trajstore.engine import Iterate
from trajstore.engine.orders import Leg, Order
from trajstore.engine.walk import Slab, applications, walk
from trajstore.operators.state import State

STEPS = 40


class Recorder:
    """An engine whose states are the chains themselves: every operator that was applied, in order."""

    def __init__(self, losses=lambda chain: 0.0):
        self.applied = 0
        self._losses = losses

    def start(self, seed):
        return self._iterate(0, ())

    def run(self, works):
        for k, (_, leg, last, steps) in enumerate(works):
            chain, done = chain_of(last), last.step
            for n in steps:
                if leg.kind == "forward":
                    new = tuple(range(done + 1, n + 1))
                    chain, done = (*chain, *new), n
                    here = chain
                else:
                    new = tuple(leg.chain(n))
                    here = (*chain, *new)
                self.applied += len(new)
                yield k, self._iterate(n, here)

    def _iterate(self, step, chain):
        return Iterate(step, State({}, {}, {}, torch.tensor([len(chain), *chain])), {"train_loss": self._losses(chain)})


def chain_of(iterate):
    return tuple(iterate.state.position[1:].tolist())


def chain_by_definition(order: Order, n: int) -> tuple[int, ...]:
    """Windows unrolled one after the other, without the walk's machinery."""
    chain: list[int] = []
    legs = []
    for k, leg in enumerate(order.legs):
        end = order.legs[k + 1].start if k + 1 < len(order.legs) else STEPS
        starts = range(leg.start, max(end, leg.start + 1), leg.window) if leg.window else [leg.start]
        legs += [Leg(leg.kind, a) for a in starts]
    for leg, following in zip(legs, [*legs[1:], None], strict=True):
        last = following is None or following.start >= n
        chain += leg.chain(n if last else following.start)
        if last:
            return tuple(chain)
    raise AssertionError


unconditional = orders().filter(lambda o: not o.metrics and all(leg.start < STEPS for leg in o.legs))
grids = st.sets(st.integers(1, STEPS)).map(lambda s: sorted({0, STEPS} | s))


@given(st.lists(unconditional, min_size=1, max_size=4, unique=True), grids)
def test_every_order_gets_the_chains_of_its_definition(several, grid):
    engine = Recorder()
    slabs = [Slab(order, seed) for order in several for seed in (0, 1)]
    seen: dict[Slab, list[int]] = {slab: [] for slab in slabs}
    for visit in walk(slabs, STEPS, grid, engine):
        assert len({slab.seed for slab in visit.slabs}) == 1
        for slab in visit.slabs:
            seen[slab].append(visit.iterate.step)
            if visit.iterate.step:
                assert chain_of(visit.iterate) == chain_by_definition(slab.order, visit.iterate.step)
    assert all(steps == grid for steps in seen.values())
    assert 2 * applications(several, STEPS, grid) == engine.applied


def test_backward_costs_a_triangle_and_every_kth_costs_a_kth():
    every = applications([Order.parse("backward")], 1000, range(1001))
    assert every == 1000 * 1001 // 2
    assert applications([Order.parse("backward")], 1000, range(0, 1001, 10)) == sum(range(0, 1001, 10))
    assert applications([Order.parse("forward")], 1000, [0, 1000]) == 1000
    assert applications([Order.parse("backward/10")], 1000, range(1001)) == 100 * 55


def test_orders_share_the_legs_they_have_in_common():
    grid = range(101)
    one = applications([Order.parse("backward")], 100, grid)
    both = applications([Order.parse("backward"), Order.parse("backward+backward@60")], 100, grid)
    assert both - one == sum(range(1, 41))  # only the second leg, from 60 on
    forward = applications([Order.parse("forward"), Order.parse("forward+backward@60")], 100, grid)
    assert forward == 100 + sum(range(1, 41))


def test_a_turn_is_computed_even_if_it_is_not_recorded():
    engine = Recorder()
    visits = list(walk([Slab(Order.parse("backward+backward@7"), 0)], 20, [0, 10, 20], engine))
    assert [v.iterate.step for v in visits] == [0, 10, 20]
    assert chain_of(visits[1].iterate) == (7, 6, 5, 4, 3, 2, 1, 10, 9, 8)
    assert [v.leg_start for v in visits] == [0, 7, 7]
    assert applications([Order.parse("backward+backward@7")], 20, [0, 10, 20]) == engine.applied


@pytest.mark.parametrize("better", [True, False])
def test_conditional_legs_cost_at_most_what_was_said(better):
    engine = Recorder(lambda chain: -len(chain) if better else 0.0)
    several = [Order.parse("backward"), Order.parse("backward/10?train_loss")]
    slabs = [Slab(order, 0) for order in several]
    starts = {v.leg_start for v in walk(slabs, STEPS, range(STEPS + 1), engine) if slabs[1] in v.slabs}
    assert starts == ({0, 10, 20, 30} if better else {0})
    assert engine.applied <= applications(several, STEPS, range(STEPS + 1))
    if not better:  # then it goes the way of `backward`, and is shared whole
        assert engine.applied == STEPS * (STEPS + 1) // 2
