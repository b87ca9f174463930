"""The three variances on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from trajstore.analysis import forward_over_backward, level_variance, step_variance, tail_variance

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


def test_the_ratio_is_forward_over_backward_for_each_seed():
    rng = np.random.default_rng(3)
    ds = dataset(10 * rng.standard_normal(1000), rng.standard_normal(1000))
    ratio = forward_over_backward(level_variance(ds, "loss", 1000))
    assert ratio.dims == ("seed",)
    assert float(ratio[0]) == pytest.approx(100, rel=0.2)
    with pytest.raises(StatisticError, match="there is no 'backward'"):
        forward_over_backward(level_variance(ds.sel(order=["forward"]), "loss", 10))


def test_a_diverged_slab_has_no_variance():
    series = np.ones(20)
    broken = series.copy()
    broken[15] = np.nan
    assert np.isnan(tail_variance(dataset(series, broken), "loss", 10).values).tolist() == [[False], [True]]


def test_what_cannot_be_had_is_refused():
    ds = dataset(np.ones(20), np.ones(20))
    with pytest.raises(NotFoundError, match="no metric 'los'; did you mean 'loss'"):
        level_variance(ds, "los")
    with pytest.raises(StatisticError, match="20 steps are recorded, fewer than the window of 21"):
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
    with pytest.raises(StatisticError, match=r"the grid is adaptive, so steps .* would be wrong; record them evenly"):
        tail_variance(ds, "test_loss", window=20)
