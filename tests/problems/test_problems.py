"""Problems: seeds, purity, the paper's data, modules with buffers and noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import last_of
from trajstore._common.keyed import keyed_uniform
from trajstore.engine.orders import Leg
from trajstore.engine.reference import ReferenceEngine
from trajstore.errors import ConfigurationError
from trajstore.operators.sgd import SGD
from trajstore.problems import NamesOfModule
from trajstore.problems._module import ModuleProblem
from trajstore.problems.batches import generator
from trajstore.problems.least_squares import LeastSquares
from trajstore.problems.quadratic import Quadratic
from trajstore.problems.regression import Regression
from trajstore.problems.two_constants import TwoConstants

CPU = torch.device("cpu")
FAMILIES = [Regression(width=5, depth=2), Quadratic((1.0, 2.0)), TwoConstants(), LeastSquares(n=12, d=3)]
IDS = [type(f).__name__ for f in FAMILIES]


@pytest.mark.parametrize("family", FAMILIES, ids=IDS)
def test_the_init_seed_alone_decides_the_start(family):
    one, same, other = (family.build(CPU).initial(seed)[0] for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", FAMILIES, ids=IDS)
def test_building_and_starting_leaves_torchs_generator_alone(family):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    family.build(CPU).initial(5)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("family", [Regression, Quadratic, TwoConstants, LeastSquares])
def test_every_problem_runs_in_both_precisions(family, dtype):
    live = family(dtype=dtype).build(CPU)
    params, buffers = live.initial(0)
    loss, _ = live.loss(params, buffers, live.batches(0)[1])
    assert loss.dtype == getattr(torch, dtype)
    metrics = live.evaluate(params, buffers)
    assert metrics.keys() == live.examples.keys()
    assert all(value.dtype == torch.float64 and value.ndim == 0 for value in metrics.values())


def test_regression_uses_the_papers_points_and_the_midpoints_between_them():
    live = Regression(curve="x^3", dtype="float64").build(CPU)
    assert live.examples == {"train_loss": 101, "test_loss": 100}
    stream = live.batches(0)
    seen = {float(stream[i][0]): float(stream[i][1]) for i in range(1, 2001)}
    grid = [-1 + 2 * i / 100 for i in range(101)]
    assert sorted(seen) == pytest.approx(grid, abs=1e-15)
    assert all(y == pytest.approx(x**3, abs=1e-15) for x, y in seen.items())


@pytest.mark.parametrize(("curve", "f"), [("x^2", lambda x: x**2), ("cos(10x)", lambda x: np.cos(10 * x))])
def test_regression_metrics_are_those_of_its_module(curve, f):
    family = Regression(curve=curve, width=7, depth=3, dtype="float64")
    params, _ = (live := family.build(CPU)).initial(2)
    module = family.module()
    module.load_state_dict(params, strict=True)
    points = np.linspace(-1, 1, 101)
    for metric, x in (("train_loss", points), ("test_loss", (points[:-1] + points[1:]) / 2)):
        outputs = module(torch.from_numpy(x)[:, None])[:, 0].detach().numpy()
        assert float(live.evaluate(params, {})[metric]) == pytest.approx(np.mean((outputs - f(x)) ** 2), rel=1e-12)


def test_the_papers_network_has_its_size():
    params, _ = Regression().build(CPU).initial(0)
    assert sum(p.numel() for p in params.values()) == 181_501


def test_least_squares_knows_its_minimiser_and_hessian():
    family = LeastSquares(n=30, d=4, ridge=0.1)
    live = family.build(CPU)
    theta = torch.from_numpy(family.minimiser)

    def full_loss(t):
        return live.evaluate({"theta": t}, {})["train_loss"]

    (gradient,) = torch.autograd.functional.jacobian(full_loss, (theta,))
    assert float(gradient.abs().max()) < 1e-14
    hessian = torch.autograd.functional.hessian(full_loss, theta)
    np.testing.assert_allclose(hessian.numpy(), family.hessian, rtol=1e-12)


def test_a_quadratics_hessian_has_the_spectrum_that_was_asked_for():
    spectrum = (0.1, 1.0, 4.0)
    rotated = Quadratic(spectrum, rotation_seed=7).hessian
    assert np.array_equal(rotated, rotated.T)
    np.testing.assert_allclose(np.linalg.eigvalsh(rotated), spectrum, rtol=1e-12)
    assert abs(rotated[0, 1]) > 1e-3


def test_the_start_is_independent_of_noise_and_data_of_the_same_seed():
    start = Quadratic().build(CPU).initial(0)[0]["theta"]
    noise = Quadratic().build(CPU).batches(0)[1][0]
    assert float(start) != float(noise)
    X, _ = LeastSquares(n=3, d=1, problem_seed=0).data
    assert float(start) not in X


class TiedBatchNorm(nn.Module):
    """Tied weights, BatchNorm with its integer counter, a buffer that is not saved, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.outer = nn.Linear(4, 4)
        self.outer.weight = self.inner.weight
        self.register_buffer("scratch", torch.ones(1), persistent=False)

    def forward(self, x):
        return self.outer(self.drop(self.norm(self.inner(x)))) * self.scratch


def module_problem() -> ModuleProblem:
    x, y = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 4
    accuracy = lambda out, y: (out.argmax(-1) == y).double().mean()  # noqa: E731
    return ModuleProblem(
        TiedBatchNorm,
        nn.functional.cross_entropy,
        (x, y),
        (x[:7], y[:7]),
        5,
        metrics={"accuracy": accuracy},
        eval_batch=3,
    )


class Masked(nn.Module):
    """Dropout written by hand: the mask of the key that is set."""

    key = torch.tensor(0)

    def forward(self, x):
        return torch.where(keyed_uniform(self.key, 0, tuple(x.shape)) >= 0.5, 2 * x, 0) if self.training else x


def test_a_module_problem_is_the_module_trained_by_hand():
    p = module_problem()
    engine = ReferenceEngine(p.build(CPU), SGD(0.1), [(3, 4)])
    last = last_of(engine, Leg("forward"), 5)
    torch.manual_seed(3)
    module = TiedBatchNorm()
    module.drop = Masked()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    stream = p.build(CPU).batches(4)
    for i in range(1, 6):
        x, y, module.drop.key = stream[i]
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    by_hand = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, value in {**last.state.params, **last.state.buffers}.items():
        torch.testing.assert_close(value, by_hand[name].detach())
    assert int(last.state.buffers["norm.num_batches_tracked"]) == 5
    x, y = p.train
    with torch.no_grad():
        outputs = module.eval()(x)
    assert last.metrics["train_loss"] == pytest.approx(float(nn.functional.cross_entropy(outputs, y)), rel=1e-5)
    assert last.metrics["train_accuracy"] == pytest.approx(float((outputs.argmax(-1) == y).double().mean()))
    assert set(last.metrics) == {"train_loss", "test_loss", "train_accuracy", "test_accuracy", "batch_loss"}


def linear(module, **changes):
    x = torch.linspace(-1, 1, 12).reshape(6, 2)
    return ModuleProblem(module, nn.functional.mse_loss, **({"train": (x, x.sum(1, keepdim=True))} | changes))


class FunctionalDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return nn.functional.dropout(self.layer(x), 0.5, self.training)


def test_functional_dropout_is_keyed_too():
    steps = []
    for _ in range(2):
        torch.rand(3)  # whatever else the process draws
        engine = ReferenceEngine(linear(FunctionalDropout, batch_size=4).build(CPU), SGD(0.1), [(0, 1)])
        steps.append(last_of(engine, Leg("backward"), 5).state.params["layer.weight"])
    assert torch.equal(*steps)


class Shared(nn.Module):
    """One dropout module used twice, and its rate read by hand."""

    def __init__(self):
        super().__init__()
        self.layer, self.drop = nn.Linear(2, 50), nn.Dropout(0.5)

    def forward(self, x):
        assert self.drop.p == 0.5
        self.masks = [self.drop(torch.ones(4, 50)) > 0 for _ in range(2)]
        return (self.drop(self.layer(x))).sum(-1, keepdim=True)


def test_a_dropout_module_that_is_used_twice_draws_twice():
    live = linear(Shared).build(CPU)
    params, buffers = live.initial(0)
    live.loss(params, buffers, live.batches(0)[1])
    first, second = live._module.masks
    assert not torch.equal(first, second)
    live.loss(params, buffers, live.batches(0)[1])
    assert torch.equal(live._module.masks[0], first)


def test_a_dropout_of_your_own_stays_your_own():
    class Louder(nn.Dropout):
        def forward(self, x):
            return 100 * x

    plain, louder = (
        linear(lambda d=d: nn.Sequential(nn.Linear(2, 1), d)).build(CPU) for d in (nn.Identity(), Louder())
    )
    params, buffers = plain.initial(0)
    x, _ = plain.batches(0)[1]
    outputs = [live._call(params, buffers, x) for live in (plain, louder)]
    torch.testing.assert_close(outputs[1], 100 * outputs[0])


def test_frozen_and_unused_parameters_are_left_alone():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.used, self.unused = (nn.Linear(2, 1) for _ in range(3))
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.frozen(x) + self.used(x)

    engine = ReferenceEngine(linear(Partly).build(CPU), SGD(0.1, momentum=0.9), [(0, 0)])
    start, end = engine.start(0).state, last_of(engine, Leg("forward"), 4).state
    assert torch.equal(start.buffers["frozen.weight"], end.buffers["frozen.weight"])
    assert torch.equal(start.params["unused.weight"], end.params["unused.weight"])
    assert not torch.equal(start.params["used.weight"], end.params["used.weight"])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_module_problem_can_be_cast(dtype):
    live = linear(lambda: nn.Linear(2, 1), dtype=dtype).build(CPU)
    params, buffers = live.initial(0)
    assert params["weight"].dtype == getattr(torch, dtype)
    assert live.loss(params, buffers, live.batches(0)[1])[0].dtype == getattr(torch, dtype)


def test_dropout_is_keyed_by_data_seed_and_index():
    engine = ReferenceEngine(module_problem().build(CPU), SGD(0.1), [(0, 1)])
    chains = [last_of(engine, Leg("backward"), 4).state.params["inner.bias"] for _ in range(2)]
    assert torch.equal(*chains)
    other = ReferenceEngine(module_problem().build(CPU), SGD(0.1), [(0, 2)])
    assert not torch.equal(chains[0], last_of(other, Leg("backward"), 4).state.params["inner.bias"])


def test_a_module_problem_names_tied_and_transient_tensors():
    live = module_problem().build(CPU)
    assert isinstance(live, NamesOfModule)
    assert live.tied == {"outer.weight": "inner.weight"}
    assert live.transient == {"scratch"}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Regression(width=0), "width 0"),
        (lambda: Regression(batch_size=0), "batch_size is 0"),
        (lambda: Regression(sampling="shuffle", batch_size=102), "larger than an epoch of 101"),
        (lambda: Quadratic(spectrum=()), "at least one"),
        (lambda: Quadratic(noise=-1.0), "noise is -1.0"),
        (lambda: LeastSquares(d=0), "d = 0"),
        (lambda: Quadratic(rotation_seed=-1).build(CPU), "seed -1 must be"),
        (lambda: linear(nn.Identity).build(CPU), "no parameter to train"),
        (lambda: linear(lambda: nn.LazyLinear(1)).build(CPU), "lazy layers"),
        (lambda: linear(lambda: nn.Linear(3, 1)).build(CPU), "fails on its first batch: RuntimeError"),
        (lambda: linear(lambda: nn.Linear(2, 1), eval_batch=0), "eval_batch is 0"),
        (lambda: linear(lambda: nn.Linear(2, 1), train=torch.ones(3, 2)), "give a pair"),
        (
            lambda: linear(lambda: nn.Linear(2, 1), metrics={"each": lambda out, y: (out - y)[:, 0]}).build(CPU),
            "'each' gives",
        ),
        (
            lambda: ModuleProblem(TiedBatchNorm, nn.functional.mse_loss, (torch.ones(3, 1), torch.ones(2, 1))),
            "3 inputs and 2",
        ),
    ],
)
def test_problems_that_make_no_sense_are_refused(make, says):
    with pytest.raises(ConfigurationError, match=says):
        make()


def test_keyed_noise_is_uniform_and_independent_of_its_neighbours():
    keys = generator(0, "noise").integers(2**62, size=200)
    draws = torch.stack([keyed_uniform(torch.tensor(int(k)), 1, (500,)) for k in keys]).double().numpy()
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert ((counts - 5000) ** 2 / 5000).sum() < 43.8  # 99.9% of χ² with 19 degrees of freedom
    centred = draws - 0.5
    for other in (np.roll(centred, 1, axis=0), np.roll(centred, 1, axis=1)):  # the next key, the next position
        assert abs((centred * other).mean() * 12) < 4 / np.sqrt(draws.size)
    assert not torch.equal(keyed_uniform(torch.tensor(1), 0, (8,)), keyed_uniform(torch.tensor(1), 1, (8,)))
