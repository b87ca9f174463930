"""Metrics computed from stored states are what their closed forms say, and recording goes on beside them."""

from __future__ import annotations

import numpy as np
import pytest
from trajstore.analysis import afterwards, variance
from trajstore.analysis.afterwards import compute

import trajstore as ts
from trajstore.errors import ConfigurationError, NotFoundError
from trajstore.problems.least_squares import LeastSquares
from trajstore.verifying import verify

TABLE = {
    "name": "lsq",
    "problem": {"family": "least-squares", "n": 40, "d": 4},
    "operator": {"family": "sgd", "lr": 0.05},
    "steps": 60,
    "seeds": [0, 1],
    "orders": ["forward", "backward"],
}


@pytest.fixture
def stored(record):
    return record(TABLE)


def values(stored, metric):
    return ts.open(stored.store.place.address)["lsq"].dataset()[metric]


def test_on_least_squares_they_are_those_of_the_closed_forms(stored):
    problem = LeastSquares(n=40, d=4)
    X, y = problem.data
    eigenvalues = np.linalg.eigvalsh(problem.hessian)
    for metric in ("gradient_norm", "sharpness", "hessian_trace", "gradient_noise", "invariance_gap"):
        assert compute(stored, metric, every=40, samples=400 if metric != "hessian_trace" else 32) == 2 * 2 * 2
    for order in ("forward", "backward"):
        theta = stored.arrays(order=order, seed=1, step=40)["theta"]
        errors = X @ theta - y
        each = errors[:, None] * X
        here = {"order": order, "seed": 1, "step": 40}
        assert float(values(stored, "gradient_norm").sel(here)) == pytest.approx(np.linalg.norm(each.mean(0)))
        assert float(values(stored, "sharpness").sel(here)) == pytest.approx(eigenvalues.max(), rel=1e-2)
        assert float(values(stored, "hessian_trace").sel(here)) == pytest.approx(eigenvalues.sum(), rel=0.2)
        noise = np.sqrt(((each - each.mean(0)) ** 2).sum(1).mean())
        assert float(values(stored, "gradient_noise").sel(here)) == pytest.approx(noise, rel=0.15)
        stepped = theta - 0.05 * each
        drop = 0.5 * (errors**2).mean() - 0.5 * ((stepped @ X.T - y) ** 2).mean()
        spread = (0.5 * ((stepped @ X.T - y) ** 2).mean(1)).std()
        assert float(values(stored, "invariance_gap").sel(here)) == pytest.approx(drop, abs=4 * spread / 20)
        assert float(values(stored, "gradient_norm_samples").sel(here)) == 40
        assert float(values(stored, "gradient_noise_samples").sel(here)) == 400
    assert int(values(stored, "sharpness").notnull().sum()) == 8  # and nothing at steps that were not asked for


def test_it_goes_on_where_it_stopped_and_changes_nothing(stored, monkeypatch):
    compute(stored, "gradient_norm", every=20)
    before = values(stored, "gradient_norm").values.copy()
    calls = []
    real = afterwards._full_gradient
    monkeypatch.setattr(afterwards, "_full_gradient", lambda *given: calls.append(1) or real(*given))
    assert compute(stored, "gradient_norm", every=10) == 2 * 2 * 3
    assert len(calls) == 12
    after = values(stored, "gradient_norm").values
    there = ~np.isnan(before)
    assert np.array_equal(before[there], after[there])
    assert compute(stored, "gradient_norm", every=10) == 0


def test_the_recording_can_be_verified_resumed_and_extended_beside_it(stored, record):
    compute(stored, "gradient_norm", every=20)
    store = ts.open(stored.store.place.address)
    assert not list(verify(store))
    assert record(TABLE, resume=True).name == "lsq"
    longer = ts.run(ts.Experiment.of({**TABLE, "steps": 80}), stored.store.place.address, extend=True)
    assert not list(verify(ts.open(stored.store.place.address)))
    assert compute(longer, "gradient_norm", every=20) == 2 * 2
    assert int(values(stored, "gradient_norm").notnull().sum()) == 2 * 2 * 5


def test_what_cannot_be_computed_is_refused(stored, record, tmp_path):
    with pytest.raises(NotFoundError, match="no metric 'sharpnes' to compute; did you mean 'sharpness'"):
        compute(stored, "sharpnes")
    with pytest.raises(ConfigurationError, match="every is 0"):
        compute(stored, "sharpness", every=0)
    with pytest.raises(ConfigurationError, match="samples is 0"):
        compute(stored, "sharpness", samples=0)
    heavy = record({**TABLE, "name": "heavy", "operator": {"family": "sgd", "lr": 0.05, "momentum": 0.9}})
    with pytest.raises(
        ConfigurationError, match="its optimizer keeps a state \\(momentum_buffer\\) that was not stored"
    ):
        compute(heavy, "invariance_gap")
    import torch

    with ts.record(tmp_path / "loop.zarr", "mine", torch.nn.Linear(2, 1)) as rec:
        rec.step(loss=1.0)
    with pytest.raises(ConfigurationError, match="was recorded by a training loop"):
        compute(ts.open(tmp_path / "loop.zarr")["mine"], "sharpness")


def test_the_program_computes_and_the_result_is_a_metric_like_any_other(stored, trajstore):
    address = stored.store.place.address
    code, out, _ = trajstore("compute", "gradient_norm", address, "lsq", "--every", "2")
    assert (code, out) == (0, "lsq: gradient_norm of 124 states computed, 0 were there\n")
    _, out, _ = trajstore("compute", "gradient_norm", address, "lsq", "--every", "4")
    assert out == "lsq: gradient_norm of 0 states computed, 64 were there\n"
    _, out, _ = trajstore("sql", address, "SELECT count(gradient_norm) FROM metrics", "--csv")
    assert out.split() == ["count(gradient_norm)", "124"]
    code, _, err = trajstore("compute", "gradient", address, "lsq")
    assert code == 2
    assert "no metric 'gradient' to compute" in err


def measured(stored, metric, step, samples):
    from trajstore.analysis.afterwards import METRICS, At

    from trajstore.reviving import revive

    revived = revive(stored)
    (state,) = revived.states("forward", 0, [step])
    return METRICS[metric].measure(revived, At(state, 0, step, samples))[0]


@pytest.mark.parametrize(
    ("spectrum", "largest"), [([1.3] + [1.0] * 500, 1.3), (np.linspace(0, 1, 300).tolist(), 1.0), ([2.0], 2.0)]
)
def test_sharpness_is_found_where_eigenvalues_are_close(record, spectrum, largest):
    stored = record("quadratic", steps=2, seeds=[0], problem={"spectrum": spectrum})
    assert measured(stored, "sharpness", 1, 1) == pytest.approx(largest, rel=1e-3)


def test_batches_without_replacement_tell_the_noise_of_one_example_too(record):
    stored = record(
        {**TABLE, "name": "shuffled", "problem": {**TABLE["problem"], "batch_size": 30, "sampling": "shuffle"}}
    )
    X, y = LeastSquares(n=40, d=4).data
    each = (X @ stored.arrays(order="forward", seed=0, step=20)["theta"] - y)[:, None] * X
    noise = np.sqrt(((each - each.mean(0)) ** 2).sum(1).mean())
    assert measured(stored, "gradient_noise", 20, 400) == pytest.approx(noise, rel=0.1)


def test_the_operator_is_the_one_of_the_next_step(record):
    schedule = {"family": "cosine", "total": 100}
    operator = {"lr": 0.1, "schedule": schedule, "by": "index"}
    stored = record("quadratic", steps=60, seeds=[0], problem={"noise": 0.0}, operator=operator)
    losses = stored.dataset()["train_loss"].sel(order="forward", seed=0).values
    for step in (10, 30):
        assert measured(stored, "invariance_gap", step, 4) == pytest.approx(losses[step] - losses[step + 1], rel=1e-9)


def test_one_series_does_not_mix_numbers_of_samples(stored):
    compute(stored, "hessian_trace", every=30, samples=8)
    again = ts.open(stored.store.place.address)["lsq"]
    with pytest.raises(ConfigurationError, match="was computed with 8 samples, and one series cannot mix them"):
        compute(again, "hessian_trace", every=10, samples=16)
    assert compute(again, "hessian_trace", every=10, samples=8) == 2 * 2 * 4


def test_what_was_measured_and_is_no_number_is_not_what_was_not_measured(stored, monkeypatch):
    """A NaN is told as such; only what is missing can be had by going on."""
    broken = afterwards.StateMetric(lambda revived, at: (np.nan if at.step == 50 else at.step**0.5, 1), sampled=False)
    monkeypatch.setattr(afterwards, "METRICS", {"sharpness": broken})
    compute(stored, "sharpness", every=5)
    ds = ts.open(stored.store.place.address)["lsq"].dataset()
    assert ds["measured"].attrs["flag_meanings"].split()[-2:] == ["sharpness_samples", "sharpness"]
    bit = ds["measured"].attrs["flag_masks"][-1]
    assert ds["step"].values[((ds["measured"] & bit) > 0).any(("order", "seed")).values].tolist() == [*range(0, 61, 5)]
    found = variance(ds, "sharpness", window=8)
    assert set(found["why"].values.ravel()) == {"diverged"}
    assert np.isnan(found["variance"].values).all()
    one = variance(ds.sel(order="forward", seed=1, step=slice(0, 45)), "sharpness", window=8)
    assert np.isfinite(one["variance"].values).all()
