"""The second-order expansions of the paper's Appendices C and D, in float64 on smooth networks.

What they leave out is of order h³: errors at smaller and smaller h tell the order.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from uuid import uuid4

import numpy as np
import pytest
import torch
from torch import nn

import trajstore as ts
from tests.conftest import stop_after
from trajstore.engine import Work, bracket
from trajstore.engine.compiled_tick import Compiled
from trajstore.engine.orders import Leg
from trajstore.engine.reference import ReferenceEngine, gradient_of
from trajstore.engine.ticks import Eager, step_of
from trajstore.engine.toolchain import missing_for_compiling
from trajstore.engine.wavefront import WavefrontEngine
from trajstore.errors import ConfigurationError
from trajstore.operators.order_mean import OrderMean
from trajstore.operators.order_regularized import OrderRegularized
from trajstore.operators.sgd import SGD
from trajstore.operators.state import beginning
from trajstore.problems._module import ModuleProblem

STEPS = [0.05 / 2**k for k in range(6)]


class Net:
    """A random smooth network and batches for it; vectors are dicts of tensors."""

    def __init__(self, seed, batches, batch_size=3):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(batches * batch_size, n, generator=generator, dtype=torch.float64) for n in (3, 2))
        self.batches = [(x[k::batches], y[k::batches]) for k in range(batches)]
        self.whole = tuple(torch.cat([b[j] for b in self.batches]) for j in range(2))
        self.problem = ModuleProblem(
            lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)),
            nn.functional.mse_loss, train=(x, y), batch_size=batches * batch_size, dtype="float64",
        )  # fmt: skip
        live = self.problem.build(torch.device("cpu"))
        self.start = live.initial(seed)[0]
        self.gradient = gradient_of(live)

    def field(self, batch, at=None):
        """V = −∇L."""
        gradients, _ = self.gradient(at or self.start, {}, batch)
        return {name: -g for name, g in gradients.items()}

    def bent(self, i, j):
        """V'_i V_j: two signs, so it is H_i ∇L_j."""
        direction, _ = self.gradient(self.start, {}, self.batches[j])
        return self.gradient.along(self.start, {}, self.batches[i], direction)

    def composed(self, order, h):
        """Apply T_order[0] first."""
        theta = self.start
        for i in order:
            theta = plus(theta, h, self.field(self.batches[i], theta))
        return theta


def plus(a, scale, b):
    return {name: a[name] + scale * b[name] for name in a}


def total(vectors):
    vectors = list(vectors)
    return {name: sum(v[name] for v in vectors) for name in vectors[0]}


def gap(a, b):
    return float(torch.sqrt(sum(((a[name] - b[name]) ** 2).sum() for name in a)))


def order_of(error):
    """The exponent by which an error falls with h."""
    return np.polyfit(np.log(STEPS), np.log([error(h) for h in STEPS]), 1)[0]


@pytest.mark.parametrize(("seed", "n"), [(0, 2), (1, 3), (2, 4), (3, 5), (4, 6)])
def test_lemma_c1_composition_to_second_order(seed, n):
    """T_1 ⋯ T_n = 1 + hΣV + h² Σ_{u<v} V'_uV_v + O(h³): the last is applied first."""
    net = Net(seed, n)
    first = total(net.field(b) for b in net.batches)
    second = total(net.bent(u, v) for u in range(n) for v in range(u + 1, n))

    def error(h):
        return gap(net.composed(range(n - 1, -1, -1), h), plus(plus(net.start, h, first), h**2, second))

    assert order_of(error) == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize(("seed", "n"), [(0, 2), (1, 4), (2, 6)])
def test_theorem_c2_backward_is_forward_and_the_brackets(seed, n):
    net = Net(seed, n)
    pairs = [(u, v) for u in range(n) for v in range(u + 1, n)]
    brackets = plus(total(net.bent(u, v) for u, v in pairs), -1, total(net.bent(v, u) for u, v in pairs))

    def error(h):
        return gap(net.composed(range(n - 1, -1, -1), h), plus(net.composed(range(n), h), h**2, brackets))

    assert order_of(error) == pytest.approx(3, abs=0.1)
    without = order_of(lambda h: gap(net.composed(range(n - 1, -1, -1), h), net.composed(range(n), h)))
    assert without == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(("seed", "c"), [(0, 2), (1, 3), (2, 4)])
def test_d1_small_batches_are_a_large_one_and_a_term_with_i_after_j(seed, c):
    """The paper prints i < j, which belongs to the reversed order: with it the error is of order 2."""
    net = Net(seed, c)
    large = net.field(net.whole)

    def error(h, pairs):
        term = total(net.bent(i, j) for i, j in pairs)
        return gap(net.composed(range(c), h / c), plus(plus(net.start, h, large), (h / c) ** 2, term))

    pairs = [(i, j) for i in range(c) for j in range(i)]
    assert order_of(lambda h: error(h, pairs)) == pytest.approx(3, abs=0.1)
    assert order_of(lambda h: error(h, [(j, i) for i, j in pairs])) == pytest.approx(2, abs=0.1)


def parts_of(net, c):
    """The batches of a net as the parts of one batch."""
    return tuple(torch.cat([b[j] for b in net.batches]) for j in range(2))


def stepped(net, operator, h, batch):
    with torch.no_grad():
        state = beginning(net.start, {}, operator(h).memory(net.start))
        return operator(h).apply(net.gradient, state, batch, torch.tensor(1)).params


@pytest.mark.parametrize("c", [2, 3, 4])
def test_the_mean_over_orders_is_the_mean_over_orders(c):
    net = Net(c, c)
    found = stepped(net, lambda h: OrderMean(h, c), 0.1, parts_of(net, c))
    orders = list(permutations(range(c)))
    expected = plus(net.start, 0, net.start)
    expected = {n: sum(net.composed(o, 0.1 / c)[n] for o in orders) / len(orders) for n in expected}
    assert gap(found, expected) < 1e-14


@pytest.mark.parametrize("c", [2, 3, 4])
def test_d2_the_mean_over_orders_prefers_none_to_second_order(c):
    net = Net(10 + c, c)
    large = net.field(net.whole)
    term = total(net.bent(i, j) for i in range(c) for j in range(c) if i != j)

    def error(h):
        mean = stepped(net, lambda h: OrderMean(h, c), h, parts_of(net, c))
        return gap(mean, plus(plus(net.start, h, large), 0.5 * (h / c) ** 2, term))

    assert order_of(error) == pytest.approx(3, abs=0.1)

    def of_operators(h):
        mean = stepped(net, lambda h: OrderMean(h, c), h, parts_of(net, c))
        return gap(mean, stepped(net, lambda h: OrderRegularized(h, c, strength=0.5 / c**2), h, parts_of(net, c)))

    assert order_of(of_operators) == pytest.approx(3, abs=0.1)


def test_the_regularized_step_is_what_it_says():
    net, h, strength = Net(5, 3), 0.1, 2.0
    term = total(net.bent(i, j) for i in range(3) for j in range(3) if i != j)
    expected = plus(plus(net.start, h, net.field(net.whole)), strength * h**2, term)
    found = stepped(net, lambda h: OrderRegularized(h, 3, strength=strength), h, parts_of(net, 3))
    assert gap(found, expected) < 1e-14
    plain = stepped(net, lambda h: OrderRegularized(h, 3, strength=0.0), h, parts_of(net, 3))
    assert gap(plain, stepped(net, SGD, h, parts_of(net, 3))) < 1e-15


def test_many_parts_have_orders_drawn_for_each_index():
    net = Net(6, 6)
    batch, operator = parts_of(net, 6), OrderMean(0.1, 6, samples=400)
    state = beginning(net.start, {}, {})
    with torch.no_grad():
        one, again, other = (operator.apply(net.gradient, state, batch, torch.tensor(i)).params for i in (1, 1, 2))
    assert gap(one, again) == 0
    assert gap(one, other) > 0
    exact = {n: torch.zeros_like(p) for n, p in net.start.items()}
    for order in permutations(range(6)):
        exact = plus(exact, 1 / 720, net.composed(order, 0.1 / 6))
    spread = gap(net.composed(range(6), 0.1 / 6), exact)
    assert gap(one, exact) < 0.2 * spread


OPERATORS = {
    "mean of 2": OrderMean(0.05, 2), "mean of 3": OrderMean(0.05, 3),
    "mean of 6, sampled": OrderMean(0.05, 6, samples=3), "regularized": OrderRegularized(0.05, 3, strength=2.0),
}  # fmt: skip


def ends(engine):
    works = [Work(0, Leg(kind), engine.start(0), [4]) for kind in ("forward", "backward")]
    return [iterate.state for _, (_, iterate) in sorted(enumerate(engine.run(works)), key=lambda found: found[1][0])]


def every_engine_agrees(operator, advance_of):
    net = Net(7, 1, batch_size=24)
    problem = replace(net.problem, batch_size=6).build(torch.device("cpu"))
    wave = WavefrontEngine(problem, operator, [(0, 0)], 3, advance_of(step_of(problem, operator, 3)))
    for plain, waved in zip(ends(ReferenceEngine(problem, operator, [(0, 0)])), ends(wave), strict=True):
        assert gap(plain.params, waved.params) < 1e-13
        assert int(waved.position) == 4


@pytest.mark.parametrize("name", OPERATORS)
def test_every_engine_computes_them(name):
    every_engine_agrees(OPERATORS[name], Eager)


@pytest.mark.skipif(bool(missing_for_compiling()), reason="there is no compiler")
def test_products_with_hessians_can_be_compiled():
    every_engine_agrees(OPERATORS["regularized"], Compiled)


def recorded(tmp_path, problem, lr, orders, steps=6, engine="reference", **more):
    table = {"name": "b", "problem": problem, "operator": {"family": "sgd", "lr": lr}, "steps": steps, "orders": orders}
    return ts.run(ts.Experiment.of({**table, **more}), tmp_path / f"{uuid4().hex}.zarr", engine=engine).dataset()


def small_net(batch_size=2, **more):
    net = Net(8, 1, batch_size=10)
    return replace(net.problem, batch_size=batch_size, **more)


def test_corollary_c4_the_recursion_is_the_double_sum(tmp_path):
    problem = small_net()
    ds = recorded(tmp_path, problem, 0.1, ["forward", "bracket"])
    live, net = problem.build(torch.device("cpu")), Net(0, 1)
    net.gradient, net.start = gradient_of(live), live.initial(0)[0]
    for n in range(1, 7):
        net.batches = [live.batches(0)[i] for i in range(1, n + 1)]
        pairs = [(u, v) for u in range(n) for v in range(u + 1, n)]
        zero = {name: torch.zeros_like(p) for name, p in net.start.items()}
        sums = [total([zero, *(net.bent(*pair) for pair in some)]) for some in (pairs, [(v, u) for u, v in pairs])]
        forward = ds.traj.state_dict(order="forward", seed=0, step=n)
        expected = plus(forward, 0.1**2, plus(sums[0], -1, sums[1]))
        assert gap(ds.traj.state_dict(order="bracket", seed=0, step=n), expected) < 1e-10


def test_the_bracket_is_near_backward_to_third_order(tmp_path):
    errors = []
    for h in STEPS[:4]:
        ds = recorded(tmp_path, small_net(), h, ["backward", "bracket"])
        errors.append(gap(*(ds.traj.state_dict(order=order, seed=0, step=6) for order in ("backward", "bracket"))))
    assert np.polyfit(np.log(STEPS[:4]), np.log(errors), 1)[0] == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("sampling", ["iid", "shuffle"])
def test_examples_drawn_often_are_weighted(tmp_path, monkeypatch, sampling):
    """One product with the Hessian of distinct examples is the sum over the earlier batches."""
    problem = small_net(batch_size=5, sampling=sampling)
    ds = recorded(tmp_path, problem, 0.1, ["bracket"], steps=8)
    monkeypatch.setattr(bracket, "_is_a_mean", lambda *_: False)
    plain = recorded(tmp_path, problem, 0.1, ["bracket"], steps=8)
    assert float(np.abs(ds["params"] - plain["params"]).max()) < 1e-14


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_loss_that_is_a_sum_is_not_taken_for_a_mean(tmp_path, monkeypatch, batch_size):
    """Of batches of one example, a sum looks like a mean; of several batches together it does not."""
    problem = small_net(batch_size, loss=lambda out, y: (out - y).square().sum())
    ds = recorded(tmp_path, problem, 0.02, ["bracket"], steps=8)
    monkeypatch.setattr(bracket, "_is_a_mean", lambda *_: False)
    plain = recorded(tmp_path, problem, 0.02, ["bracket"], steps=8)
    assert float(np.abs(ds["params"] - plain["params"]).max()) < 1e-14


def test_parts_of_a_batch_that_draws_at_random_are_refused(tmp_path):
    with_dropout = small_net(
        4, module=lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    )
    for family in ("order-mean", "order-regularized"):
        with pytest.raises(ConfigurationError, match=f"operator {family}: the model draws at random, as dropout does"):
            recorded(tmp_path, with_dropout, 0.1, ["forward"], operator={"family": family, "lr": 0.1})


def test_a_loss_that_looks_at_the_batch_as_a_whole_is_not_taken_apart():
    live = small_net(4).build(torch.device("cpu"))
    state = beginning(*live.initial(0), {})
    assert bracket._is_a_mean(live, live.batches(0)[1], state)
    normed = small_net(4, module=lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    together = small_net(4, loss=lambda out, y: (out - y).square().mean().sqrt())
    for problem in (normed, together):
        live = problem.build(torch.device("cpu"))
        assert not bracket._is_a_mean(live, live.batches(0)[1], beginning(*live.initial(0), {}))


def test_brackets_can_begin_anywhere_and_every_engine_computes_them(tmp_path):
    orders = ["forward", "bracket", "bracket/4", "forward+bracket@3", "backward/3", "bracket/2?train_loss"]
    plain, waved = (
        recorded(tmp_path, small_net(), 0.1, orders, steps=10, seeds=[0, 1], engine=engine)
        for engine in ("reference", "wavefront")
    )
    assert float(np.abs(plain["params"] - waved["params"]).max()) < 1e-13
    # A leg that has begun anew has made one step like any other, and then differs.
    first, anew = (plain["params"].sel(order=order, seed=1) for order in ("bracket", "bracket/4"))
    assert np.array_equal(first.sel(snapshot=slice(4)), anew.sel(snapshot=slice(4)))
    assert float(np.abs(first.values - anew.values)[:, 6].max()) > 1e-6
    later, forward = (plain["params"].sel(order=order, seed=1) for order in ("forward+bracket@3", "forward"))
    assert np.array_equal(later.sel(snapshot=slice(4)), forward.sel(snapshot=slice(4)))
    assert 0 < float(np.abs(later.values - forward.values)[:, 6].max()) < 0.1


def test_a_bracket_goes_on_where_it_was_stopped(tmp_path):
    experiment = ts.Experiment.of(
        {"name": "b", "problem": small_net(), "operator": {"family": "sgd", "lr": 0.1}, "steps": 12,
         "orders": ["bracket/5", "forward"]}
    )  # fmt: skip
    whole = ts.run(experiment, tmp_path / "whole.zarr", engine="reference").dataset()
    with pytest.raises(KeyboardInterrupt):
        ts.run(experiment, tmp_path / "s.zarr", engine="reference", progress=stop_after(50))
    gone_on = ts.run(experiment, tmp_path / "s.zarr", engine="reference", resume=True).dataset()
    assert whole["params"].equals(gone_on["params"])


def test_brackets_are_of_plain_sgd(tmp_path):
    with pytest.raises(ConfigurationError, match="bracket legs are defined only for SGD with a constant"):
        recorded(tmp_path, "quadratic", 0.1, ["bracket"], operator={"family": "sgd", "lr": 0.1, "momentum": 0.9})
    ds = recorded(tmp_path, "quadratic", 0.01, ["backward", "bracket"], steps=10)
    far = np.abs(ds["params"].sel(order="backward") - ds["params"].sel(order="bracket"))
    assert float(far.max()) < 1e-3  # noise is no examples: the sum over batches


def test_batches_that_cannot_be_cut_are_refused_before_anything_is_recorded(tmp_path):
    def asked(problem, operator):
        return ts.Experiment.of({"name": "n", "steps": 2, "problem": problem, "operator": operator})

    rows = {"family": "least-squares", "batch_size": 8}
    with pytest.raises(ConfigurationError, match=r"parts is 3 and does not divide the batch size 8; .* is 9"):
        ts.run(asked(rows, {"family": "order-mean", "lr": 0.1, "parts": 3}), tmp_path / "s.zarr")
    with pytest.raises(ConfigurationError, match="batches of this problem hold no examples"):
        ts.run(asked("quadratic", {"family": "order-regularized", "lr": 0.1}), tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()
    with pytest.raises(ConfigurationError, match="operator order-mean: parts is 1; it must be at least 2"):
        OrderMean(0.1, 1)
