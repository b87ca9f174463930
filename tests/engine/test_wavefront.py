"""The wavefront gives the reference's iterates, whatever the tiling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.conftest import last_of
from tests.engine.problems import HANDING, OPERATORS, PROBLEMS, Delayed, normed
from tests.engine.test_orders import orders
from trajstore.engine import Work
from trajstore.engine.compiled_tick import Compiled
from trajstore.engine.orders import Leg, Order
from trajstore.engine.reference import ReferenceEngine
from trajstore.engine.ticks import Eager, step_of
from trajstore.engine.toolchain import missing_for_compiling
from trajstore.engine.walk import Slab, walk
from trajstore.engine.wavefront import WavefrontEngine
from trajstore.operators.adam import Adam
from trajstore.operators.sgd import SGD
from trajstore.problems._streams import stacked
from trajstore.problems.quadratic import Quadratic

CPU = torch.device("cpu")
STEPS = 60


def assert_close_to_reference(problem, operator, seeds, slabs, grid, lanes, tolerance=1e-9):
    live = PROBLEMS[problem].build(CPU)
    expected = {
        (slab, v.iterate.step): v.iterate
        for v in walk(slabs, STEPS, grid, ReferenceEngine(live, operator, seeds))
        for slab in v.slabs
    }
    engine = WavefrontEngine(live, operator, seeds, lanes, Eager(step_of(live, operator, lanes)))
    found: dict[Slab, list[int]] = {slab: [] for slab in slabs}
    for visit in walk(slabs, STEPS, grid, engine):
        for slab in visit.slabs:
            n, state, metrics = visit.iterate
            found[slab].append(n)
            reference = expected[slab, n]
            torch.testing.assert_close(state, reference.state, rtol=tolerance, atol=tolerance)
            assert metrics == pytest.approx(reference.metrics, rel=100 * tolerance, abs=tolerance)
    assert all(steps == list(grid) for steps in found.values())


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(list(PROBLEMS)),
    st.sampled_from(OPERATORS),
    st.lists(orders().filter(lambda o: all(leg.start < STEPS for leg in o.legs)), min_size=1, max_size=2, unique=True),
    st.sets(st.integers(1, STEPS), max_size=8).map(lambda s: sorted({0, STEPS} | s)),
    st.integers(1, 9),
)
def test_any_orders_operators_widths_and_grids_give_the_references_iterates(problem, operator, several, grid, lanes):
    assume(all(order.metrics <= {"train_loss"} for order in several))
    seeds = [(3, 3), (0, 8)]
    assert_close_to_reference(
        problem, operator, seeds, [Slab(order, k) for order in several for k in (0, 1)], grid, lanes
    )


def test_the_result_does_not_depend_on_the_width():
    live = PROBLEMS["normed"].build(CPU)
    operator = SGD(0.05, momentum=0.9)
    slabs = [Slab(Order.parse("backward"), 0)]
    finals = []
    for lanes in (1, 3, 16):
        engine = WavefrontEngine(live, operator, [(0, 0)], lanes, Eager(step_of(live, operator, lanes)))
        *_, last = walk(slabs, 40, [0, 10, 40], engine)
        finals.append(last.iterate.state)
    for other in finals[1:]:
        torch.testing.assert_close(other, finals[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_problem_may_measure_nothing(lanes):
    live = PROBLEMS["normed"].build(CPU)
    live.evaluate = lambda params, buffers: {}
    engine = WavefrontEngine(live, SGD(0.05), [(0, 0)], lanes, Eager(step_of(live, SGD(0.05), lanes)))
    assert engine.start(0).metrics == {}
    assert [sorted(it.metrics) for _, it in engine.run([Work(0, Leg("backward"), engine.start(0), [1, 2, 3])])] == [
        ["batch_loss"]
    ] * 3


@pytest.mark.parametrize("lanes", [1, 4])
def test_a_chain_that_diverges_leaves_the_others_alone(lanes):
    live = Quadratic(dtype="float32").build(CPU)
    operator = SGD(1e3)  # grows a thousandfold a step: float32 overflows within 15
    seeds = [(0, 0), (1, 1)]
    slabs = [Slab(Order.parse(label), k) for label in ("forward", "backward", "backward/5") for k in (0, 1)]

    def losses(engine):
        visits = walk(slabs, 40, range(41), engine)
        return {(str(s), v.iterate.step): v.iterate.metrics["train_loss"] for v in visits for s in v.slabs}

    expected = losses(ReferenceEngine(live, operator, seeds))
    finite = [math.isfinite(loss) for loss in expected.values()]
    assert any(finite)
    assert not all(finite)
    found = losses(WavefrontEngine(live, operator, seeds, lanes, Eager(step_of(live, operator, lanes))))
    assert found == pytest.approx(expected, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("compile_it", [False, True])
def test_an_operator_may_hand_its_parameters_through_as_memory(lanes, compile_it):
    if compile_it and (missing := missing_for_compiling()):
        pytest.skip(f"this machine lacks {missing}")
    live, operator = PROBLEMS["least-squares"].build(CPU), Delayed()
    step = step_of(live, operator, lanes)
    wave = WavefrontEngine(live, operator, [(0, 0)], lanes, Compiled(step) if compile_it else Eager(step))
    expected = last_of(ReferenceEngine(live, operator, [(0, 0)]), Leg("backward"), 20)
    torch.testing.assert_close(last_of(wave, Leg("backward"), 20).state, expected.state, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("operator", HANDING, ids=lambda operator: type(operator).__name__)
def test_whatever_an_operator_hands_through_stays_what_it_was(operator, lanes):
    live = PROBLEMS["regression"].build(CPU)
    wave = WavefrontEngine(live, operator, [(0, 0)], lanes, Eager(step_of(live, operator, lanes)))
    expected = last_of(ReferenceEngine(live, operator, [(0, 0)]), Leg("backward"), 20)
    torch.testing.assert_close(last_of(wave, Leg("backward"), 20).state, expected.state, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_compiled_wave_has_the_references_dropout_and_batchnorm(lanes):
    if missing := missing_for_compiling():
        pytest.skip(f"this machine lacks {missing}")
    live, operator = normed().build(CPU), Adam(0.01)
    wave = WavefrontEngine(live, operator, [(0, 0)], lanes, Compiled(step_of(live, operator, lanes)))
    expected = last_of(ReferenceEngine(live, operator, [(0, 0)]), Leg("backward"), 12)
    found = last_of(wave, Leg("backward"), 12)
    torch.testing.assert_close(found.state, expected.state, rtol=1e-9, atol=1e-11)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-8)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_batches_of_a_block_are_the_streams_own_bit_for_bit(problem):
    live = PROBLEMS[problem].build(CPU)
    streams = [live.batches(seed) for seed in (0, 7, 3)]
    rng = np.random.default_rng(0)
    seeds, indices = rng.integers(0, 3, 50), rng.integers(1, 40, 50)
    together = stacked(streams, seeds, indices)
    for row, (k, i) in enumerate(zip(seeds, indices, strict=True)):
        assert all(torch.equal(t[row], one) for t, one in zip(together, streams[k][int(i)], strict=True))


def test_the_consumer_of_iterates_keeps_its_gradients():
    live = PROBLEMS["quadratic"].build(CPU)
    engine = WavefrontEngine(live, SGD(0.1), [(0, 0)], 2, Eager(step_of(live, SGD(0.1), 2)))
    for _ in engine.run([Work(0, Leg("backward"), engine.start(0), range(1, 6))]):
        assert torch.is_grad_enabled()
