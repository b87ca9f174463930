"""A rate's interval holds the true one as often as it says, whatever the logarithms do about their line."""

from __future__ import annotations

import numpy as np
import pytest
from trajstore.analysis.rates import fit_rate

from tests.analysis.processes import LeastSquares, ar1, path, quadratic


def holds(moves, factor, **more):
    rate = fit_rate(moves, **more)
    return rate.low <= factor <= rate.high


@pytest.mark.parametrize(("h", "steps"), [(0.1, 150), (0.05, 400), (0.01, 2_000)])
def test_on_the_quadratic_backward_approaches_its_limit_by_one_minus_h(h, steps):
    rng = np.random.default_rng(2)
    held = [holds(path(quadratic(rng, h, steps, "backward")).moves, 1 - h) for _ in range(500)]
    assert 0.93 <= np.mean(held) <= 0.99


@pytest.mark.parametrize(("walk", "noise", "least"), [(0.3, 1.0, 0.9), (1.0, 0.1, 0.9), (0.1, 1.0, 0.85)])
def test_logarithms_may_walk_at_random(walk, noise, least):
    """Least squares alone holds the rate in 20% to 40% of these."""
    rng, held = np.random.default_rng(0), []
    for _ in range(300):
        steps = -0.05 + walk * rng.standard_normal(400)
        held.append(holds(np.exp(np.cumsum(steps) + noise * rng.standard_normal(400)), np.exp(-0.05)))
    assert least <= np.mean(held) <= 0.98


def test_logarithms_may_be_correlated():
    held = [holds(np.exp(-0.05 * np.arange(400) + row), np.exp(-0.05)) for row in ar1(0.5, 400, 300, 1)]
    assert 0.93 <= np.mean(held) <= 0.99


def test_on_least_squares_the_rate_is_that_of_the_products():
    """Rows alone do not contract (‖I − hxxᵀ‖ = 1); the Lyapunov exponent says what to expect."""
    problem = LeastSquares(h=0.05)
    expected = np.exp(problem.lyapunov(np.random.default_rng(1)))
    rng = np.random.default_rng(2)
    held = [holds(path(problem.iterates(rng, 900, "backward")).moves[100:], expected) for _ in range(100)]
    assert np.mean(held) >= 0.75  # 95% is not reached: the walk is small, and hides in the noise


def test_a_line_is_fitted_exactly():
    rate = fit_rate(3 * 0.9 ** np.arange(200.0), per_step=4)
    assert rate.factor == pytest.approx(0.9 ** (1 / 4), rel=1e-12)
    assert rate.r2 == pytest.approx(1)
    assert rate.fall == pytest.approx(200 * np.log(0.9))


def test_a_curve_is_told_by_its_bend():
    rng = np.random.default_rng(0)
    noise = np.exp(0.1 * rng.standard_normal(400))
    assert abs(fit_rate(0.97 ** np.arange(400) * noise).bend) < 3
    assert fit_rate(np.arange(1.0, 1_001) ** -2 * np.exp(0.1 * rng.standard_normal(1_000))).bend > 3


def test_a_metric_of_few_values_moves_ever_less_often():
    rng = np.random.default_rng(0)
    moves = (rng.random(4_000) < 0.5 * 0.999 ** np.arange(4_000)) / 64
    rate = fit_rate(moves)
    assert rate.low < 0.9995 < rate.high  # its mean square is what shrinks by 0.999


def test_too_few_moves_have_no_rate():
    assert fit_rate(np.zeros(100)) is None
    assert fit_rate(np.ones(11)) is None
    lonely = np.zeros(100)
    lonely[50] = 1
    assert fit_rate(lonely) is None
