"""Factors, exponents and bounds on problems where they are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from trajstore.analysis import contraction, convergence, lyapunov
from trajstore.analysis.contracting import lemma_factor, limit_bound
from trajstore.analysis.products import Growth, directions, exponent_of
from trajstore.analysis.states import norm

from tests.analysis import processes
from tests.analysis.processes import ar1, products_of
from trajstore.errors import ConfigurationError, NotFoundError, RefusedWarning, StatisticError
from trajstore.operators.sgd import SGD
from trajstore.problems.batches import generator
from trajstore.problems.least_squares import LeastSquares
from trajstore.replay.recipe import Recipe

RIDGE = {
    "name": "ridge", "problem": {"family": "least-squares", "n": 40, "d": 4, "ridge": 0.5},
    "operator": {"family": "sgd", "lr": 0.05}, "steps": 400, "seeds": [0, 1], "orders": ["forward", "backward"],
}  # fmt: skip


def test_on_the_quadratic_every_pair_contracts_by_one_minus_h(record):
    stored = record("quadratic", steps=40, seeds=[0, 1])
    found = contraction(stored, pairs=50)
    assert found["factor"].values == pytest.approx(0.9, rel=1e-9)
    assert found.attrs["uniform_factor"] == pytest.approx(0.9)
    assert set(found["seed"].values) == {0, 1}
    assert lemma_factor(0.1, 1, 1) == pytest.approx(0.9)
    exponent = lyapunov(stored, steps=200)
    assert float(exponent["rate"]) == pytest.approx(0.9, rel=1e-6)


def test_factors_are_those_of_the_maps_and_below_the_bound_of_the_lemma(record):
    stored = record({**RIDGE, "steps": 60})
    found = contraction(stored, "backward", pairs=80)
    problem = LeastSquares(n=40, d=4, ridge=0.5)
    largest = (problem.data[0] ** 2).sum(1).max()
    assert float(found["factor"].max()) <= found.attrs["uniform_factor"] + 1e-9
    assert found.attrs["uniform_factor"] <= lemma_factor(0.05, 0.5, 0.5 + largest) + 1e-12
    for pair in range(5):
        one = found.isel(pair=pair)
        x, y = (
            stored.arrays(order="backward", seed=int(one["seed"]), step=int(one[step]))["theta"]
            for step in ("step", "other_step")
        )
        assert float(one["distance"]) == pytest.approx(np.linalg.norm(x - y))
    again = contraction(stored, "backward", pairs=80)
    assert found.identical(again)


def test_the_bound_of_the_theorem_holds_at_every_step(record):
    stored = record(RIDGE)
    ds = stored.dataset()
    for seed in (0, 1):
        iterates = ds["params"].sel(order="backward", seed=seed).values
        distances = np.linalg.norm(iterates - iterates[:, -1:], axis=0)
        bound = limit_bound(stored, seed, ds["snapshot"].values)
        assert (distances <= bound + 1e-12).all()
        assert bound[-1] < bound[0]


def test_the_fitted_rate_of_backward_is_that_of_the_products(record):
    stored = record(RIDGE)
    exponent = lyapunov(stored, seed=0, steps=2_000)
    oracle = processes.LeastSquares(h=0.05, ridge=0.5, rows=40, d=4)
    problem = LeastSquares(n=40, d=4, ridge=0.5)
    oracle.A = (1 - 0.05 * 0.5) * np.eye(4) - 0.05 * problem.data[0][:, :, None] * problem.data[0][:, None, :]
    known = oracle.lyapunov(np.random.default_rng(0))
    assert float(exponent["exponent_low"]) <= known <= float(exponent["exponent_high"])
    fitted = convergence(stored.dataset(), window=300).sel(order="backward")
    assert bool((np.abs(np.log(fitted["rate"]) - known) < 0.15 * abs(known)).all())


def test_an_exponent_is_given_only_where_differences_have_turned(record):
    """In many dimensions a random difference is, for long, one of the directions that hardly change."""
    spectrum = [-0.1, *[1e-3] * 300]
    told = {"family": "quadratic", "spectrum": spectrum, "noise": 0.1}
    schedule = {"family": "sgd", "lr": 0.1, "schedule": {"family": "step", "every": 100_000}}  # so that it is not known
    stored = record({"name": "saddle", "problem": told, "operator": schedule, "steps": 100, "orders": ["forward"]})
    short, long = lyapunov(stored, steps=150), lyapunov(stored, steps=2_000)
    assert np.isnan(float(short["exponent"]))
    assert "have not turned into one direction by step 75" in short["why"].item()
    assert float(short["growth"]) < 0.5 * np.log(1.01)
    assert float(long["exponent"]) == pytest.approx(np.log(1.01), rel=5e-3)
    assert float(long["exponent_low"]) <= np.log(1.01) <= float(long["exponent_high"])
    assert float(long["alignment"]) > 0.99
    plain = record({"name": "plain", "problem": told, "operator": {"family": "sgd", "lr": 0.1}, "steps": 100})
    assert float(lyapunov(plain)["exponent"]) == pytest.approx(np.log(1.01), rel=1e-12)  # known, of a quadratic


def test_rows_alone_do_not_contract_and_no_bound_is_made_up(record):
    stored = record({**RIDGE, "name": "rows", "problem": {"family": "least-squares", "n": 40, "d": 4}, "steps": 20})
    assert "uniform_factor" not in contraction(stored, pairs=5).attrs
    with pytest.raises(StatisticError, match="no k < 1 is known"):
        limit_bound(stored, 0, np.arange(20))


def test_what_cannot_be_had_is_refused(record, tmp_path):
    stored = record({**RIDGE, "steps": 20})
    with pytest.raises(NotFoundError, match="no order 'backwards'"):
        contraction(stored, "backwards")
    with pytest.raises(NotFoundError, match="no seed 7"):
        lyapunov(stored, seed=7, steps=200)
    with pytest.raises(StatisticError, match="20 steps are too few"):
        lyapunov(stored)
    import torch

    import trajstore as ts

    with ts.record(tmp_path / "loop.zarr", "mine", torch.nn.Linear(2, 1)) as rec:
        rec.step(loss=1.0)
    with pytest.raises(ConfigurationError, match="nothing can be computed with it afterwards"):
        contraction(ts.open(tmp_path / "loop.zarr")["mine"])


def test_an_optimizer_with_a_memory_is_refused_instead_of_half_seen(record):
    stored = record("quadratic", steps=200, seeds=[0], operator={"momentum": 0.9}, record={"optimizer_state": True})
    for asked in (contraction, lyapunov):
        with pytest.raises(StatisticError, match="a step changes an optimizer's memory"):
            asked(stored)


def test_exponents_of_networks_are_those_of_their_derivatives(record):
    """Of a ReLU network in float32: a finite difference would go across kinks and see another exponent."""
    network = {"family": "regression", "width": 10, "depth": 2, "points": 21}
    sgd = {"family": "sgd", "lr": 0.05}
    stored = record({"name": "relu", "problem": network, "operator": sgd, "steps": 150, "orders": ["forward"]})
    found = lyapunov(stored)
    twin = record({"name": "twin", "problem": {**network, "dtype": "float64"}, "operator": sgd, "steps": 150})
    recipe = Recipe.of(twin)
    here, batches = recipe.start(0), recipe.batches(0)
    begun = directions(Recipe.of(stored).start(0).params, 2, generator(0, "analysis"))[0]
    tangent = {name: d.double() for name, d in begun.items()}
    growth = []
    for n in range(1, 151):
        bent = recipe._gradient.along(here.params, here.buffers, batches[n], tangent)
        moved = {name: d - 0.05 * bent[name] for name, d in tangent.items()}
        growth.append(np.log(norm(moved) / norm(tangent)))
        tangent, here = moved, recipe.apply(here, batches[n], n)
    assert float(found["growth"]) == pytest.approx(np.mean(growth[37:]), abs=1e-5)


@pytest.mark.parametrize("schedule", ["constant", "inverse-sqrt"])
def test_an_operators_own_derivative_is_the_one_that_is_had_without_it(record, monkeypatch, schedule):
    operator = {"family": "sgd", "lr": 0.05, "weight_decay": 0.1, "schedule": {"family": schedule}}
    recipe = Recipe.of(record({**RIDGE, "steps": 5, "operator": operator}))
    here, batch = recipe.start(0), recipe.batches(0)[3]
    (tangent,) = directions(here.params, 1, generator(0, "analysis"))
    after, (known,) = recipe.pushed(here, [tangent], batch, 3)
    monkeypatch.setattr("trajstore.replay.recipe.Pushes", type("Nobody", (), {}))
    again, (found,) = recipe.pushed(here, [tangent], batch, 3)
    assert known["theta"].numpy() == pytest.approx(found["theta"].numpy(), abs=1e-14)
    assert again.params["theta"].numpy() == pytest.approx(after.params["theta"].numpy(), abs=1e-14)


def test_an_operator_that_is_wrong_about_its_derivative_is_not_believed(record, monkeypatch):
    push = SGD.push
    monkeypatch.setattr(SGD, "push", lambda *given: {n: v * 1.001 for n, v in push(*given).items()})
    recipe = Recipe.of(record({**RIDGE, "steps": 5}))
    here, batches = recipe.start(0), recipe.batches(0)
    (tangent,) = directions(here.params, 1, generator(0, "analysis"))
    with pytest.warns(RefusedWarning, match="operator SGD: its `push` is not the derivative of its `apply`: 0/theta"):
        _, (found,) = recipe.pushed(here, [tangent], batches[3], 3)
    _, (again,) = recipe.pushed(here, [tangent], batches[3], 3)
    for moved in (found, again):
        right = push(SGD(0.05), recipe._gradient, here, tangent, batches[3], torch.tensor(3))
        assert moved["theta"].numpy() == pytest.approx(right["theta"].numpy(), abs=1e-14)


def test_operators_without_one_have_exponents(record):
    operator = {"family": "order-mean", "lr": 0.05, "parts": 2}
    problem = {"family": "least-squares", "n": 40, "d": 4, "ridge": 0.5, "batch_size": 2}
    found = lyapunov(record({**RIDGE, "steps": 100, "problem": problem, "operator": operator}), steps=2_000)
    assert 0.9 < float(found["rate"]) < 1


def test_a_selection_says_whose_exponent_it_is(record):
    ds = record({**RIDGE, "steps": 120}).dataset()
    assert lyapunov(ds.sel(seed=1)).attrs["seed"] == 1
    assert lyapunov(ds).attrs["seed"] == 0
    with pytest.raises(StatisticError, match="0 steps are too few"):
        lyapunov(ds, steps=0)
    with pytest.raises(ConfigurationError, match=r"takes the stored experiment, store\['NAME'\], not a Dataset"):
        contraction(ds)


def test_both_of_a_pair_go_through_one_map(record):
    """Where the learning rate goes by position, iterates of different steps would have one each."""
    operator = {"family": "sgd", "lr": 0.5, "schedule": {"family": "inverse-sqrt"}}
    found = contraction(record("quadratic", steps=100, seeds=[0], operator=operator), pairs=60)
    expected = [1 - 0.5 / np.sqrt(i) for i in found["batch"].values]
    assert found["factor"].values == pytest.approx(expected, rel=1e-6)


def test_the_lemma_is_said_where_its_constants_are_known(record):
    attrs = contraction(record({**RIDGE, "steps": 20}), pairs=3).attrs
    largest = 0.5 + (LeastSquares(n=40, d=4).data[0] ** 2).sum(1).max()
    assert attrs["uniform_factor"] == pytest.approx(0.975)
    assert ("lemma_factor" in attrs) == (lemma_factor(0.05, 0.5, largest) < 1)
    quadratic = contraction(record("quadratic", steps=20, seeds=[0]), pairs=3).attrs
    assert quadratic["lemma_factor"] == pytest.approx(0.9)


def test_iterates_that_differ_by_rounding_have_no_factor(record):
    found = contraction(record("quadratic", steps=800, seeds=[0]), "backward", pairs=150)["factor"]
    assert 12 < int(found.isnull().sum()) < 138
    assert found.dropna("pair").values == pytest.approx(0.9, rel=0.01)


FEW = {
    "name": "few", "problem": {"family": "quadratic", "spectrum": [1.0, 1.25], "noise": 0.1}, "steps": 400,
    "orders": ["forward"], "operator": {"family": "sgd", "lr": 0.004, "schedule": {"family": "step", "every": 10_000}},
}  # fmt: skip
"""Two parameters, whose difference hardly turns in 400 steps. The schedule keeps the exponent from being known."""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_of_few_parameters_no_exponent_is_made_up(record, dtype):
    stored = record({**FEW, "seeds": list(range(6)), "problem": {**FEW["problem"], "dtype": dtype}})
    for seed in range(6):
        found = lyapunov(stored, seed)
        assert np.isnan(float(found["exponent"]))
        assert "have not turned into one direction by step 200" in found["why"].item()


def test_with_more_steps_it_is_given_and_right(record):
    faster = {**FEW["operator"], "lr": 0.2}
    stored = record({**FEW, "operator": faster, "seeds": [0, 1, 2]})
    for seed in range(3):
        found = lyapunov(stored, seed)
        assert float(found["exponent_low"]) <= np.log(0.8) <= float(found["exponent_high"])
        assert float(found["exponent"]) == pytest.approx(np.log(0.8), abs=1e-5)


def test_of_one_parameter_it_is_the_product_itself(record):
    rows = {"family": "least-squares", "n": 40, "d": 1}
    found = lyapunov(record({**RIDGE, "problem": rows, "steps": 300}))
    drawn = Recipe.of(record({**RIDGE, "name": "again", "problem": rows, "steps": 300})).batches(0)
    known = [np.log(abs(1 - 0.05 * float(drawn[i][0].double() ** 2))) for i in range(1, 301)]
    assert float(found["exponent"]) == pytest.approx(np.mean(known[75:]), rel=1e-9)


def test_a_product_that_leaves_nothing_has_exponent_minus_infinity(record):
    for d in (1, 3):
        gone = products_of(lambda n, d=d: np.eye(d) * (n != 30), d, 0)(100)
        assert exponent_of(gone).value == -np.inf
    constants = record({"name": "constants", "problem": {"family": "two-constants"}, "orders": ["forward"],
                        "operator": {"family": "sgd", "lr": 1.0}, "steps": 120})  # fmt: skip
    found = lyapunov(constants)
    assert (float(found["exponent"]), float(found["rate"]), found["why"].item()) == (-np.inf, 0.0, "")
    all_at_once = record("quadratic", steps=120, seeds=[0], operator={"lr": 1.0})  # 1 − hH is 0
    assert float(lyapunov(all_at_once)["rate"]) == 0.0


def test_a_singular_product_has_that_of_what_is_left():
    found = exponent_of(products_of(lambda n: np.diag([0.9, 0.0]), 2, 0)(100))
    assert found.value == pytest.approx(np.log(0.9), abs=1e-12)
    nearly = exponent_of(products_of(lambda n: np.array([[3e-15 if n == 80 else 0.9]]), 1, 0)(100))
    assert np.isnan(nearly.value)
    assert "at step 80 nearly nothing is left of a difference but rounding" in nearly.why


@pytest.mark.parametrize("seed", range(5))
def test_what_turns_round_or_grows_alike_has_not_become_one(seed):
    turn = np.array([[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]])
    stretched = np.diag([10.0, 1.0]) @ turn @ np.diag([0.1, 1.0])
    for maps in (lambda n: 0.9 * turn, lambda n: 0.99 * stretched, lambda n: 0.9 * np.eye(2)):
        assert "have not turned into one direction" in exponent_of(products_of(maps, 2, seed)(300)).why
    # Near each other by chance, in the plane of the two slowest, is not turned.
    slow = np.diag([0.996, 0.995, 0.5, 0.4, 0.3])
    assert np.isnan(exponent_of(products_of(lambda n: slow, 5, seed)(400)).value)


def test_growth_that_still_changes_has_no_exponent():
    rng = np.random.default_rng(0)
    slower = Growth(0.01 * rng.standard_normal(400) - np.arange(400) / 4_000, np.zeros(400), np.full(400, 1e-15))
    assert "how a difference grows still changes, by -0.07" in exponent_of(slower).why


@pytest.mark.parametrize("phi", [0.9, 0.99, 0.995, 0.999])
def test_growth_worth_few_independent_values_has_no_exponent(phi):
    """Of growth −0.01 + 0.05 AR(1) hardly an interval is given that does not hold −0.01."""
    from tests.tools.calibration import exponents_of_correlated

    found = exponents_of_correlated(phi, 100, 400)
    value, reach = np.array([(one.value, one.reach) for one in found]).T
    given = ~np.isnan(value)
    assert (given & (np.abs(value + 0.01) > 2 * reach)).mean() <= 0.02
    if phi >= 0.99:
        assert given.mean() <= 0.05
        assert any("independent values, and an interval needs 50" in one.why for one in found)


def test_growth_that_varies_by_little_beside_it_has_an_exponent_however_correlated():
    grown = -0.5 + 1e-3 * np.sqrt(1 - 0.99**2) * ar1(0.99, 400, 50, 3)
    found = [exponent_of(Growth(row, np.zeros(400), np.full(400, 1e-15))) for row in grown]
    given = [one for one in found if not one.why]
    assert len(given) >= 20
    assert np.mean([abs(one.value + 0.5) <= one.reach < 0.025 for one in given]) >= 0.95


def test_intervals_of_exponents_hold_the_exponent():
    """Products of Gaussian matrices: the exponent is (log 2 + ψ(d/2)) / 2."""
    from scipy.special import digamma

    from tests.tools.calibration import exponents_of, gaussian

    for d in (1, 2, 3):
        true = 0.5 * (np.log(2) + digamma(d / 2))
        found = exponents_of(gaussian(np.random.default_rng(d), 24, 400, d))
        value, reach = np.array([(one.value, one.reach) for one in found]).T
        given = ~np.isnan(value)
        assert given.mean() > 0.9
        assert (np.abs(value - true) <= reach)[given].mean() >= 0.83
        assert (np.abs(value - true) > 2 * reach)[given].sum() <= 1
