"""The three variances on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from trajstore.analysis import (
    level_variance,
    rolling_variance,
    step_variance,
    tail_variance,
    variance,
    variance_ratio,
)

from tests.analysis.processes import ar1, runs_of
from trajstore.errors import NotFoundError, StatisticError


def dataset(forward, backward, recorded=None):
    values = np.stack([forward, backward])[:, None, :].astype(float)
    steps = values.shape[-1]
    here = np.ones(values.shape, dtype=bool) if recorded is None else np.broadcast_to(recorded, values.shape)
    return xr.Dataset(
        {
            "loss": (("order", "seed", "step"), np.where(here, values, np.nan)),
            "measured": (("order", "seed", "step"), here.astype(int), {"flag_meanings": "loss"}),
        },
        {"order": ["forward", "backward"], "seed": [7], "step": np.arange(steps),
         "recorded": (("order", "seed", "step"), here)},
    )  # fmt: skip


def test_a_line_has_level_variance_only():
    line = 3 - 0.5 * np.arange(50)
    ds = dataset(line, line)
    assert level_variance(ds, "loss", 50).values == pytest.approx(np.var(line, ddof=1))
    assert tail_variance(ds, "loss", 50).values == pytest.approx(0, abs=1e-20)
    assert step_variance(ds, "loss", 50).values == pytest.approx(0, abs=1e-20)


def test_white_noise_has_the_same_variance_in_each_sense():
    noise = np.random.default_rng(0).normal(0, 2, (2, 20_000))
    ds = dataset(*noise)
    for statistic in (level_variance, tail_variance, step_variance):
        assert statistic(ds, "loss", 20_000).values == pytest.approx(4, rel=0.03)


def test_ar1_has_its_stationary_and_its_step_variance():
    rng, phi, n = np.random.default_rng(1), 0.9, 200_000
    x = np.empty((2, n))
    x[:, 0] = 0
    for t in range(1, n):
        x[:, t] = phi * x[:, t - 1] + rng.standard_normal(2)
    ds = dataset(*x)
    stationary = 1 / (1 - phi**2)
    assert level_variance(ds, "loss", n).values == pytest.approx(stationary, rel=0.05)
    assert step_variance(ds, "loss", n).values == pytest.approx(stationary * (1 - phi), rel=0.02)


def test_the_tail_variance_is_unbiased_for_noise_about_a_line():
    rng = np.random.default_rng(2)
    found = [
        float(tail_variance(dataset(*(0.3 * np.arange(6) + rng.standard_normal((2, 6)))), "loss", 6)[0, 0])
        for _ in range(1000)
    ]
    assert np.mean(found) == pytest.approx(1, abs=4 * np.sqrt(2 / 4 / 1000))


def test_only_the_window_counts_and_the_result_says_which():
    series = np.concatenate([1e6 * np.ones(100), np.tile([0.0, 1.0], 5)])
    found = level_variance(dataset(series, series), "loss", 10)
    assert float(found[0, 0]) == pytest.approx(np.var([0, 1] * 5, ddof=1))
    assert (found.attrs["from_step"], found.attrs["to_step"], found.attrs["metric"]) == (100, 109, "loss")
    assert found.dims == ("order", "seed")


def test_sparse_grids_use_the_steps_that_were_recorded():
    steps = np.arange(100)
    ds = dataset(2.0 * steps, 2.0 * steps, recorded=steps % 10 == 0)
    assert tail_variance(ds, "loss", 5).values == pytest.approx(0, abs=1e-20)
    assert tail_variance(ds, "loss", 5).attrs["from_step"] == 50


def test_a_diverged_slab_has_no_variance():
    series = np.ones(20)
    broken = series.copy()
    broken[15] = np.nan
    assert np.isnan(tail_variance(dataset(series, broken), "loss", 10).values).tolist() == [[False], [True]]


def test_what_cannot_be_had_is_refused():
    ds = dataset(np.ones(20), np.ones(20))
    with pytest.raises(NotFoundError, match="no metric 'los'; did you mean 'loss'"):
        level_variance(ds, "los")
    with pytest.raises(StatisticError, match="it was measured at 20 steps, fewer than the window of 21"):
        level_variance(ds, "loss", 21)
    with pytest.raises(StatisticError, match="at least 3"):
        tail_variance(ds, "loss", 2)
    missing = np.ones((2, 1, 20), dtype=bool)
    missing[1, 0, 18:] = False
    with pytest.raises(StatisticError, match="order 'backward', seed 7 has no step 18; finish"):
        level_variance(dataset(np.ones(20), np.ones(20), missing), "loss", 5)


def test_steps_that_were_chosen_by_a_metric_give_no_variance(record):
    grid = {"adaptive": "test_loss", "tolerance": 1e-3}
    ds = record(steps=80, orders=["backward"], seeds=[0], record=grid).dataset()
    with pytest.raises(
        StatisticError, match=r"uneven distances where test_loss changes most, .* would be wrong; record them evenly"
    ):
        tail_variance(ds, "test_loss", window=20)


@pytest.mark.parametrize(
    ("phi", "steps", "kind"),
    [
        (0.0, 1_000, "level"), (0.9, 1_000, "level"), (0.9, 1_000, "tail"),
        pytest.param(0.99, 20_000, "tail", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_intervals_of_a_ratio_hold_the_true_one_as_often_as_they_say(phi, steps, kind):
    ds = runs_of(3 * ar1(phi, steps, 500, 1), ar1(phi, steps, 500, 2))
    found = variance_ratio(ds, "loss", steps, kind=kind)
    given = found["why"] == ""
    assert float(given.mean()) > 0.95
    assert set(found["basis"].values[given]) == {"both"}
    covered = (found["low"] <= 9) & (found["high"] >= 9)
    assert 0.92 <= float(covered[given].mean()) <= 0.98


def test_what_the_two_orders_share_is_part_of_the_interval():
    common = ar1(0.5, 1_000, 500, 3)
    ds = runs_of(2 * (common + 0.3 * ar1(0.0, 1_000, 500, 4)), common + 0.3 * ar1(0.0, 1_000, 500, 5))
    found = variance_ratio(ds, "loss", 1_000, kind="level")
    assert 0.92 <= float(((found["low"] <= 4) & (found["high"] >= 4)).mean()) <= 0.98
    apart = runs_of(2 * ar1(0.5, 1_000, 500, 6), ar1(0.5, 1_000, 500, 7))
    width = np.log(found["high"] / found["low"]).mean()
    assert float(width) < 0.5 * float(
        np.log((alone := variance_ratio(apart, "loss", 1_000, kind="level"))["high"] / alone["low"]).mean()
    )


def test_a_window_that_is_too_short_has_no_interval_and_says_what_it_takes():
    found = variance_ratio(runs_of(ar1(0.99, 1_000, 500, 1), ar1(0.99, 1_000, 500, 2)), "loss", 1_000, kind="level")
    refused = found["low"].isnull()
    assert float(refused.mean()) > 0.98
    assert "is too short: worth " in str(found["why"].values[0])
    assert "50 are needed; that takes about" in str(found["why"].values[0])


def test_a_settling_order_counts_as_it_is_and_the_table_says_so():
    settling = np.broadcast_to(0.5 * 0.99 ** np.arange(1_000), (20, 1_000))
    found = variance_ratio(runs_of(ar1(0.5, 1_000, 20, 1), settling), "loss", 1_000)
    assert set(found["basis"].values) == {"backward as it is in this window"}
    assert bool((found["low"] < found["ratio"]).all())
    assert bool((found["ratio"] < found["high"]).all())


def test_nothing_is_said_of_what_does_not_vary_or_diverged():
    noise = ar1(0.0, 200, 1, 1)
    still = variance_ratio(runs_of(noise, np.ones((1, 200))), "loss", 200)
    assert still["ratio"].values.tolist() == [np.inf]
    assert still["why"].values.tolist() == ["backward does not vary, but by rounding"]
    assert np.isnan(still["low"].values).all()
    broken = noise.copy()
    broken[0, 150] = np.inf
    gone = variance_ratio(runs_of(broken, noise), "loss", 200)
    assert np.isnan(gone["ratio"].values).all()
    assert gone["why"].values.tolist() == ["diverged"]
    assert variance(runs_of(broken, noise), "loss", 200)["why"].values.tolist() == [["diverged"], [""]]


def test_a_rolling_variance_is_that_of_each_window():
    values = np.cumsum(ar1(0.5, 60, 1, 1), axis=1)
    ds = runs_of(values, values + 1e6)
    for kind, of_window in (("level", level_variance), ("tail", tail_variance), ("step", step_variance)):
        rolled = rolling_variance(ds, "loss", 12, kind)
        assert rolled.isnull().sum("step").values.tolist() == [[11], [11]]
        for end in (11, 30, 59):
            expected = of_window(ds.isel(step=slice(0, end + 1)), "loss", 12).values
            assert rolled.sel(step=end).values == pytest.approx(expected, rel=1e-12)


def test_one_slab_can_be_selected_and_an_interval_be_asked_of_it():
    ds = runs_of(ar1(0.0, 400, 3, 1), ar1(0.0, 400, 3, 2))
    whole = variance(ds, "loss")
    assert whole.attrs["window"] == 200
    one = variance(ds.sel(order="forward", seed=2), "loss")
    assert float(one["variance"].item()) == float(whole["variance"].sel(order="forward", seed=2))
    assert bool((whole["low"] < whole["variance"]).all())


def test_what_was_never_measured_is_told_apart_from_what_diverged():
    ds = runs_of(ar1(0.0, 100, 1, 1), ar1(0.0, 100, 1, 2))
    never = ds.assign(loss=ds["loss"] * np.nan, measured=(ds["measured"] * 0).assign_attrs(ds["measured"].attrs))
    with pytest.raises(StatisticError, match="loss: it was not measured at any recorded step"):
        variance(never, "loss")
    gap = ds.assign(measured=ds["measured"].where(ds["step"] != 90, 0).assign_attrs(ds["measured"].attrs))
    gap["measured"][1, 0, 90] = 1
    with pytest.raises(StatisticError, match="order 'forward', seed 0 was not measured at step 90"):
        variance(gap, "loss")


def test_what_rests_has_no_variance_but_rounding():
    noise = ar1(0.0, 200, 1, 1)
    for still in (np.full((1, 200), 0.1), 0.1 * np.ones((1, 200)) * np.arange(1, 201) / np.arange(1, 201)):
        found = variance_ratio(runs_of(noise, still), "loss", 200)
        assert found["ratio"].values.tolist() == [np.inf]
        assert found["why"].values.tolist() == ["backward does not vary, but by rounding"]
    assert tail_variance(runs_of(0.1 * np.arange(200.0)[None], noise), "loss", 200).values[0, 0] == 0


def test_scales_do_not_matter():
    plain = variance(runs_of(ar1(0.5, 1_000, 2, 1), ar1(0.5, 1_000, 2, 2)), "loss", 1_000)
    for scale in (1e-120, 1e120):
        scaled = variance(runs_of(scale * ar1(0.5, 1_000, 2, 1), scale * ar1(0.5, 1_000, 2, 2)), "loss", 1_000)
        assert scaled["low"].values == pytest.approx(plain["low"].values * scale**2, rel=1e-9)


def test_heavy_tails_are_worth_less():
    """Of lognormal values a few are most of the variance, and intervals from so few would not hold."""
    rng = np.random.default_rng(0)
    heavy = np.exp(1.5 * rng.standard_normal((50, 1_000)))
    assert float((variance(runs_of(heavy, heavy), "loss", 1_000)["why"] != "").mean()) > 0.7


def test_an_early_last_step_is_left_out_everywhere():
    ds = runs_of(ar1(0.0, 206, 1, 1), ar1(0.0, 206, 1, 2)).isel(step=[*range(0, 201, 10), 205])
    assert rolling_variance(ds, "loss", 5).step.values[-1] == 200
    assert variance(ds, "loss", 20).attrs["to_step"] == 200


def test_selections_that_say_too_little_are_refused():
    ds = runs_of(ar1(0.0, 100, 1, 1), ar1(0.0, 100, 1, 2))
    with pytest.raises(StatisticError, match="select steps, orders and seeds, not variables"):
        variance(ds[["loss"]], "loss")
    with pytest.raises(StatisticError, match="one step was selected"):
        variance(ds.isel(step=5), "loss")
    with pytest.raises(StatisticError, match="the steps decrease"):
        variance(ds.isel(step=slice(None, None, -1)), "loss")


def test_losses_of_float32_states_are_known_no_better_than_float32(record):
    """They are evaluated in float64, and then move by more than float64's rounding where nothing trains any more."""
    problem = {"family": "least-squares", "n": 40, "d": 4, "ridge": 0.5, "dtype": "float32"}
    stored = record({"name": "ridge", "problem": problem, "operator": {"family": "sgd", "lr": 0.05}, "steps": 3_000,
                     "seeds": [0], "orders": ["forward", "backward"], "record": {"every": 5}})  # fmt: skip
    found = variance(stored.dataset(), "train_loss").sel(order="backward")
    assert float(found["variance"][0]) == 0
    assert found["why"].item() == "does not vary, but by rounding"
