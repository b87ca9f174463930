"""Factors, exponents and bounds on problems where they are known."""

from __future__ import annotations

import numpy as np
import pytest
from trajstore.analysis import contraction, convergence, lyapunov
from trajstore.analysis.contracting import lemma_factor, limit_bound, uniform_factor

from tests.analysis import processes
from trajstore.errors import ConfigurationError, NotFoundError, StatisticError
from trajstore.problems.least_squares import LeastSquares

RIDGE = {
    "name": "ridge", "problem": {"family": "least-squares", "n": 40, "d": 4, "ridge": 0.5},
    "operator": {"family": "sgd", "lr": 0.05}, "steps": 400, "seeds": [0, 1], "orders": ["forward", "backward"],
}  # fmt: skip


def test_on_the_quadratic_every_pair_contracts_by_one_minus_h(record):
    stored = record("quadratic", steps=40, seeds=[0, 1])
    found = contraction(stored, pairs=50)
    assert found["factor"].values == pytest.approx(0.9, rel=1e-9)
    assert uniform_factor(stored) == pytest.approx(0.9)
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
    assert float(found["factor"].max()) <= uniform_factor(stored) + 1e-9
    assert uniform_factor(stored) <= lemma_factor(0.05, 0.5, 0.5 + largest) + 1e-12
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


def test_rows_alone_do_not_contract_and_no_bound_is_made_up(record):
    stored = record({**RIDGE, "name": "rows", "problem": {"family": "least-squares", "n": 40, "d": 4}, "steps": 20})
    assert uniform_factor(stored) is None
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


def test_iterates_that_differ_by_rounding_have_no_factor(record):
    found = contraction(record("quadratic", steps=800, seeds=[0]), "backward", pairs=300)["factor"]
    assert 25 < int(found.isnull().sum()) < 275
    assert found.dropna("pair").values == pytest.approx(0.9, rel=0.01)
