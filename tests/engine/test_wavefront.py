"""The wavefront gives the reference's iterates, whatever the tiling."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.conftest import last_of
from tests.test_orders import orders
from trajstore.engine import Work
from trajstore.engine.compilers import missing_for_compiling
from trajstore.engine.compiling import compiled
from trajstore.engine.reference import ReferenceEngine
from trajstore.engine.walk import Slab, walk
from trajstore.engine.wavefront import WavefrontEngine, eager, tick_of
from trajstore.operators.adam import Adam
from trajstore.operators.adamw import AdamW
from trajstore.operators.sgd import SGD
from trajstore.orders import Leg, Order
from trajstore.problems import ModuleProblem
from trajstore.problems.least_squares import LeastSquares
from trajstore.problems.quadratic import Quadratic
from trajstore.problems.regression import Regression
from trajstore.problems.two_constants import TwoConstants
from trajstore.schedules.cosine import Cosine
from trajstore.schedules.inverse_sqrt import InverseSqrt
from trajstore.schedules.step import Step
from trajstore.state import State

CPU = torch.device("cpu")
STEPS = 60


def normed() -> ModuleProblem:
    """BatchNorm with running statistics, dropout, tied weights, a convolution."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 3, 3, bias=False)  # the norm takes biases out: Adam would scale mere rounding
            self.norm = nn.BatchNorm1d(3)
            self.drop = nn.Dropout(0.2)
            self.out = nn.Linear(12, 2)
            self.back = nn.Linear(2, 12)
            self.tied = nn.Linear(12, 2)
            self.tied.weight = self.out.weight

        def forward(self, x):
            hidden = self.drop(torch.tanh(self.norm(self.conv(x)))).flatten(1)
            return self.tied(torch.tanh(self.back(self.out(hidden))))

    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 1, 6, generator=g, dtype=torch.float64), torch.randn(30, 2, generator=g, dtype=torch.float64)
    return ModuleProblem(lambda: Net().double(), nn.functional.mse_loss, (x, y), (x[:9], y[:9]), batch_size=4)


PROBLEMS = {
    "regression": Regression(width=6, depth=2, points=15, batch_size=2, dtype="float64"),
    "quadratic": Quadratic((0.5, 1.0, 1.5), rotation_seed=1),
    "two-constants": TwoConstants(),
    "least-squares": LeastSquares(n=12, d=3, batch_size=2, sampling="shuffle"),
    "normed": normed(),
}
OPERATORS = [
    SGD(0.05),
    SGD(0.02, momentum=0.9, dampening=0.1, weight_decay=0.01, schedule=InverseSqrt(warmup=5)),
    SGD(0.02, momentum=0.8, nesterov=True, schedule=Step(7), by="index"),
    Adam(0.01, schedule=Cosine(50, 5), by="index"),
    AdamW(0.01),
]


def assert_close_to_reference(problem, operator, seeds, slabs, grid, lanes, tolerance=1e-9):
    live = PROBLEMS[problem].build(CPU)
    expected = {
        (slab, v.iterate.step): v.iterate
        for v in walk(slabs, STEPS, grid, ReferenceEngine(live, operator, seeds))
        for slab in v.slabs
    }
    engine = WavefrontEngine(live, operator, seeds, lanes, eager(tick_of(live, operator, lanes)))
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
        engine = WavefrontEngine(live, operator, [(0, 0)], lanes, eager(tick_of(live, operator, lanes)))
        *_, last = walk(slabs, 40, [0, 10, 40], engine)
        finals.append(last.iterate.state)
    for other in finals[1:]:
        torch.testing.assert_close(other, finals[0], rtol=1e-12, atol=1e-12)


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
    found = losses(WavefrontEngine(live, operator, seeds, lanes, eager(tick_of(live, operator, lanes))))
    assert found == pytest.approx(expected, rel=1e-4, nan_ok=True)


class Delayed:
    """Heavy ball that remembers the last parameters themselves, handed through from the state."""

    def memory(self, params):
        return {"previous": dict(params)}

    def apply(self, gradient, state, batch, index):
        gradients, buffers = gradient(state.params, state.buffers, batch)
        previous = state.memory["previous"]
        params = {n: p + 0.5 * (p - previous[n]) - 0.05 * gradients[n] for n, p in state.params.items()}
        return State(params, buffers, {"previous": state.params}, state.position + 1)


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("compile_it", [False, True])
def test_an_operator_may_hand_its_parameters_through_as_memory(lanes, compile_it):
    if compile_it and (missing := missing_for_compiling()):
        pytest.skip(f"this machine lacks {missing}")
    live, operator = PROBLEMS["least-squares"].build(CPU), Delayed()
    tick = tick_of(live, operator, lanes)
    wave = WavefrontEngine(live, operator, [(0, 0)], lanes, compiled(tick) if compile_it else eager(tick))
    expected = last_of(ReferenceEngine(live, operator, [(0, 0)]), Leg("backward"), 20)
    torch.testing.assert_close(last_of(wave, Leg("backward"), 20).state, expected.state, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_compiled_wave_has_the_references_dropout_and_batchnorm(lanes):
    if missing := missing_for_compiling():
        pytest.skip(f"this machine lacks {missing}")
    live, operator = normed().build(CPU), Adam(0.01)
    wave = WavefrontEngine(live, operator, [(0, 0)], lanes, compiled(tick_of(live, operator, lanes)))
    expected = last_of(ReferenceEngine(live, operator, [(0, 0)]), Leg("backward"), 12)
    found = last_of(wave, Leg("backward"), 12)
    torch.testing.assert_close(found.state, expected.state, rtol=1e-9, atol=1e-11)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-8)


def test_the_consumer_of_iterates_keeps_its_gradients():
    live = PROBLEMS["quadratic"].build(CPU)
    engine = WavefrontEngine(live, SGD(0.1), [(0, 0)], 2, eager(tick_of(live, SGD(0.1), 2)))
    for _ in engine.run([Work(0, Leg("backward"), engine.start(0), range(1, 6))]):
        assert torch.is_grad_enabled()
