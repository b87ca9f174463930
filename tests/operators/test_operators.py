"""Operators equal torch.optim, and count what they say they count."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from tests.conftest import last_of
from trajstore.engine import Work
from trajstore.engine.orders import Leg
from trajstore.engine.reference import ReferenceEngine
from trajstore.errors import ConfigurationError
from trajstore.operators import Operator
from trajstore.operators.adam import Adam
from trajstore.operators.adamw import AdamW
from trajstore.operators.schedules.cosine import Cosine
from trajstore.operators.schedules.inverse_sqrt import InverseSqrt
from trajstore.operators.schedules.step import Step
from trajstore.operators.sgd import SGD
from trajstore.operators.state import State
from trajstore.problems._module import ModuleProblem

STEPS = 50


def problem(dtype: torch.dtype) -> ModuleProblem:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 3, generator=generator, dtype=dtype)
    y = torch.randn(20, 2, generator=generator, dtype=dtype)
    module = lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)  # noqa: E731
    return ModuleProblem(module, nn.functional.mse_loss, train=(x, y), batch_size=4)


def ours(operator: Operator, dtype: torch.dtype) -> State:
    engine = ReferenceEngine(problem(dtype).build(torch.device("cpu")), operator, [(5, 9)])
    last = last_of(engine, Leg("forward"), STEPS)
    return last.state


def theirs(make, dtype: torch.dtype, schedule=None) -> nn.Module:
    p = problem(dtype)
    live = p.build(torch.device("cpu"))
    torch.manual_seed(5)
    module = p.module()
    optimizer = make(module.parameters())
    scheduler = schedule(optimizer) if schedule else None
    stream = live.batches(9)
    for i in range(1, STEPS + 1):
        x, y = stream[i]
        optimizer.zero_grad()
        p.loss(module(x), y).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
    return module


CASES = {
    "sgd": (SGD(0.05), lambda p: torch.optim.SGD(p, 0.05)),
    "weight decay": (SGD(0.05, weight_decay=0.1), lambda p: torch.optim.SGD(p, 0.05, weight_decay=0.1)),
    "momentum": (SGD(0.02, momentum=0.9), lambda p: torch.optim.SGD(p, 0.02, momentum=0.9)),
    "dampening": (
        SGD(0.02, momentum=0.9, dampening=0.5),
        lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, dampening=0.5),
    ),
    "nesterov": (
        SGD(0.02, momentum=0.9, weight_decay=0.01, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, weight_decay=0.01, nesterov=True),
    ),
    "adam": (Adam(0.01), lambda p: torch.optim.Adam(p, 0.01)),
    "adam with decay": (
        Adam(0.01, 0.8, 0.99, 1e-6, 0.1),
        lambda p: torch.optim.Adam(p, 0.01, (0.8, 0.99), 1e-6, weight_decay=0.1),
    ),
    "adamw": (AdamW(0.01, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_equal_to_torch_optim_over_50_steps(case: str, dtype: torch.dtype, rtol: float):
    operator, make = CASES[case]
    expected = theirs(make, dtype)
    for name, value in ours(operator, dtype).params.items():
        torch.testing.assert_close(value, expected.get_parameter(name).detach(), rtol=rtol, atol=rtol)


SCHEDULES = {
    "step": (Step(every=7, gamma=0.5), lambda o: torch.optim.lr_scheduler.StepLR(o, 7, 0.5)),
    "cosine": (Cosine(total=40), lambda o: torch.optim.lr_scheduler.LambdaLR(o, half_cosine)),
    "inverse sqrt": (InverseSqrt(), lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: (k + 1) ** -0.5)),
    "warm-up": (
        InverseSqrt(warmup=10),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: min((k + 1) / 10, (10 / (k + 1)) ** 0.5)),
    ),
}


def half_cosine(k: int) -> float:
    return float(0.5 * (1 + torch.cos(torch.tensor(min(k, 40) / 40 * torch.pi, dtype=torch.float64))))


@pytest.mark.parametrize("case", SCHEDULES)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_schedules_equal_torch_schedulers(case: str, base: str):
    schedule, make_schedule = SCHEDULES[case]
    operator = SGD(0.05, schedule=schedule) if base == "sgd" else AdamW(0.01, weight_decay=0.1, schedule=schedule)
    make = (
        (lambda p: torch.optim.SGD(p, 0.05))
        if base == "sgd"
        else (lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1))
    )
    expected = theirs(make, torch.float64, make_schedule)
    for name, value in ours(operator, torch.float64).params.items():
        torch.testing.assert_close(value, expected.get_parameter(name).detach(), rtol=1e-11, atol=1e-13)


def test_cosine_with_warm_up_reaches_its_end_and_stays():
    factors = [float(Cosine(total=20, warmup=4, final=0.1).factor(torch.tensor(k))) for k in range(30)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[20:] == pytest.approx([0.1] * 10)
    assert all(a > b for a, b in pairwise(factors[4:21]))


def lengths_of_steps(by: str, leg: Leg) -> list[float]:
    """The learning rates of a chain, read off constant gradients."""
    operator = SGD(1.0, schedule=InverseSqrt(), by=by)
    state = State({"x": torch.zeros(1, dtype=torch.float64)}, {}, {}, torch.tensor(0))
    gradient = lambda params, buffers, batch: ({"x": torch.ones(1, dtype=torch.float64)}, {})  # noqa: E731
    rates = []
    for i in leg.chain(5):
        after = operator.apply(gradient, state, (), torch.tensor(i))
        rates.append(float(state.params["x"] - after.params["x"]))
        state = after
    return rates


def test_schedules_follow_the_position_in_the_chain_or_the_batch_index():
    by_count = [k**-0.5 for k in range(1, 6)]
    assert lengths_of_steps("position", Leg("forward")) == pytest.approx(by_count)
    assert lengths_of_steps("position", Leg("backward")) == pytest.approx(by_count)
    assert lengths_of_steps("index", Leg("forward")) == pytest.approx(by_count)
    assert lengths_of_steps("index", Leg("backward")) == pytest.approx(by_count[::-1])


def test_bias_corrections_follow_position_or_index():
    gradient = lambda params, buffers, batch: ({"x": torch.ones(1, dtype=torch.float64)}, {})  # noqa: E731
    params = {"x": torch.zeros(1, dtype=torch.float64)}
    for by, t in (("position", 1), ("index", 8)):
        adam = Adam(1.0, 0.9, 0.99, 0.0, by=by)
        state = adam.apply(gradient, State(params, {}, adam.memory(params), torch.tensor(0)), (), torch.tensor(8))
        expected = -(0.1 / (1 - 0.9**t)) / (0.01 / (1 - 0.99**t)) ** 0.5
        assert float(state.params["x"]) == pytest.approx(expected, rel=1e-12)


def test_operators_change_nothing_in_place():
    engine = ReferenceEngine(problem(torch.float64).build(torch.device("cpu")), SGD(0.1, momentum=0.9), [(0, 0)])
    start = engine.start(0)
    before = {name: p.clone() for name, p in start.state.params.items()}
    list(engine.run([Work(0, Leg("forward"), start, [3])]))
    assert all(torch.equal(start.state.params[name], p) for name, p in before.items())
    assert all(not m.any() for m in start.state.memory["momentum_buffer"].values())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SGD(-1.0), "lr is -1.0"),
        (lambda: SGD(float("nan")), "lr is nan"),
        (lambda: SGD(float("inf")), "lr is inf"),
        (lambda: SGD(0.1, momentum=1.0), r"momentum is 1.0.*\[0.0, 1.0\)"),
        (lambda: SGD(0.1, nesterov=True), "nesterov needs a momentum"),
        (lambda: Adam(beta2=1.0), "beta2 is 1.0"),
        (lambda: AdamW(weight_decay=-0.1), "weight_decay is -0.1"),
        (lambda: Cosine(total=3, warmup=3), "warmup 3"),
        (lambda: Step(every=0), "at least 1"),
        (lambda: InverseSqrt(warmup=-1), "cannot be negative"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(make, says: str):
    with pytest.raises(ConfigurationError, match=says):
        make()
