"""Time averages hold the expectation as often as they say; the invariance gap is zero where training is stationary."""

from __future__ import annotations

import numpy as np
import pytest
from trajstore.analysis import rolling_mean, time_average
from trajstore.analysis.afterwards import compute

import trajstore as ts
from tests.analysis.processes import ar1
from tests.analysis.test_variance import runs_of
from trajstore.errors import StatisticError


@pytest.mark.parametrize(("phi", "steps"), [(0.0, 400), (0.9, 2_000)])
def test_intervals_hold_the_expectation(phi, steps):
    found = time_average(runs_of(5 + ar1(phi, steps, 500, 1), 5 + ar1(phi, steps, 500, 2)), "loss", steps)
    given = found["why"] == ""
    assert float(given.mean()) > 0.95
    held = (found["low"] <= 5) & (found["high"] >= 5)
    assert 0.92 <= float(held.where(given).mean()) <= 0.98


def test_what_cannot_be_averaged_says_so():
    broken = ar1(0.0, 200, 1, 1)
    broken[0, 150] = np.nan
    found = time_average(runs_of(broken, ar1(0.99, 200, 1, 2)), "loss", 200)
    assert found["why"].values.ravel().tolist() == ["diverged", "too short: 50 independent values are needed"]
    assert np.isnan(found["low"].values).all()
    assert np.isnan(found["mean"].values).tolist() == [[True], [False]]


def test_a_rolling_mean_is_that_of_each_window():
    values = ar1(0.5, 50, 1, 1)
    rolled = rolling_mean(runs_of(values, 2 * values), "loss", 10)
    assert rolled.isnull().sum("step").values.tolist() == [[9], [9]]
    assert rolled.values[1, 0, 30] == pytest.approx(2 * values[0, 21:31].mean())
    with pytest.raises(StatisticError, match="window is 0"):
        rolling_mean(runs_of(values, values), "loss", 0)


def test_the_invariance_gap_is_zero_on_average_where_forward_is_stationary(record):
    """And not where it still descends: the loss of the next fresh step is lower, for all of the window."""
    table = {
        "name": "gap", "problem": {"family": "quadratic", "noise": 1.0, "start": 60.0}, "orders": ["forward"],
        "operator": {"family": "sgd", "lr": 0.1}, "steps": 900, "seeds": [0],
    }  # fmt: skip
    stored = record(table)
    compute(stored, "invariance_gap", samples=4)
    ds = ts.open(stored.store.place.address)["gap"].dataset()
    settled = time_average(ds, "invariance_gap", window=800)
    assert bool(((settled["low"] < 0) & (settled["high"] > 0)).all())
    descent = ds["invariance_gap"].sel(step=slice(0, 30))
    assert bool((descent > 0).all())
