"""Outputs on the probe are those of the model with the stored state, and a space to judge convergence in."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from trajstore.analysis import compute, convergence, outputs
from trajstore.analysis.afterwards import METRICS, At

import trajstore as ts
from tests.conftest import SMALL_NET, forget, record_half, sampled
from trajstore.errors import ConfigurationError, ConflictError, NotFoundError, StatisticError
from trajstore.problems.least_squares import LeastSquares
from trajstore.replay.compare import replay
from trajstore.replay.reviving import revive

ROWS = {
    "name": "rows", "problem": {"family": "least-squares", "n": 30, "d": 4, "ridge": 0.5},
    "operator": {"family": "sgd", "lr": 0.05}, "steps": 400, "seeds": [0, 1], "orders": ["forward", "backward"],
}  # fmt: skip


def test_outputs_of_least_squares_are_its_predictions(record):
    ds = record({**ROWS, "steps": 20}).dataset()
    X, _ = LeastSquares(n=30, d=4).data
    expected = np.einsum("nd,osdt->ostn", X, ds["params"].values)
    found = outputs(ds)
    assert found.dims == ("order", "seed", "snapshot", "probe", "output")
    assert found.values[..., 0] == pytest.approx(expected, rel=1e-12)
    one = outputs(ds.sel(order="backward", seed=1, snapshot=[3, 20]))
    assert np.array_equal(one.values[0, 0], found.sel(order="backward", seed=1, snapshot=[3, 20]))


def test_distances_in_the_space_of_outputs_are_root_mean_squares_over_the_probe(record):
    ds = record(ROWS).dataset()
    found = convergence(ds, "outputs")
    assert found["verdict"].sel(order="backward").values.tolist() == ["point", "point"]
    predictions = outputs(ds)[..., 0].sel(order="forward", seed=0).values[-200:]
    moves = np.sqrt((np.diff(predictions, axis=0) ** 2).mean(1))
    assert float(found["move"].sel(order="forward", seed=0)) == pytest.approx(np.median(moves[-49:]))
    apart = np.sqrt(((predictions[:, None] - predictions) ** 2).mean(-1))
    assert float(found["diameter"].sel(order="forward", seed=0)) == pytest.approx(apart.max())
    rates = (convergence(ds, space).sel(order="backward")["rate"].values for space in ("outputs", "parameters"))
    assert next(rates) == pytest.approx(next(rates), abs=0.01)


def test_outputs_that_a_dataset_has_are_not_computed_again(record, monkeypatch):
    ds = record(ROWS).dataset()
    found, known = convergence(ds, "outputs"), ds.assign(outputs=outputs(ds))
    monkeypatch.setattr("trajstore.replay.recipe.Recipe.outputs", None)
    assert convergence(known, "outputs").identical(found)
    assert convergence(known.sel(seed=1, order=["backward"]), "outputs")["verdict"].item() == "point"


def test_outputs_of_a_network_are_those_of_the_module_with_the_stored_state(record):
    stored = record(SMALL_NET)
    net = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    net.load_state_dict(stored.dataset().traj.state_dict(order="backward", seed=1, step=7))
    midpoints = torch.arange(-0.95, 1, 0.1)[:, None]
    expected = net(midpoints).detach().numpy()
    assert outputs(stored.dataset()).sel(order="backward", seed=1, snapshot=7).values == pytest.approx(
        expected, abs=1e-6
    )


def test_running_statistics_are_those_of_the_state_and_the_probe_is_of_the_test_data(tmp_path):
    x, y = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12.0)[:, None]
    problem = ts.ModuleProblem(
        lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)),
        lambda out, target: (out.sum(1, keepdim=True) - target).square().mean(),
        train=(x, y), test=(x[:5] + 1, y[:5]), batch_size=4,
    )  # fmt: skip
    from trajstore.operators.state import State
    from trajstore.replay.recipe import Recipe

    live = problem.build(torch.device("cpu"))
    params, buffers = live.initial(0)
    buffers = {**buffers, "0.running_mean": torch.tensor([1.0, 2.0, 3.0])}
    found = Recipe("mine", None, None, live).outputs(State(params, buffers, {}, torch.tensor(0)))
    expected = ((x[:5] + 1 - buffers["0.running_mean"]) / np.sqrt(1 + 1e-5)) @ params["1.weight"].T + params["1.bias"]
    assert found == pytest.approx(expected.numpy(), abs=1e-6)


MINE = """
import torch, trajstore as ts
from torch import nn

def problem(shift=0.0):
    x = torch.linspace(-1, 1, 8)[:, None]
    net = lambda: nn.Sequential(nn.Linear(1, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 1))
    return ts.ModuleProblem(net, nn.functional.mse_loss, train=(x, x**2 + shift), batch_size=4)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A problem of a user's own, in a file."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    table = {"name": "mine", "problem": {"family": "factory", "function": "mine:problem"}, "steps": 60}
    return ts.run(ts.Experiment.of({**table, "operator": {"family": "sgd", "lr": 0.05}}), tmp_path / "s.zarr")


def test_a_problem_from_a_file_computes_again_as_long_as_it_is_the_same(mine, tmp_path):
    ds = mine.dataset()
    module = nn.Sequential(nn.Linear(1, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 1)).eval()
    module.load_state_dict(ds.traj.state_dict(order="backward", seed=0, step=40))
    expected = module(torch.linspace(-1, 1, 8)[:, None]).detach().numpy()
    found = outputs(ds.sel(snapshot=40))
    assert found.sel(order="backward").values[0, 0] == pytest.approx(expected, abs=1e-6)
    assert [one.differs_from for one in replay(mine)] == [None, None]
    (tmp_path / "mine.py").write_text(MINE.replace("x**2", "x**3"))
    forget("mine")
    for asked in (lambda: outputs(ds), lambda: list(replay(mine)), lambda: compute(mine, "gradient_norm")):
        with pytest.raises(ConflictError, match="experiment 'mine': its problem has changed since it was recorded"):
            asked()


def measured_by(threads, stored, metric):
    revived, own = revive(stored), threading.local()
    training = METRICS[metric].of_batches  # a module with BatchNorm and dropout has another loss in training

    def one(step):
        if not hasattr(own, "revived"):
            own.revived = revived.again()
        (state,) = own.revived.states("backward", 0, [step])
        return METRICS[metric].measure(own.revived, At(state, 0, step, 4, training))[0]

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, range(1, 40)))


@pytest.mark.parametrize("metric", sampled(["invariance_gap", "gradient_noise"], every=2))
def test_threads_have_modules_of_their_own(mine, metric):
    """A module with BatchNorm and dropout cannot be called by two at once: values would be wrong, and errors come."""
    alone, together = (measured_by(threads, mine, metric) for threads in (1, 4))
    assert alone == together
    assert compute(mine, metric, every=3, samples=4, threads=4) == 42
    values = mine.store["mine"].dataset()[metric].sel(order="backward", seed=0, step=slice(3, 39, 3))
    assert values.values.tolist() == alone[2::3]


def test_where_no_state_is_stored_there_are_no_outputs(tmp_path):
    record_half(ts.Experiment.of(SMALL_NET), tmp_path / "s.zarr")
    ds = ts.open(tmp_path / "s.zarr")["net"].dataset()
    found = outputs(ds)
    assert 0 < int(ds["stored"].sum()) < ds["stored"].size
    assert np.array_equal(found.notnull().all(("probe", "output")), ds["stored"])


def test_what_has_no_outputs_says_so(record, tmp_path):
    with pytest.raises(ConfigurationError, match="experiment 'quadratic': its problem has no outputs"):
        convergence(record("quadratic", steps=100, seeds=[0]).dataset(), "outputs")
    with ts.record(tmp_path / "loop.zarr", "mine", nn.Linear(2, 1)) as rec:
        rec.step(loss=1.0)
    with pytest.raises(ConfigurationError, match="nothing can be computed with it afterwards"):
        outputs(ts.open(tmp_path / "loop.zarr")["mine"].dataset())
    ds = record(SMALL_NET).dataset()
    with pytest.raises(StatisticError, match="outputs: 13 states are stored"):
        convergence(ds, "outputs")
    with pytest.raises(ConfigurationError, match="its attributes were dropped on the way"):
        outputs(ds.drop_attrs())
    with pytest.raises(StatisticError, match="outputs: no state of experiment 'net' is stored here"):
        outputs(ds.assign_coords(stored=ds["stored"] & False))
    with pytest.raises(StatisticError, match="no variable 'counters'"):
        outputs(ds.drop_vars("counters"))
    with pytest.raises(NotFoundError, match="no variable 'params'"):
        outputs(ds[["test_loss"]])
    with pytest.raises(ConfigurationError, match="the dataset has 3 of the"):
        outputs(ds.isel(param=slice(3)))
    with pytest.raises(NotFoundError, match="did you mean 'outputs'"):
        convergence(ds, "output")
