"""Metrics computed from stored states are what their closed forms say, and recording goes on beside them."""

from __future__ import annotations

import numpy as np
import pytest
from trajstore.analysis import afterwards, variance
from trajstore.analysis.afterwards import compute

import trajstore as ts
from trajstore.errors import ConfigurationError, NotFoundError, StatisticError
from trajstore.problems.least_squares import LeastSquares
from trajstore.reading.verify import verify

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

    from trajstore.replay.reviving import revive

    revived = revive(stored)
    (state,) = revived.states("forward", 0, [step])
    return METRICS[metric].measure(revived, At(state, 0, step, samples))[0]


@pytest.mark.parametrize(
    ("spectrum", "largest"),
    [
        ([0.0] * 60, 0.0),
        ([0.0] * 3, 0.0),
        ([2.0] + [0.0] * 59, 2.0),
        ([1.3] + [1.0] * 500, 1.3),
        (np.linspace(0, 1, 300).tolist(), 1.0),
        ([2.0], 2.0),
    ],
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


def test_shuffled_epochs_of_ones_own_problem_tell_the_noise_of_one_example(moded):
    stored = moded("make", body="plain", batch_size=30, sampling="shuffle")
    X, y = data()
    w = stored.arrays(order="forward", seed=0, step=10)["weight"][0]
    each = 2 * (X @ w - y)[:, None] * X
    noise = np.sqrt(((each - each.mean(0)) ** 2).sum(1).mean())
    assert measured(stored, "gradient_noise", 10, 400) == pytest.approx(noise, rel=0.1)


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


MODES = """
import torch, trajstore as ts
from torch import nn
generator = torch.Generator().manual_seed(0)
X = torch.randn(40, 4, generator=generator, dtype=torch.float64)
Y = X.sum(1, keepdim=True) + torch.randn(40, 1, generator=generator, dtype=torch.float64)
BODIES = {"dropout": lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1, bias=False)),
          "norm": lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1, bias=False)),
          "norm of the batch": lambda: nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1)),
          "plain": lambda: nn.Linear(4, 1, bias=False)}
def make(body, batch_size, sampling="iid"):
    return ts.ModuleProblem(lambda: BODIES[body]().double(), nn.functional.mse_loss, (X, Y), batch_size=batch_size,
                            sampling=sampling)
def straight():
    return ts.ModuleProblem(lambda: BODIES["plain"]().double(), lambda out, y: out.mean(), (X, Y))
"""


@pytest.fixture
def moded(record, tmp_path, monkeypatch):
    (tmp_path / "modes_of.py").write_text(MODES)
    monkeypatch.syspath_prepend(str(tmp_path))

    def recorded(function, name="moded", **arguments):
        problem = {"family": "factory", "function": f"modes_of:{function}", "arguments": arguments}
        return record({**TABLE, "name": name, "problem": problem, "steps": 10, "orders": ["forward"], "seeds": [0]})

    return recorded


def data():
    import modes_of

    return modes_of.X.numpy(), modes_of.Y.numpy()[:, 0]


@pytest.mark.parametrize(("size", "sampling"), [(1, "iid"), (5, "iid"), (5, "shuffle"), (40, "shuffle")])
def test_under_dropout_noise_is_of_one_example_and_its_mask_whatever_the_batch(moded, size, sampling):
    stored = moded("make", body="dropout", batch_size=size, sampling=sampling)
    assert compute(stored, "gradient_noise", every=10, samples=400) == 2
    X, y = data()
    w = stored.arrays(order="forward", seed=0, step=10)["1.weight"][0]
    masks = 2.0 * np.array([[i >> k & 1 for k in range(4)] for i in range(16)])
    seen = masks[:, None] * X  # every mask of every example
    each = (2 * (seen @ w - y)[..., None] * seen).reshape(-1, 4)
    noise = np.sqrt(((each - each.mean(0)) ** 2).sum(1).mean())
    found = ts.open(stored.store.place.address)["moded"].dataset()["gradient_noise"]
    assert float(found.sel(order="forward", seed=0, step=10)) == pytest.approx(noise, rel=0.1)
    assert found.attrs["mode"] == "train"


def test_under_batch_normalisation_noise_is_that_of_training_gradients(moded):
    import torch

    stored = moded("make", body="norm", batch_size=8)
    compute(stored, "gradient_noise", every=10, samples=600)
    compute(stored, "gradient_norm", every=10)
    X, y = data()
    state = stored.arrays(order="forward", seed=0, step=10)
    gamma, beta, w = (torch.tensor(state[name]) for name in ("0.weight", "0.bias", "1.weight"))
    rng, draws = np.random.default_rng(1), []
    for _ in range(1_500):
        rows = rng.integers(40, size=8)
        leaves = [v.clone().requires_grad_() for v in (gamma, beta, w)]
        x = torch.tensor(X[rows])
        scaled = (x - x.mean(0)) / torch.sqrt(x.var(0, unbiased=False) + 1e-5) * leaves[0] + leaves[1]
        ((scaled @ leaves[2][0] - torch.tensor(y[rows])) ** 2).mean().backward()
        draws.append(np.concatenate([leaf.grad.numpy().ravel() for leaf in leaves]))
    draws = np.array(draws)
    noise = np.sqrt(8 * ((draws - draws.mean(0)) ** 2).sum(1).mean())
    ds = ts.open(stored.store.place.address)["moded"].dataset().sel(order="forward", seed=0, step=10)
    assert float(ds["gradient_noise"]) == pytest.approx(noise, rel=0.1)
    reach = noise / np.sqrt(40)  # an epoch without replacement is nearer than that to the mean
    assert float(ds["gradient_norm"]) == pytest.approx(np.linalg.norm(draws.mean(0)), abs=3 * reach)
    assert float(ds["gradient_norm_samples"]) == 40


@pytest.mark.parametrize(
    ("body", "otherwise"), [("plain", False), ("dropout", True), ("norm", True), ("norm of the batch", True)]
)
def test_where_training_sees_another_loss_is_told(moded, body, otherwise):
    from trajstore.analysis.modes import trains_otherwise

    from trajstore.replay.reviving import revive

    assert trains_otherwise(revive(moded("make", body=body, batch_size=4))) == otherwise


def test_one_series_does_not_mix_modes(moded, monkeypatch):
    stored = moded("make", body="dropout", batch_size=4)
    with pytest.raises(ConfigurationError, match=r"samples is 1; where the loss in training .* takes 2 or more"):
        compute(stored, "gradient_noise", every=10, samples=1)
    with monkeypatch.context() as earlier:  # what was computed before there were modes
        earlier.setattr(afterwards, "trains_otherwise", lambda revived: False)
        compute(stored, "gradient_norm", every=10)
    again = ts.open(stored.store.place.address)["moded"]
    assert again.dataset()["gradient_norm"].attrs["mode"] == "eval"
    with pytest.raises(
        ConfigurationError, match="gradient_norm was computed in evaluation mode, by now it would be in"
    ):
        compute(again, "gradient_norm", every=5)


def test_a_loss_that_is_linear_has_no_curvature(moded):
    stored = moded("straight")
    assert measured(stored, "sharpness", 10, 1) == 0
    assert measured(stored, "hessian_trace", 10, 4) == 0


def test_noise_of_one_example_takes_how_it_was_drawn(moded, monkeypatch):
    from trajstore.reading.drawing import Drawing

    monkeypatch.setattr(afterwards, "drawing_of", lambda attributes: Drawing(4, None))
    with pytest.raises(
        StatisticError, match="how examples are drawn is not stored, so the noise of one cannot be told"
    ):
        compute(moded("make", body="plain", batch_size=4), "gradient_noise", every=10)
