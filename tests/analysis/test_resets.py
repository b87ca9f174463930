"""Resets of the quadratic, whose levels before and after are known."""

from __future__ import annotations

import numpy as np
import pytest
from trajstore.analysis import resets

from tests.analysis.processes import ar1, runs_of
from tests.tools.calibration import nothing_changes, other_forwards, told_of
from trajstore.errors import NotFoundError, StatisticError

H = 0.1


@pytest.fixture
def ds(record):
    """Backward with a reset at step 200, and forward beside it."""
    orders = ["forward", "backward+backward@200"]
    return record("quadratic", steps=500, seeds=[0, 1, 2], orders=orders).dataset()


def limits(ds, seed):
    """Where backward goes to: Σ h(1 − h)^(i−1) ε_i over all batches, and over those after the reset."""
    from trajstore.problems.batches import generator

    noise = np.array([generator(seed, "noise", i).standard_normal(1)[0] for i in range(1, 501)])
    weights = H * (1 - H) ** np.arange(500)
    return weights @ noise, weights[:300] @ noise[200:]


def test_a_reset_is_found_and_its_levels_are_those_of_the_closed_form(ds):
    found = resets(ds, "train_loss")
    assert found["order"].values.tolist() == ["backward+backward@200"] * 3
    assert found["seed"].values.tolist() == [0, 1, 2]
    assert found["step"].values.tolist() == [200] * 3
    for k, seed in enumerate((0, 1, 2)):
        before, after = (0.5 * theta**2 for theta in limits(ds, seed))
        reset = found.isel(reset=k)
        for side, level in (("before", before), ("after", after)):
            assert float(reset[f"{side}_low"]) - 1e-5 <= level <= float(reset[f"{side}_high"]) + 1e-5
            assert float(reset[side]) == pytest.approx(level, abs=1e-3)
        assert str(reset["settles"].values) == "elsewhere"
        assert str(reset["why"].values) in (
            "the leg before shrinks to a point",
            "forward stands still over the same steps",
        )
        assert float(reset["difference"]) == pytest.approx(after - before, abs=1e-3)
        assert 10 <= float(reset["settled_after"]) <= 80


def test_forward_is_compared_with_the_levels_over_the_steps_of_the_new_leg(ds):
    found = resets(ds, "train_loss").isel(reset=1)
    during = ds["train_loss"].sel(order="forward", seed=1).values[201:]
    low, high = sorted((float(found["before"]), float(found["after"])))
    assert float(found["forward_between"]) == pytest.approx(((during >= low) & (during <= high)).mean())
    above = during > float(found["before"])
    assert float(found["forward_crosses_before"]) == pytest.approx(100 * (above[1:] != above[:-1]).sum() / 299)
    alone = resets(ds.sel(order=["backward+backward@200"]), "train_loss")
    assert np.isnan(alone["forward_between"].values).all()


def test_every_leg_of_a_window_is_a_reset(record):
    ds = record("quadratic", steps=250, seeds=[0], orders=["backward/100"]).dataset()
    found = resets(ds, "train_loss")
    assert found["step"].values.tolist() == [100, 200]
    short = record("quadratic", name="short", steps=210, seeds=[0], orders=["backward/100"]).dataset()
    assert resets(short, "train_loss")["settles"].values.tolist()[1] == "too short"
    assert np.isnan(resets(short, "train_loss")["after"].values[1])


def test_the_same_level_is_not_told_apart():
    import xarray as xr

    rng = np.random.default_rng(0)
    values, dims = rng.standard_normal((1, 200, 400)), ("order", "seed", "step")
    here = np.ones(values.shape, dtype=int)
    legs = np.where(np.arange(400) > 200, 200, 0) * here
    ds = xr.Dataset(
        {"loss": (dims, values), "measured": (dims, here, {"flag_meanings": "loss"}), "leg": (dims, legs)},
        {"order": ["noise"], "seed": np.arange(200), "step": np.arange(400), "recorded": (dims, here > 0)},
    )
    found = resets(ds, "loss")
    apart = (found["difference_low"] > 0) | (found["difference_high"] < 0)
    assert 0.01 <= float(apart.mean()) <= 0.10
    assert "elsewhere" not in found["settles"].values  # nothing tells


def test_without_a_reset_there_is_nothing_to_say(ds, record):
    with pytest.raises(StatisticError, match="no order of forward begins a new leg"):
        resets(ds.sel(order=["forward"]), "train_loss")
    with pytest.raises(NotFoundError, match="did you mean 'train_loss'"):
        resets(ds, "train_los")
    tiny = record("quadratic", name="tiny", steps=20, seeds=[0], orders=["backward/10"]).dataset()
    with pytest.raises(StatisticError, match="a level needs a leg of 32 recorded steps"):
        resets(tiny, "train_loss")


def sham(values):
    """Legs that change in the middle, of a process that does not."""
    import xarray as xr

    values, dims = np.asarray(values)[None], ("order", "seed", "step")
    steps = values.shape[-1]
    legs = np.where(np.arange(steps) > steps // 2, steps // 2, 0) * np.ones(values.shape, dtype=int)
    here = np.ones(values.shape, dtype=int)
    return xr.Dataset(
        {"loss": (dims, values), "measured": (dims, here, {"flag_meanings": "loss"}), "leg": (dims, legs)},
        {
            "order": ["noise"],
            "seed": np.arange(values.shape[1]),
            "step": np.arange(steps),
            "recorded": (dims, here > 0),
        },
    )


@pytest.mark.parametrize(("phi", "steps"), [(0.5, 256), (0.9, 400), (0.9, 4_000), (0.99, 1_000)])
def test_a_reset_that_changes_nothing_is_hardly_ever_told_apart(phi, steps):
    found = resets(sham(ar1(phi, steps, 200, 1)), "loss")
    assert float((found["settles"] == "undecided").mean()) <= 0.08
    assert "elsewhere" not in found["settles"].values


def test_a_curve_that_only_later_begins_to_fall_is_no_effect_of_a_reset():
    curve = nothing_changes(800)["sigmoid at 0.3"]
    assert "elsewhere" not in told_of(curve, 20, 1e-3, 0.0, 0.0, "forward")
    alone = told_of(curve, 20, 1e-3, 0.0, 0.0, "alone")
    assert set(alone) == {"undecided"}


@pytest.mark.parametrize("name", ["sigmoid at 0.1", "exponential of 0.5 legs", "n^-3", "slope", "flat"])
@pytest.mark.parametrize("beside", ["forward", "without", "alone"])
def test_what_the_metric_was_doing_anyway_is_no_effect_of_a_reset(name, beside):
    told = told_of(nothing_changes(800)[name], 50, 0.3, 0.5, 0.0, beside)
    assert told.count("elsewhere") <= 1


@pytest.mark.parametrize("name", other_forwards(800))
@pytest.mark.parametrize("size", [0.0, 0.05, 0.3])
def test_a_forward_that_falls_otherwise_is_no_effect_of_a_reset(name, size):
    """Orders share no curve: one falls further than the other, or later."""
    curve, forward = other_forwards(800)[name]
    told = told_of(curve, 30, size, 0.0, 0.0, "forward", forward)
    assert told.count("elsewhere") <= 1
    if "later" in name and size == 0.05:
        assert "undecided" in told


def test_the_same_accuracy_before_a_reset_is_not_the_same_order():
    """Any order rests at the accuracy of guessing; forward is none that goes on without the reset for that."""
    steps, leg, runs = 800, 400, 20
    after = np.arange(steps) > leg
    noise = 0.02 * np.random.default_rng(0).standard_normal((2, runs, steps))
    forward, mine = (np.where(after, level + noise[k], 0.1) for k, level in enumerate((0.8, 0.78)))
    for other in ("forward", "backward/3"):
        ds = runs_of(forward, mine).assign_coords(order=[other, f"backward+backward@{leg}"])
        legs = np.zeros(ds["loss"].shape, dtype=int)
        legs[1, :, leg + 1 :] = leg
        found = resets(ds.assign(leg=(ds["loss"].dims, legs)), "loss")
        assert not any("same without the reset" in why for why in found["why"].values)
        if other == "forward":
            assert set(found["settles"].values.tolist()) == {"undecided"}
            assert set(found["why"].values.tolist()) == {
                "forward changes over the same steps as well, and orders need not change alike"
            }


@pytest.mark.parametrize("beside", ["forward", "without"])
@pytest.mark.parametrize("name", ["flat", "exponential of 0.2 legs"])
def test_a_real_change_is_found(name, beside):
    """By 1 in white noise of 0.3 nearly always, by 0.3 in half; in AR(1) where the legs are worth enough values."""
    told = told_of(nothing_changes(800)[name], 50, 0.3, 0.0, 1.0, beside)
    assert told.count("elsewhere") >= 47
    small = told_of(nothing_changes(800)[name], 30, 0.3, 0.0, 0.3, beside)
    assert small.count("elsewhere") >= 12
    correlated = told_of(nothing_changes(800)[name], 30, 0.3, 0.5, 1.0, beside)
    assert correlated.count("elsewhere") >= (18 if beside == "without" else 12)
    assert "not told apart" not in [*told, *correlated]


def test_the_order_without_the_reset_tells_best(record):
    orders = ["backward", "backward+backward@150"]
    found = resets(record("quadratic", name="both", steps=300, seeds=[0], orders=orders).dataset(), "train_loss")
    assert found["why"].values.tolist() == ["backward, which is the same without the reset"]
    assert found["settles"].values.tolist() == ["elsewhere"]


ADAPTIVE = {"adaptive": "train_loss", "tolerance": 1e-3}


def test_on_an_adaptive_grid_it_is_refused_with_the_longest_even_window(record):
    orders = ["forward", "backward+backward@100"]
    sparse = record("quadratic", name="sparse", steps=200, seeds=[0], orders=orders, record=ADAPTIVE).dataset()
    says = r"order 'backward\+backward@100', seed 0, leg from step 0: steps \d+ to 100 are recorded at uneven distances"
    for one in (sparse, sparse.sel(order=["backward+backward@100"]).sel(seed=[0])):
        with pytest.raises(StatisticError, match=says):
            resets(one, "train_loss")


def test_of_a_dense_tail_the_levels_are_those_of_a_dense_recording(record):
    orders = ["forward", "backward+backward@100"]
    wanted = {"steps": 200, "seeds": [0], "orders": orders}
    whole = record("quadratic", name="whole", **wanted).dataset()
    tails = record("quadratic", name="tails", **wanted, record={**ADAPTIVE, "dense_tail": 40}).dataset()
    assert int(tails["recorded"].sel(order="backward+backward@100", seed=0).sum()) < 150
    expected, found = resets(whole, "train_loss", 40), resets(tails, "train_loss")
    for name in ("before", "before_low", "after", "after_high", "difference", "before_from", "after_from", "after_to"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, atol=1e-12)
    assert found["settles"].values.tolist() == expected["settles"].values.tolist()
    there = tails["recorded"].sel(order="backward+backward@100", seed=0).values
    recorded = tails["step"].values[there & (tails["step"].values > 100)] - 100
    settled, exactly = (int(one["settled_after"][0]) for one in (found, expected))
    at = recorded.tolist().index(settled)
    assert (recorded[at - 1] if at else 0) < exactly <= settled
    with pytest.raises(
        StatisticError, match=r"a longer dense_tail, now 40; the longest even window at the end of every leg is [4-9]\d"
    ):
        resets(tails, "train_loss", 95)


def test_a_leg_that_rests_or_diverges_is_told_as_such():
    still = resets(sham(np.full((1, 200), 0.1)), "loss").isel(reset=0)
    assert (str(still["settles"].values), float(still["before"])) == ("not told apart", 0.1)
    broken = np.full((1, 200), 0.1)
    broken[0, 180:] = np.nan
    assert resets(sham(broken), "loss")["settles"].values.tolist() == ["diverged"]
