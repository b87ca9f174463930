"""Verdicts on processes whose behaviour is known: seldom undecided where they can be told, and hardly ever wrong."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
import xarray as xr
from trajstore.analysis import convergence, variance
from trajstore.analysis.convergence import judge
from trajstore.analysis.spaces import embedded, paths_of

import trajstore as ts
from tests.analysis.processes import (
    KNOWN,
    PROCESSES,
    epochs,
    last_half,
    path,
    quadratic,
    round_and_round,
    wandering,
    waves,
)
from tests.conftest import sampled
from trajstore.errors import NotFoundError, StatisticError


@pytest.mark.parametrize("name", KNOWN)
def test_the_verdict_is_right(name):
    """A law is seen in four of five windows: each of the tests that nothing wanders costs some of them."""
    right, process = KNOWN[name]
    rng = np.random.default_rng(0)
    verdicts = Counter(judge(last_half(process(rng))).verdict for _ in range(40))
    wrong = 40 - verdicts[right] - verdicts["undecided"]
    assert verdicts[right] >= (26 if right == "distribution" else 36), verdicts
    assert wrong <= 1, verdicts


@pytest.mark.parametrize("name", sampled(PROCESSES, every=2))
def test_no_definite_verdict_contradicts_the_process(name):
    """A seeded sample of `python -m tests.tools.calibration verdicts`, which asks for 2% of 200 runs at each length."""
    contradicts, make = PROCESSES[name]
    for steps in (400, 2_000):
        verdicts = Counter(judge(last_half(v)).verdict for v in make(np.random.default_rng(steps), 20, steps))
        assert sum(verdicts[verdict] for verdict in contradicts) <= 1, (steps, verdicts)


@pytest.mark.parametrize("period", [2, 3, 4, 5, 7, 12, 31, 64])
@pytest.mark.parametrize("noise", [0.0, 1e-9, 0.3])
def test_what_returns_is_a_cycle_and_no_distribution(period, noise):
    made = round_and_round(np.random.default_rng(period), 5, 2_000, period, noise)
    for points in (*made, np.column_stack(made)):
        judged = judge(last_half(points))
        assert judged.verdict == "undecided"
        assert f"it returns every {period} recorded steps to where it was: a cycle" in judged.why
        assert judged.period == period
        assert judged.lines > 0.5


@pytest.mark.parametrize("returns", [2, 3, 4])
def test_a_cycle_of_few_returns_is_no_distribution(returns):
    """Harmonics so close that none stands out of what is beside it."""
    made = round_and_round(np.random.default_rng(returns), 10, 4_000, period := 2_000 // returns)
    judged = [judge(last_half(points)) for points in (*made, np.column_stack(made))]
    assert {one.verdict for one in judged} == {"undecided"}
    assert {one.period for one in judged} == {period}
    assert all("recorded steps" in one.why and "to where it was" in one.why for one in judged)


def test_batches_in_the_same_order_end_in_a_cycle():
    judged = [judge(last_half(points)) for points in epochs(np.random.default_rng(0), 20, 2_401, 300)]
    assert {one.verdict for one in judged} == {"undecided"}
    assert {one.period for one in judged} == {300}
    assert all(one.returns > 0.95 for one in judged)


def test_stationary_noise_does_not_return_and_wanders_only_by_chance():
    rng = np.random.default_rng(6)
    for name in ("AR(1), φ = 0.0", "AR(1), φ = 0.9", "AR(1), φ = -0.9", "least squares, forward"):
        judged = [judge(last_half(points)) for points in PROCESSES[name][1](rng, 60, 2_000)]
        assert not any(one.returns > 0.8 for one in judged), name
        # What is correlated over a hundredth of the window is a little slower than the waves beside it.
        assert sum(one.slow <= 0.1 for one in judged) <= (12 if name in ("AR(1), φ = 0.0", "AR(1), φ = -0.9") else 24)


@pytest.mark.parametrize("size", [1.0, 2.0])
def test_noise_about_a_walk_is_no_distribution_and_says_why(size):
    judged = [judge(last_half(points)) for points in wandering(np.random.default_rng(8), 40, 4_000, size)]
    assert sum(one.verdict == "distribution" for one in judged) <= 1
    assert sum(one.slow <= 0.1 for one in judged) >= 38
    assert any("its slowest waves are too strong" in one.why for one in judged)
    assert any("which is little but no chance" in one.why for one in judged)


@pytest.mark.parametrize("power", [-1 / 3, 1 / 3])
def test_noise_that_falls_or_grows_slowly_is_no_distribution(power):
    """By 1.26 over the window, which is little, and by 1.59 over the window and half as much before it."""
    made = np.random.default_rng(2).standard_normal((40, 2_000)) * np.arange(1, 2_001.0) ** power
    judged = [judge(last_half(row)) for row in made]
    assert sum(one.verdict == "distribution" for one in judged) <= 1
    if power < 0:
        known = [one.steady_low <= 4 ** (1 / 3) <= one.steady_high for one in judged]
        assert np.mean(known) > 0.85


def test_a_wave_as_long_as_the_run_does_not_drift_though_the_window_sees_it_go_one_way():
    made = waves(np.random.default_rng(3), 20, 4_000, 4_000, 0.3)
    judged = [judge(last_half(row)) for row in made]
    assert {one.verdict for one in judged} == {"undecided"}
    alone = [judge(path(row[-2_000:])) for row in made]
    assert {one.verdict for one in alone} == {"undecided"}
    assert any("no steps before the window tell whether it goes on" in one.why for one in alone)


@pytest.mark.parametrize("every", [1, 3])
def test_of_a_recording_from_the_start_all_moves_before_the_window_are_known(tmp_path, every):
    """Though at the first step there is no distance to an iterate before."""
    changes = {"steps": 480, "seeds": [0, 1], "orders": ["forward", "backward"], "record": {"every": every}}
    ds = ts.run(ts.Experiment.preset("quadratic", changes), tmp_path / "s.zarr", workers=0).dataset()
    seen, paths = paths_of(ds, "parameters", None, 40)
    for order, seed in product(range(2), range(2)):
        places = ds["params"].isel(order=order, seed=seed).transpose("snapshot", "param").values
        moves = np.linalg.norm(np.diff(places, axis=0), axis=1)[1 : -len(seen)]
        known = paths[order][seed]
        assert known.earlier == pytest.approx(np.where(moves > 1e-12, moves, 0), rel=1e-5, abs=1e-12)
        assert len(known.moves_half_before) == len(known.moves) // 2
        assert len(known.half_before) == len(known.points) // 2
    assert not convergence(ds)["why"].str.contains("no steps before").any()


def test_without_steps_before_the_window_moves_may_change_by_less():
    """Half of a run over which noise falls as n^-⅓ looks steady by itself."""
    noise = np.random.default_rng(4).standard_normal((10, 16_000))
    falls = noise[:, :8_000] * np.arange(8_000.0, 16_000) ** (-1 / 3)
    assert sum(judge(path(row)).verdict == "distribution" for row in falls) <= 1
    steady = Counter(judge(path(row)).verdict for row in noise)
    assert steady["distribution"] >= 5


def test_what_is_compared_is_what_is_told():
    noise = np.random.default_rng(9).standard_normal(2_000)
    for name, change in (("grow", 1.001), ("shrink", 0.999)):
        judged = judge(last_half(noise * change ** np.arange(2_000)))
        ends = (judged.steady_low, judged.steady_high)
        low, high = ends if name == "shrink" else (1 / ends[1], 1 / ends[0])
        over = "the window and half as much before it"
        told = f"moves {name} {low:.2g} to {high:.2g} times over {over} if they vary as noise"
        assert judged.why.startswith(f"{told}, and a distribution allows 1.5")
    slow = judge(last_half(5 * 0.999 ** np.arange(2_001) * (1 + 0.01 * np.random.default_rng(9).random(2_001))))
    assert f"moves shrink {slow.shrinks_low:.2g} to {slow.shrinks_high:.2g} times" in slow.why
    assert "a point asks for 10 at 99%" in slow.why


def test_a_cycle_that_is_approached_is_a_cycle():
    for shrinking in (0.9, 0.99, 0.999):
        made = round_and_round(np.random.default_rng(0), 5, 2_000, 3, shrinking=shrinking)
        assert {judge(last_half(row)).verdict for row in made} == {"undecided"}
    ends = judge(last_half((-1.0) ** np.arange(2_000) * 0.9 ** np.arange(2_000)))
    assert ends.verdict == "point"


def test_noise_of_any_kind_is_no_cycle():
    """Swinging noise has a broad peak and no line."""
    rng = np.random.default_rng(0)
    for name in ("AR(1), φ = 0.5", "AR(2) that swings", "noise, t of 2 degrees", "chaos", "two constants, forward"):
        judged = [judge(last_half(row)) for row in PROCESSES[name][1](rng, 40, 4_000)]
        assert sum(one.lines >= 0.1 for one in judged) <= 1, name


def test_a_walk_that_rests_may_move_again():
    """Products with exponent 0 whose moves are below rounding: they will be above it again."""
    rng = np.random.default_rng(3)
    judged = [judge(last_half(row)) for row in PROCESSES["exponent 0, steps of 1.0"][1](rng, 100, 4_000)]
    resting = [one for one in judged if "nothing moves" in one.why]
    assert len(resting) > 20
    assert sum(one.verdict == "point" for one in resting) <= 2
    assert any("its moves may grow again" in one.why for one in resting)


def test_a_spike_hides_neither_drift_nor_walk():
    rng = np.random.default_rng(4)
    drift = rng.standard_normal(4_000) + 0.02 * np.arange(4_000)
    plain = judge(last_half(drift))
    for size, verdict in ((1e2, "drifting"), (1e6, "undecided"), (1e12, "undecided")):
        spiked = drift.copy()
        spiked[3_000] = size
        found = judge(last_half(spiked))
        assert found.drift == pytest.approx(plain.drift, rel=0.25)
        assert found.effective == pytest.approx(plain.effective, rel=0.5)
        assert plain.verdict == "drifting"
        assert found.verdict == verdict
        assert verdict == "drifting" or found.why.startswith("moves grow")  # two moves so long may be part of a change


def test_what_slows_down_is_not_drifting():
    noise = 0.01 * np.random.default_rng(5).standard_normal(4_000)
    n = np.arange(1.0, 4_001)
    assert judge(last_half(n / 1_000 + noise)).verdict == "drifting"
    for curve in (1 / np.sqrt(n), 10 / n, 1 / np.log(n + 1), np.exp(-n / 1_000)):
        judged = judge(last_half(20 * curve + noise))
        assert judged.verdict == "undecided"
        assert "it wanders off, but slows down" in judged.why
        assert judged.lines == 0


def test_what_is_too_short_to_tell_is_undecided_and_says_why():
    rng = np.random.default_rng(1)
    judged = [judge(last_half(quadratic(rng, 0.01, 200, "backward"))) for _ in range(200)]
    assert Counter(e.verdict for e in judged)["undecided"] >= 190
    assert "a longer window may decide it" in judged[0].why
    assert "moves shrink" in judged[0].why


def test_a_random_walk_is_no_distribution():
    rng = np.random.default_rng(1)
    verdicts = Counter(judge(last_half(np.cumsum(rng.standard_normal(1_001)))).verdict for _ in range(200))
    assert verdicts["distribution"] + verdicts["point"] <= 10


def test_a_slow_descent_is_no_point_before_it_has_shrunk():
    descent = judge(last_half(5 * 0.999 ** np.arange(1_001)))
    assert descent.verdict != "point"
    assert descent.rate == pytest.approx(0.999, rel=1e-9)
    assert judge(last_half(5 * 0.99 ** np.arange(1_001))).verdict == "point"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    store = tmp_path_factory.mktemp("verdicts") / "runs.zarr"

    def record(preset, **changes):
        experiment = ts.Experiment.preset(preset, {"name": "-".join(changes["orders"]), "seeds": [0, 1], **changes})
        return ts.run(experiment, store).dataset()

    return {
        "jumps": record("two-constants", steps=2_000, orders=["forward"]),
        "stays": record("two-constants", steps=200, orders=["backward"]),
        "quadratic": record("quadratic", steps=400, orders=["forward", "backward"]),
    }


def test_a_recorded_experiment_is_judged_in_parameters_and_in_losses(recorded):
    jumps, stays = convergence(recorded["jumps"]), convergence(recorded["stays"])
    assert jumps["verdict"].values.tolist() == [["distribution"] * 2]
    assert stays["verdict"].values.tolist() == [["point"] * 2]
    assert jumps.attrs["metric"] == "parameters"
    assert jumps["diameter"].values.tolist() == [[2, 2]]
    assert stays["diameter"].values.tolist() == [[0, 0]]
    backward = convergence(recorded["quadratic"], "train_loss").sel(order="backward")
    assert backward["verdict"].values.tolist() == ["point", "point"]
    assert bool(((backward["rate_low"] < 0.91) & (backward["rate_high"] > 0.89)).all())


def test_parameters_know_the_iterates_before_their_window(recorded):
    """Of one parameter the sketch is the parameter, but for where it is 0, and all its steps are stored."""
    ds = recorded["quadratic"]
    seen, paths = paths_of(ds, "parameters", None, 40)
    begin, half = int(seen.steps[0]), len(seen) // 2
    for order, (one, *_) in zip(ds["order"].values, paths, strict=True):
        states = ds["params"].sel(order=order, seed=ds["seed"][0]).transpose("snapshot", "param").values[:, 0]
        gone = np.abs(np.diff(np.append(one.half_before[:, 0], one.points[:, 0])))
        assert gone == pytest.approx(np.abs(np.diff(states[begin - half :])), abs=1e-6)
        moves = np.abs(np.diff(states))[: begin - 1]
        assert len(one.moves_half_before) == len(one.moves) // 2
        told = one.moves_half_before
        assert told[told > 0] == pytest.approx(moves[-len(told) :][told > 0], rel=1e-6)


def test_in_the_sum_of_losses_only_a_loss_of_zero_is_a_point(recorded):
    """Appendix G: the loss of the quadratic's backward limit is not 0, so d(x, y) = L(x) + L(y) does not shrink."""
    found = convergence(recorded["quadratic"], "sum:train_loss").sel(order="backward")
    assert not (found["verdict"] == "point").any()
    loss = 0.5 * 0.9 ** np.arange(401)
    values = np.stack([loss, loss])[:, None]
    dims, here = ("order", "seed", "step"), np.ones(values.shape, dtype=bool)
    ds = xr.Dataset(
        {"loss": (dims, values), "measured": (dims, here.astype(int), {"flag_meanings": "loss"})},
        {"order": ["a", "b"], "seed": [0], "step": np.arange(401), "recorded": (dims, here)},
    )
    assert convergence(ds, "sum:loss")["verdict"].values.tolist() == [["point"], ["point"]]


def test_a_layer_is_judged_by_the_exact_distances_of_its_states(recorded):
    ds = recorded["quadratic"]
    whole, layer = convergence(ds, "parameters"), convergence(ds, "layer:theta")
    assert layer["verdict"].equals(whole["verdict"])
    assert layer["move"].values == pytest.approx(whole["move"].values, rel=1e-9)
    assert layer["diameter"].values == pytest.approx(whole["diameter"].values, rel=1e-9)
    with pytest.raises(NotFoundError, match="theta"):
        convergence(ds, "layer:thetta")
    with pytest.raises(StatisticError, match="30 states are stored"):
        convergence(ds.isel(snapshot=slice(30)), "layer:theta")


def test_points_are_found_from_their_distances():
    points = np.random.default_rng(0).standard_normal((40, 3)) * [5, 1, 0.1]
    apart = np.sqrt(((points[:, None] - points) ** 2).sum(-1))
    found = embedded(apart)
    assert found.shape == (40, 3)
    assert np.sqrt(((found[:, None] - found) ** 2).sum(-1)) == pytest.approx(apart, abs=1e-9)


def test_a_window_that_is_even_but_not_every_step_has_a_rate_a_step(recorded):
    every = recorded["quadratic"].isel(step=slice(0, None, 2))
    found = convergence(every, "train_loss").sel(order="backward")
    assert bool(((found["rate_low"] < 0.91) & (found["rate_high"] > 0.89)).all())


def test_the_stationary_variance_is_in_its_interval():
    """Section 3.1: hσ² / (2 − h), from windows of 200/h steps and more."""
    h, rng = 0.1, np.random.default_rng(3)
    runs = np.stack([quadratic(rng, h, 4_200, "forward") for _ in range(200)])
    dims, here = ("order", "seed", "step"), np.ones((1, *runs.shape), dtype=bool)
    ds = xr.Dataset(
        {"theta": (dims, runs[None]), "measured": (dims, here.astype(int), {"flag_meanings": "theta"})},
        {"order": ["forward"], "seed": np.arange(200), "step": np.arange(4_201), "recorded": (dims, here)},
    )
    found = variance(ds, "theta", window=4_000, kind="level")
    held = (found["low"] <= h / (2 - h)) & (found["high"] >= h / (2 - h))
    assert 0.90 <= float(held.mean()) <= 0.99
    assert float(variance(ds, "theta", window=100, kind="level")["variance"].mean()) < 0.9 * h / (2 - h)


def test_what_cannot_be_judged_is_refused(recorded):
    ds = recorded["quadratic"]
    with pytest.raises(NotFoundError, match="no metric 'train_los'; did you mean 'train_loss'"):
        convergence(ds, "train_los")
    with pytest.raises(StatisticError, match="window is 10; this statistic needs at least 40 steps"):
        convergence(ds, window=10)
    with pytest.raises(StatisticError, match="it was measured at 31 steps, fewer than the window of 40"):
        convergence(ds.isel(step=slice(0, 31)), "train_loss")
    broken = ds.assign(
        train_loss=ds["train_loss"].where(ds["step"] != 390, np.inf).assign_attrs(ds["train_loss"].attrs)
    )
    assert set(convergence(broken, "train_loss")["why"].values.ravel()) == {"diverged within the window"}


def test_a_metric_of_few_values_that_pauses_has_not_settled():
    """An accuracy that jumps now and then between two values, for ever."""
    rng = np.random.default_rng(0)
    for often, steps in ((0.05, 100), (0.05, 200), (0.005, 2_000)):
        jumps = np.cumsum(rng.random((200, steps)) < often, axis=1) % 2
        verdicts = Counter(judge(last_half(0.5 + 0.25 * jump)).verdict for jump in jumps if np.ptp(jump[steps // 2 :]))
        assert verdicts["point"] <= 0.05 * verdicts.total(), (often, steps, verdicts)


def test_rounding_is_that_of_the_values_themselves():
    rng = np.random.default_rng(0)
    assert judge(last_half(1e8 + rng.standard_normal(4_000))).verdict == "distribution"
    spiked = 1 + 0.1 * rng.standard_normal(2_000)
    spiked[1_000] = 1e6
    assert judge(last_half(spiked)).verdict != "point"


def test_scales_do_not_change_a_verdict():
    rng = np.random.default_rng(0)
    for scale in (1e-280, 1e-160, 1e160, 1e300):
        assert judge(last_half(scale * quadratic(rng, 0.1, 4_000, "forward"))).verdict != "drifting"
        descent = judge(last_half(scale * 0.9 ** np.arange(201.0)))
        assert (descent.verdict, descent.rate) == ("point", pytest.approx(0.9))


def test_resets_within_the_window_are_counted(recorded, record):
    ds = record("quadratic", steps=300, seeds=[0], orders=["backward/50", "backward"]).dataset()
    assert convergence(ds)["resets"].values.tolist() == [[2], [0]]
    assert variance(ds, "train_loss")["resets"].values.tolist() == [[2], [0]]


def test_every_other_step_has_the_distances_of_every_other_step(recorded):
    """What is recorded are distances to the step before, which a dataset of every other step does not have."""
    every = recorded["quadratic"].isel(step=slice(0, None, 2))
    found = convergence(every)["move"].sel(order="forward", seed=0)
    theta = recorded["quadratic"]["params"].sel(order="forward", seed=0).values[0, ::2]
    quarter = np.abs(np.diff(theta[-100:]))[-24:]
    assert float(found) == pytest.approx(float(np.median(quarter)))
    assert float(found) != pytest.approx(float(convergence(recorded["quadratic"])["move"][0, 0]), rel=0.1)


@pytest.mark.parametrize("points", [
    np.random.default_rng(0).standard_normal((700, 5)), np.random.default_rng(1).standard_normal((600, 3)) + 1e6,
    np.cumsum(np.random.default_rng(2).standard_normal((900, 2)), axis=0), np.zeros((300, 2)),
])  # fmt: skip
def test_a_diameter_is_of_all_iterates(points):
    """Against all distances, taken one by one; 256 evenly chosen iterates have less in each of these."""
    from scipy.spatial.distance import pdist

    found = judge(path(points))
    assert found.diameter == pytest.approx(pdist(points).max(), rel=1e-12)
    assert found.tail_diameter == pytest.approx(pdist(points[-len(points) // 4 :]).max(), rel=1e-12)


def test_of_more_iterates_than_are_compared_it_is_no_smaller_than_that_of_the_tail():
    """Those farthest from the mean are near each other here, and those of the tail are not among them."""
    from trajstore.analysis.extent import extent_of

    rng = np.random.default_rng(0)
    ends = np.c_[np.zeros(10_000), np.linspace(-3.5, 3.5, 10_000)]
    points = np.r_[1e-3 * rng.standard_normal((20_000, 2)), [10, 0] + 1e-3 * rng.standard_normal((10_000, 2)), ends]
    found = extent_of(points, path(points).moves)
    assert found["tail_diameter"] == pytest.approx(7)
    assert found["diameter"] == pytest.approx(np.hypot(10, 3.5), rel=1e-3)
    assert extent_of(points[:, :1], path(points[:, :1]).moves)["diameter"] == np.ptp(points[:, 0])
