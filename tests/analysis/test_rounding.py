"""What is rounding, told from values alone, whatever a single one of them does."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from trajstore.analysis import convergence, local_variance_ratio, variance
from trajstore.analysis.rounding import Precision, of_moves, of_steps
from trajstore.analysis.windows import precision_of

import trajstore as ts
from tests.analysis.processes import runs_of

SINGLE = np.float32


@pytest.mark.parametrize("spiked", ["forward", "backward", "both"])
@pytest.mark.parametrize("dtype", [SINGLE, np.float64])
@pytest.mark.parametrize("size", [2_000.0, 1e200])
def test_one_spike_does_not_take_the_variance_of_other_blocks_for_rounding(spiked, dtype, size):
    """The true ratio is 100. A spike makes one block of 32 vary more, and widens the interval."""
    if dtype is SINGLE and size > 1e38:
        pytest.skip("no float32 is so large")
    rng = np.random.default_rng(0)
    forward, backward = (
        (scale * rng.standard_normal((40, 800)) + 0.5).astype(dtype).astype(float) for scale in (1e-2, 1e-3)
    )
    plain = local_variance_ratio(runs_of(forward, backward), "loss", 800)
    for values in {"forward": [forward], "backward": [backward], "both": [forward, backward]}[spiked]:
        values[:, 417] = SINGLE(size) if dtype is SINGLE else size
    found = local_variance_ratio(runs_of(forward, backward), "loss", 800)
    assert float(((found["low"] <= 100) & (found["high"] >= 100)).mean()) >= 0.9
    change = abs(np.log(found["ratio"] / plain["ratio"])) / np.log(1e6 * size) / 2
    assert float(change.max()) < 1.5 / 32
    if spiked != "both":
        assert float((found["high"] / found["low"]).min()) > float((plain["high"] / plain["low"]).max())


def test_a_gap_to_an_outlier_is_no_step_of_a_metric():
    rng = np.random.default_rng(1)
    for values in (rng.standard_normal(800), np.full(800, 0.6), 0.5 + 1e-4 * rng.standard_normal(800)):
        for count in (1, 2, 5):
            spiked = values.copy()
            spiked[rng.choice(800, count, replace=False)] = 1_000 * rng.standard_normal(count)
            for dtype in (SINGLE, np.float64):
                assert of_steps(spiked.astype(dtype).astype(float)) == 0
    assert of_steps(np.zeros(10)) == 0


@pytest.mark.parametrize("images", [50, 200, 10_000])
def test_the_step_of_an_accuracy_is_found_beside_an_outlier(images):
    rng = np.random.default_rng(2)
    counts = np.round(images * (0.6 + rng.standard_normal(800) * 5 / images))
    for dtype in (SINGLE, np.float64):
        values = (counts / images).astype(dtype).astype(float)
        assert of_steps(values) == pytest.approx(1 / images, rel=1e-2)
        values[300] = 0.1234567
        assert of_steps(values) == pytest.approx(1 / images, rel=1e-2)


def test_a_loss_near_zero_is_rounded_like_its_residuals():
    """‖y + δ − y‖² where y is known to float32: its changes are rounding; those of a loss twice as large are none."""
    rng = np.random.default_rng(3)
    y = rng.standard_normal(50)
    start = float(y @ y)
    for residual in (0.0, 1e-6, 1e-4, 1e-2):
        outputs = y + residual * rng.standard_normal(50) / np.sqrt(50)
        loss = np.array(
            [((outputs * (1 + np.finfo(SINGLE).eps * rng.uniform(-1, 1, 50)) - y) ** 2).sum() for _ in range(400)]
        )
        floors = of_moves(loss, Precision(np.dtype(SINGLE), start))
        assert (np.abs(np.diff(loss)) <= floors).all()
        assert floors.max() < 0.1 * max(residual, 1e-6) ** 2 + 20 * (np.finfo(SINGLE).eps ** 2) * start
        if residual:
            assert (np.abs(np.diff(loss)) > of_moves(loss, Precision(np.dtype(SINGLE)))).any() or residual > 1e-3


@pytest.mark.parametrize("jump", [1e5, 1e10, 1e30])
@pytest.mark.parametrize("also", [1, 2])
def test_a_huge_first_value_does_not_turn_what_varies_later_into_rest(jump, also):
    """Training that begins with a jump, by float32: the noise after it is what it is."""
    rng = np.random.default_rng(5)
    plain = 1 + np.array([0.01, 0.001])[:, None, None] * rng.standard_normal((2, 3, 2_000))
    begins = plain.copy()
    begins[..., :also] = jump
    one, other = (runs_of(*values.astype(SINGLE).astype(float)) for values in (plain, begins))
    for statistic in (local_variance_ratio, variance):
        assert statistic(one, "loss").equals(statistic(other, "loss"))
    before, after = (convergence(ds, "loss") for ds in (one, other))
    assert before["verdict"].equals(after["verdict"])
    assert bool(after["rest_from"].isnull().all())
    assert set(local_variance_ratio(other, "loss")["bound"].values) == {""}


def test_what_a_float32_loss_begins_with_still_says_how_it_is_rounded_later():
    loss = np.geomspace(1, 1e-4, 2_000)
    assert precision_of(runs_of(loss[None], loss[None]), "loss").start == 1
    assert precision_of(runs_of(*np.array([[[1e10, 1, 1, 1, 1]]] * 2)), "loss").start == 100


@pytest.fixture(scope="module")
def interpolating(tmp_path_factory):
    """Runs that fit their data exactly, to what float32 and float64 know."""
    made = {}
    for dtype, lr, steps in (("float32", 0.05, 1_200), ("float64", 0.05, 2_000)):
        problem = {"family": "least-squares", "n": 50, "d": 5, "batch_size": 2, "noise": 0.0, "dtype": dtype}
        changes = {"name": dtype, "seeds": list(range(10)), "steps": steps, "orders": ["forward"],
                   "problem": problem, "operator": {"family": "sgd", "lr": lr}}  # fmt: skip
        experiment = ts.Experiment.preset("quadratic", changes)
        made[dtype] = ts.run(experiment, tmp_path_factory.mktemp("rest") / "runs.zarr").dataset()
    return made


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("metric", ["train_loss", "batch_loss", "sum:train_loss"])
def test_a_loss_at_rest_is_at_rest(interpolating, dtype, metric):
    ds = interpolating[dtype]
    last = ds["step"].values[-1] // 4
    found = convergence(ds, metric, int(last))
    assert set(found["verdict"].values.ravel()) == {"point"}, found["why"].values
    if not metric.startswith("sum:"):
        told = variance(ds, metric, int(last))
        assert set(told["why"].values.ravel()) == {"does not vary, but by rounding"}
        assert float(told["variance"].max()) == 0
        assert bool(told["low"].isnull().all())


def test_a_small_loss_that_varies_is_not_at_rest():
    """A millionth of what it was, and float32 still tells its values apart."""
    rng = np.random.default_rng(4)
    tail = 1e-6 * np.exp(0.3 * rng.standard_normal((2, 3, 4_000)))
    values = np.concatenate([np.ones((2, 3, 1)), tail], axis=-1).astype(SINGLE).astype(float)
    ds: xr.Dataset = runs_of(*values)
    assert "point" not in convergence(ds, "loss")["verdict"].values
    assert bool(convergence(ds, "loss")["rest_from"].isnull().all())
    assert bool((variance(ds, "loss")["low"] > 0).all())
