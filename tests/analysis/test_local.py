"""Local variance ratios hold the true ratio where curves descend and burst, and there is none where none can be."""

from __future__ import annotations

import numpy as np
import pytest
from trajstore.analysis import local_variance_ratio, variance_ratio

from tests.analysis.processes import ar1, runs_of
from trajstore.errors import ConfigurationError, StatisticError

RUNS = 200


@pytest.mark.parametrize("kind", ["level", "tail", "step"])
def test_intervals_hold_the_true_ratio_as_often_as_they_say(kind):
    forward, backward = (ar1(0.9, 700, RUNS, k) for k in range(2))
    found = local_variance_ratio(runs_of(3 * forward, backward), "loss", 700, kind)
    held = ((found["low"] <= 9) & (found["high"] >= 9)).mean()
    assert 0.90 <= float(held) <= 0.99
    assert (found["why"] == "").all()


def test_neither_a_descent_nor_bursts_take_the_interval_away():
    forward, backward = (np.exp(2 * ar1(0.9, 700, RUNS, 10 + k) * np.sqrt(1 - 0.81)) * ar1(0, 700, RUNS, 20 + k)
                         for k in range(2))  # fmt: skip
    descent = 0.5 * np.arange(700)
    found = local_variance_ratio(runs_of(3 * forward - descent, backward - 2 * descent), "loss", 700)
    assert float(((found["low"] <= 9) & (found["high"] >= 9)).mean()) >= 0.88


def test_bursts_that_outlast_the_blocks_make_it_wider():
    volatility = [np.exp(ar1(0.99, 700, RUNS, 30 + k) * np.sqrt(1 - 0.99**2)) for k in range(2)]
    forward, backward = (v * ar1(0, 700, RUNS, 40 + k) for k, v in enumerate(volatility))
    found = local_variance_ratio(runs_of(3 * forward, backward), "loss", 700)
    assert float(((found["low"] <= 9) & (found["high"] >= 9)).mean()) >= 0.82  # 70% by eight cosines


def test_a_ratio_that_grows_evenly_is_no_burst():
    rng = np.random.default_rng(0)
    forward, backward = rng.standard_normal((2, 1, 700))
    found = local_variance_ratio(runs_of(forward, backward * np.exp(-0.01 * np.arange(700))), "loss", 700)
    assert float(found["low"][0]) > 10


def test_a_metric_of_few_values_is_known_no_better_than_these():
    """Of 200 images, an accuracy that stands still varies by less than its steps, and not by less than rounding."""
    rng = np.random.default_rng(0)
    latent = np.array([3.0, 1.0])[:, None, None] * 0.004 * rng.standard_normal((2, 20, 400)) + 0.6
    forward, backward = (latent * 200).round() / 200
    backward[:, 100:300] = 0.6
    found = local_variance_ratio(runs_of(forward, backward), "loss", 400)
    assert float(found["ratio"].max()) < 9 * 10  # the whole ratio of such steps to a standstill is 70
    assert float(found["ratio"].min()) > 5


def test_it_is_the_geometric_mean_over_blocks():
    rng = np.random.default_rng(0)
    forward, backward = rng.standard_normal((2, 1, 320))
    found = local_variance_ratio(runs_of(forward, backward), "loss", 320, "level")
    assert found.attrs["blocks"] == 32
    logs = np.log([a.reshape(32, 10).var(1, ddof=1) for a in (forward, backward)])
    assert float(found["ratio"][0]) == pytest.approx(np.exp((logs[0] - logs[1]).mean()), rel=1e-12)


def test_what_rests_counts_as_rounding_and_what_diverged_as_nothing():
    noise = np.random.default_rng(0).standard_normal((3, 400))
    still = np.ones((3, 400))
    still[1], noise[2, 100] = noise[1] / 10, np.nan
    found = local_variance_ratio(runs_of(noise, still), "loss", 400)
    assert float(found["low"][0]) > 1e20
    assert float(found["ratio"][1]) == pytest.approx(100)
    assert found["why"].values.tolist()[2] == "diverged"
    both = local_variance_ratio(runs_of(still[:1], still[:1]), "loss", 400)
    assert both["why"].item() == "neither varies, but by rounding"
    assert np.isnan(both["low"].item())


def test_too_few_steps_and_missing_orders_are_refused():
    noise = np.random.default_rng(0).standard_normal((2, 1, 400))
    with pytest.raises(StatisticError, match="this statistic needs at least 192 steps"):
        local_variance_ratio(runs_of(*noise), "loss", 191)
    with pytest.raises(ConfigurationError, match="no variance 'tial'; did you mean 'tail'"):
        local_variance_ratio(runs_of(*noise), "loss", kind="tial")
    with pytest.raises(StatisticError, match="a ratio needs the orders 'forward' and 'bracket'; there is"):
        local_variance_ratio(runs_of(*noise), "loss", orders=("forward", "bracket"))


@pytest.mark.parametrize("ratio", [local_variance_ratio, variance_ratio])
def test_iterates_are_not_compared_with_themselves(ratio):
    """An order that begins as the other has the same iterates there, which would draw the ratio to 1."""
    forward, backward = (ar1(0.5, 400, 2, k) for k in range(2))
    orders = ("forward", "forward+backward@200")
    ds = runs_of(forward, backward).assign_coords(order=list(orders))
    same = "the same up to step 200, and the window of 210 recorded steps begins at step 1"
    with pytest.raises(StatisticError, match=same):
        ratio(ds, "loss", 210, orders=orders)
    assert ratio(ds, "loss", 195, orders=orders).sizes["seed"] == 2
    named = ds.assign_coords(order=["drawn", "shuffled"])
    assert ratio(named, "loss", 210, orders=("drawn", "shuffled")).sizes["seed"] == 2
