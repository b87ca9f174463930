"""Local variance ratios hold the true ratio where curves descend and burst, and there is none where none can be."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from trajstore.analysis import local_variance_ratio, variance_ratio
from trajstore.analysis.examining.finding import by_interval, number_of
from trajstore.analysis.figures._ratios import ratios
from trajstore.analysis.writing import number

from tests.analysis.processes import ar1, runs_of
from trajstore.errors import ConfigurationError, StatisticError

RUNS = 200


@pytest.mark.parametrize("kind", ["level", "tail", "step"])
def test_intervals_hold_the_true_ratio_as_often_as_they_say_and_are_no_wider_than_they_need_be(kind):
    """Ratios of blocks that are independent vary by so much; an interval reaches at most twice as far as they take."""
    forward, backward = (ar1(0.9, 700, RUNS, k) for k in range(2))
    found = local_variance_ratio(runs_of(3 * forward, backward), "loss", 700, kind)
    held = ((found["low"] <= 9) & (found["high"] >= 9)).mean()
    assert float(held) >= 0.93
    assert (found["why"] == "").all()
    assert set(found["bound"].values) == {""}
    reach = np.log(found["high"] / found["low"]).median() / 2
    assert float(reach) < 2 * 1.96 * float(np.log(found["ratio"]).std())


def test_neither_a_descent_nor_bursts_take_the_interval_away():
    forward, backward = (np.exp(2 * ar1(0.9, 700, RUNS, 10 + k) * np.sqrt(1 - 0.81)) * ar1(0, 700, RUNS, 20 + k)
                         for k in range(2))  # fmt: skip
    descent = 0.5 * np.arange(700)
    found = local_variance_ratio(runs_of(3 * forward - descent, backward - 2 * descent), "loss", 700)
    assert float(((found["low"] <= 9) & (found["high"] >= 9)).mean()) >= 0.88


@pytest.mark.parametrize("steps", [200, 700])
@pytest.mark.parametrize(("phi", "size"), [(0.98, 1), (0.99, 1), (0.995, 1), (0.99, 1 / 3)])
def test_bursts_that_outlast_the_blocks_make_it_wider(steps, phi, size):
    """They hold the ratio of the process in nine of ten, also where the window is as long as a burst."""
    volatility = [np.exp(size * ar1(phi, steps, RUNS, 30 + k) * np.sqrt(1 - phi**2)) for k in range(2)]
    forward, backward = (v * ar1(0, steps, RUNS, 40 + k) for k, v in enumerate(volatility))
    found = local_variance_ratio(runs_of(3 * forward, backward), "loss", steps)
    assert float(((found["low"] <= 9) & (found["high"] >= 9)).mean()) >= 0.88  # of 200 runs, where it is 0.9 or more


def test_a_ratio_that_grows_evenly_is_no_burst():
    rng = np.random.default_rng(0)
    forward, backward = rng.standard_normal((2, 1, 700))
    found = local_variance_ratio(runs_of(forward, backward * np.exp(-0.01 * np.arange(700))), "loss", 700)
    assert float(found["low"][0]) > 10


def test_a_metric_of_few_values_is_known_no_better_than_these():
    """Of 200 images, an accuracy that stands still varies by less than its steps: the ratio to it is a lower bound."""
    rng = np.random.default_rng(0)
    latent = np.array([3.0, 1.0])[:, None, None] * 0.004 * rng.standard_normal((2, 20, 400)) + 0.6
    forward, backward = (latent * 200).round() / 200
    backward[:, 100:300] = 0.6
    found = local_variance_ratio(runs_of(forward, backward), "loss", 400)
    assert set(found["bound"].values) == {"lower"}
    assert set(found["high"].values) == {np.inf}
    assert float(found["ratio"].max()) < 9 * 10  # the whole ratio of such steps to a standstill is 70
    assert float(found["ratio"].min()) > 5
    assert float((found["low"] > 1).mean()) >= 0.8


def test_it_is_the_geometric_mean_over_blocks():
    rng = np.random.default_rng(0)
    forward, backward = rng.standard_normal((2, 1, 320))
    found = local_variance_ratio(runs_of(forward, backward), "loss", 320, "level")
    assert found.attrs["blocks"] == 32
    logs = np.log([a.reshape(32, 10).var(1, ddof=1) for a in (forward, backward)])
    assert float(found["ratio"][0]) == pytest.approx(np.exp((logs[0] - logs[1]).mean()), rel=1e-12)


def test_a_ratio_to_what_rests_is_a_bound():
    """Noise of variance 1 over what is known to 4ε of 1, and the other way round."""
    noise = np.random.default_rng(0).standard_normal((3, 400))
    still = np.ones((3, 400))
    still[1], noise[2, 100] = noise[1] / 10, np.nan
    found = local_variance_ratio(runs_of(noise, still), "loss", 400)
    least = (4 * np.finfo(float).eps) ** -2
    assert found["bound"].values.tolist() == ["lower", "", ""]
    assert least / 10 < float(found["low"][0]) < float(found["ratio"][0]) < least
    assert float(found["high"][0]) == np.inf
    assert found["why"].values.tolist() == [
        "backward varies by no more than rounding in 33 of 33 blocks", "", "diverged"
    ]  # fmt: skip
    assert float(found["ratio"][1]) == pytest.approx(100)
    other = local_variance_ratio(runs_of(still[:1], noise[:1]), "loss", 400)
    assert (other["bound"].item(), float(other["low"][0])) == ("upper", 0)
    assert float(other["high"][0]) == pytest.approx(1 / float(found["low"][0]), rel=1e-9)
    assert other["why"].item() == "forward varies by no more than rounding in 33 of 33 blocks"


def test_a_bound_is_told_as_a_bound_in_titles_and_in_claims():
    noise, still = np.random.default_rng(0).standard_normal((1, 640)), np.ones((1, 640))
    orders = ("forward", "backward")
    for one, other, word in ((noise, still, "at least"), (still, noise, "at most")):
        ds = runs_of(one, other)
        found = local_variance_ratio(ds, "loss", 640).isel(seed=0)
        told = ratios(ds, "loss", partial(local_variance_ratio, window=640), orders)[0]
        end = float(found["low"] if word == "at least" else found["high"])
        order = orders[word == "at least"]
        assert told == (
            f"variance forward/backward {word}\N{NO-BREAK SPACE}{number(end)} ({order} varies by no more than rounding "
            "in 32 of 32 blocks), steps 0 to 639"
        )
        claim = by_interval(1.0, "", "", number_of(found, "ratio", "low", "high"))
        assert claim.verdict == ("holds" if word == "at least" else "does not hold")
    nothing = local_variance_ratio(runs_of(still, still), "loss", 640).isel(seed=0)
    assert by_interval(1.0, "", "", number_of(nothing, "ratio", "low", "high")).verdict == "not decidable here"


def test_a_ratio_to_exactly_nothing_is_no_larger_than_what_rounding_tells():
    noise = np.random.default_rng(0).standard_normal((1, 400))
    found = local_variance_ratio(runs_of(noise, np.zeros((1, 400))), "loss", 400)
    assert found["bound"].item() == "lower"
    assert float(found["ratio"][0]) < (4 * np.finfo(float).eps) ** -2


def test_what_comes_to_rest_in_the_window_makes_no_interval_wider():
    """The true ratio is 4 and then more than can be told: surely above 1, and nobody knows how much."""
    rng = np.random.default_rng(1)
    forward, backward = 2 + rng.standard_normal((2, 100, 640))
    forward = 2 * forward
    for rests in (1, 0.3):
        from_here = 640 - int(640 * 0.5 * rests)
        settled = backward.copy()
        settled[:, from_here:] = 2
        found = local_variance_ratio(runs_of(forward, settled), "loss", 640)
        assert set(found["bound"].values) == {"lower"}
        assert float((found["low"] > 1).mean()) > 0.8
        assert float(found["low"].max()) < 1e26


def test_blocks_in_which_both_rest_say_nothing():
    """Half of each order at rest together would draw a ratio of 100 to 10, if it counted as 1 there."""
    rng = np.random.default_rng(2)
    forward, backward = 1 + np.array([0.1, 0.01])[:, None, None] * rng.standard_normal((2, 50, 640))
    for values in (forward, backward):
        values[:, :140] = 1
    found = local_variance_ratio(runs_of(forward, backward), "loss", 640)
    assert set(found["bound"].values) == {""}
    assert float(((found["low"] <= 100) & (found["high"] >= 100)).mean()) >= 0.9
    assert float(abs(np.log(found["ratio"] / 100)).max()) < 0.5
    for values in (forward, backward):
        values[:, :320] = 1
    few = local_variance_ratio(runs_of(forward, backward), "loss", 640)
    assert bool(few["ratio"].isnull().all())
    assert set(few["why"].values) == {"16 of 32 blocks vary by more than rounding, and an interval takes 24"}
    still = local_variance_ratio(runs_of(*np.ones((2, 1, 640))), "loss", 640)
    assert still["why"].item() == "neither varies, but by rounding"
    assert np.isnan(still["low"].item())


def test_orders_that_rest_in_turn_have_no_ratio():
    rng = np.random.default_rng(3)
    forward, backward = 1 + 0.1 * rng.standard_normal((2, 1, 640))
    forward[:, :60], backward[:, -60:] = 1, 1
    found = local_variance_ratio(runs_of(forward, backward), "loss", 640)
    assert np.isnan(found["ratio"].item())
    assert "forward in 3 and backward in 3 vary by no more than rounding" in found["why"].item()


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
