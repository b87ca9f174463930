"""Recording an experiment, and reading it back in every way."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import trajstore as ts
from tests.conftest import SMALL_NET
from trajstore.errors import BusyError, ConfigurationError, ConflictError, DamageError, FormatError, NotFoundError
from trajstore.problems.regression import Regression
from trajstore.reading.handles import open_root
from trajstore.storage.format.sketch import Sketch
from trajstore.storage.writing.segment import array_of
from trajstore.storage.writing.slab_writer import SlabWriter


def test_forward_iterates_are_plain_training(record):
    experiment = record(steps=8)
    batches = experiment.dataset()["batch_index"].values[1, :, 0]
    family = Regression(width=8, depth=2, points=21)
    torch.manual_seed(1)
    module = family.module()
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    x = torch.linspace(-1, 1, 21, dtype=torch.float64).float()[:, None]
    for n in range(1, 9):
        row = x[batches[n - 1]]
        optimizer.zero_grad()
        nn.functional.mse_loss(module(row), row**2).backward()
        optimizer.step()
        for name, value in experiment.state_dict(order="forward", seed=1, step=n).items():
            torch.testing.assert_close(value, module.get_parameter(name).detach(), rtol=1e-5, atol=1e-7)


def test_stored_states_load_strictly_and_reproduce_the_recorded_losses(record):
    experiment = record()
    ds = experiment.dataset()
    module = Regression(width=8, depth=2, points=21).module()
    x = torch.linspace(-1, 1, 21)[:, None]
    for order in ("forward", "backward"):
        for seed in (0, 1):
            for step in (0, 5, 12):
                module.load_state_dict(experiment.state_dict(order=order, seed=seed, step=step), strict=True)
                with torch.no_grad():
                    loss = float((module(x) - x**2).square().mean())
                recorded = float(ds["train_loss"].sel(order=order, seed=seed, step=step))
                assert loss == pytest.approx(recorded, rel=1e-5)


def test_the_group_opens_with_plain_xarray(record, tmp_path):
    """No trajstore is asked, though older releases of xarray load every engine that is installed."""
    record()
    program = textwrap.dedent("""
        import json, sys, warnings
        import numpy as np, xarray as xr
        warnings.filterwarnings("ignore", message="Numcodecs codecs")
        ds = xr.open_zarr(sys.argv[1], group="net", consolidated=False)
        assert set(ds.indexes) >= {"order", "seed", "step", "snapshot"}, ds.indexes
        assert set(ds.coords) >= {"init_seed", "data_seed"}
        theta = ds["params"].sel(order="backward", seed=1, snapshot=7).values
        weights = {}
        for e in ds.attrs["trajstore"]["schema"]["layout"]["entries"]:
            if e["array"] == "params":
                weights[e["name"]] = theta[e["offset"] : e["offset"] + int(np.prod(e["shape"]))].reshape(e["shape"])
        def net(x):
            for k in ("0", "2"):
                x = np.maximum(x @ weights[k + ".weight"].T + weights[k + ".bias"], 0)
            return x @ weights["4.weight"].T + weights["4.bias"]
        x = np.linspace(-1, 1, 21)[:, None]
        loss = float(np.mean((net(x) - x**2) ** 2))
        recorded = float(ds["train_loss"].sel(order="backward", seed=1, step=7))
        assert abs(loss / recorded - 1) < 1e-5, (loss, recorded)
        print(json.dumps({"loss": loss, "steps": ds.sizes["step"]}))
    """)
    told = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "runs.zarr")], cwd=tmp_path, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["steps"] == 13


def contents(store: Path, skip: str = "zarr.json") -> dict[str, str]:
    return {
        str(f.relative_to(store)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(store.rglob("*"))
        if f.is_file() and f.name != skip
    }


@pytest.mark.parametrize("base", ["net", "quadratic"])
def test_the_same_experiment_twice_gives_the_same_bytes(base, tmp_path):
    def made(folder: str) -> dict[str, str]:
        if base == "net":
            experiment = ts.Experiment.of({**SMALL_NET, "operator": {"family": "adamw", "lr": 0.01}})
        else:
            experiment = ts.Experiment.preset("quadratic", {"steps": 30})
        ts.run(experiment, tmp_path / folder)
        return contents(tmp_path / folder)

    one, two = made("one.zarr"), made("two.zarr")
    assert one == two
    assert any("params/c/" in name for name in one)
    assert any("committed/c/" in name for name in one)


def test_the_same_experiment_in_another_process_gives_the_same_bytes(record, tmp_path):
    record()
    program = "import sys, json, trajstore as ts; ts.run(ts.Experiment.of(json.loads(sys.argv[1])), sys.argv[2])"
    subprocess.run([sys.executable, "-c", program, json.dumps(SMALL_NET), str(tmp_path / "other.zarr")], check=True)
    assert contents(tmp_path / "runs.zarr") == contents(tmp_path / "other.zarr")


def test_one_start_for_all_seeds(record):
    experiment = record(init_seed=7, seeds=[3, 4])
    ds = experiment.dataset()
    assert ds["init_seed"].values.tolist() == [7, 7]
    assert ds["data_seed"].values.tolist() == [3, 4]
    at = lambda seed, step: ds["params"].sel(order="forward", seed=seed, snapshot=step).values  # noqa: E731
    assert np.array_equal(at(3, 0), at(4, 0))
    assert not np.array_equal(at(3, 5), at(4, 5))


def test_forward_and_backward_share_start_and_first_iterate(record):
    params = record().dataset()["params"]
    assert np.array_equal(*(params.sel(order=o, snapshot=[0, 1]).values for o in ("forward", "backward")))
    assert not np.array_equal(*(params.sel(order=o, snapshot=2).values for o in ("forward", "backward")))


def test_grids_say_what_was_computed(record):
    experiment = record(steps=11, record={"every": 2, "snapshot_every": 4})
    ds = experiment.dataset()
    assert np.flatnonzero(ds["recorded"].values[0, 0]).tolist() == [0, 2, 4, 6, 8, 10, 11]
    assert ds["snapshot"].values.tolist() == [0, 4, 8, 11]
    assert np.isnan(ds["train_loss"].values[0, 0, [1, 3, 5, 7, 9]]).all()
    every = record(name="every", steps=11)
    sparse, dense = ds["train_loss"].values, every.dataset()["train_loss"].values
    steps = [0, 2, 4, 6, 8, 10, 11]
    assert np.array_equal(sparse[..., steps], dense[..., steps])


@pytest.mark.parametrize("grid", [{"steps": [2, 7]}, {"log_until": 5, "every": 6}])
def test_other_grids_record_the_same_iterates(record, grid):
    every = record(name="every").dataset()
    some = record(name="some", record=grid).dataset()
    steps = np.flatnonzero(some["recorded"].values[0, 0])
    assert 3 <= len(steps) < 13
    assert some["snapshot"].values.tolist() == steps.tolist()
    for order in ("forward", "backward"):
        one, other = (ds["params"].sel(order=order, snapshot=steps).values for ds in (every, some))
        assert np.array_equal(one, other)


def test_sketches_are_projections_of_the_distance_to_the_start(record):
    ds = record(record={"sketch": 16}).dataset()
    params = ds["params"].sel(order="backward", seed=0).values.astype(np.float64)
    sketch = Sketch(params.shape[0], 16, 0)
    for step in (0, 1, 12):
        expected = sketch(params[:, step] - params[:, 0])
        assert np.array_equal(ds["sketch"].sel(order="backward", seed=0, step=step).values, expected)


def test_optimizer_state_and_counters_are_stored_where_asked(record):
    operator = {"family": "adam", "lr": 0.01}
    with_state = record(name="with", operator=operator, record={"optimizer_state": True})
    without = record(name="without", operator=operator)
    assert with_state.schema.layout.size("params") == 3 * without.schema.layout.size("params")
    assert (
        with_state.state_dict(order="forward", seed=0, step=3).keys()
        == without.state_dict(order="forward", seed=0, step=3).keys()
    )
    assert with_state.dataset()["counters"].sel(order="backward", seed=1).values.tolist() == [list(range(13))]


def test_a_diverged_run_is_recorded_as_it_is(record):
    experiment = record("quadratic", steps=40, operator={"lr": 1e30}, problem={"dtype": "float32"})
    ds = experiment.dataset()
    loss = ds["train_loss"].sel(order="forward", seed=0).values
    assert not np.isfinite(loss[-1])
    assert np.isfinite(loss[0])
    assert (ds["measured"].values[..., 1:] == 0b11111).all()
    assert (ds["measured"].values[..., 0] == 0b10101).all()  # no batch and no iterate before θ₀
    told = {(slab.order, slab.seed): slab.diverged_at for slab in experiment.slabs()}
    infinite = ~np.isfinite(loss) | ~np.isfinite(ds["batch_loss"].sel(order="forward", seed=0).values)
    assert told["forward", 0] == np.flatnonzero(infinite[1:])[0] + 1  # θ₀ has no batch
    rows = experiment.store.sql(
        """SELECT count(*), count(train_loss), count(*) FILTER (isnan(train_loss)) FROM metrics
           WHERE "order" = 'forward' AND seed = 0"""
    ).fetchall()
    assert rows[0][:2] == (41, 41)
    assert rows[0][2] == np.isnan(loss).sum() > 0
    assert {s.diverged_at for s in record("quadratic", name="sound", steps=5).slabs()} == {None}


def test_provenance_tells_where_a_recording_comes_from(record):
    attributes = record().attributes
    assert attributes["format"] == 1
    assert attributes["config"]["operator"]["lr"] == 0.05
    fill, other = attributes["fills"]
    assert fill["slabs"] == [["forward", 0], ["backward", 0]]
    assert other["slabs"] == [["forward", 1], ["backward", 1]]
    assert fill["versions"]["torch"] == torch.__version__.split("+")[0]
    assert fill["threads"] == torch.get_num_threads()
    assert fill["began"] <= fill["ended"]


def test_an_existing_experiment_needs_resume_and_an_equal_configuration(record):
    record()
    with pytest.raises(ConflictError, match="'net' exists already with this configuration; continue it with --resume"):
        record()
    with pytest.raises(ConflictError, match=r"differs in operator.lr: 0.05 / 0.1; steps: 12 / 13"):
        record(steps=13, operator={"family": "sgd", "lr": 0.1}, resume=True)


def test_resume_skips_what_is_complete_and_does_the_rest_again(record, tmp_path, monkeypatch):
    record()
    store = tmp_path / "runs.zarr"
    whole = contents(store)
    committed = ts.open(store)["net"].group
    root = open_root(store)["net"]
    array_of(root, "committed")[1, 1] = -1  # as if the last slab had never been committed
    assert [s.complete for s in ts.open(store)["net"].slabs()] == [True, True, True, False]
    filled: list[tuple[int, int]] = []
    original = SlabWriter.__init__

    def spy(self, ledger, pipeline):
        filled.append(ledger.corner)
        original(self, ledger, pipeline)

    monkeypatch.setattr(SlabWriter, "__init__", spy)
    experiment = record(resume=True)
    assert filled == [(1, 1)]
    assert all(s.complete for s in experiment.slabs())
    assert contents(store) == whole
    assert [fill["slabs"] for fill in experiment.attributes["fills"]][2:] == [[["backward", 1]]]
    record(resume=True)
    assert filled == [(1, 1)]
    assert committed.attrs["trajstore"]["config"] == experiment.config


def test_an_interrupted_recording_keeps_what_was_complete(record, tmp_path):
    def interrupt(done: int, where: str) -> None:
        if where.startswith("seed 1"):
            raise KeyboardInterrupt

    experiment = ts.Experiment.of(SMALL_NET)
    with pytest.raises(KeyboardInterrupt):
        ts.run(experiment, tmp_path / "runs.zarr", progress=interrupt)
    stored = ts.open(tmp_path / "runs.zarr")["net"]
    assert {(s.order, s.seed): s.complete for s in stored.slabs()} == {
        ("forward", 0): True, ("forward", 1): False, ("backward", 0): True, ("backward", 1): False,
    }  # fmt: skip
    ds = stored.dataset()  # of seed 1, the start was there
    assert np.isnan(ds["params"].sel(seed=1).values[..., 1:]).all()
    assert np.isnan(ds["train_loss"].sel(seed=1).values[..., 1:]).all()
    with pytest.raises(NotFoundError, match="order 'backward', seed 1: step 3 is not recorded yet"):
        stored.state_dict(order="backward", seed=1, step=3)
    assert stored.store.sql("SELECT count(*) FROM metrics WHERE seed = 1").fetchall() == [(2,)]
    assert all(s.complete for s in record(resume=True).slabs())


def test_a_slab_that_another_process_writes_is_left_alone(record, tmp_path):
    stored = record()
    array_of(open_root(tmp_path / "runs.zarr")["net"], "committed")[0, 0] = -1
    with stored.locked("forward", 0), pytest.raises(BusyError, match="order 'forward', seed 0"):
        record(resume=True)


def test_your_own_problem_by_function_and_by_object(tmp_path, monkeypatch):
    (tmp_path / "my_problem.py").write_text(
        textwrap.dedent("""
        import torch
        from torch import nn
        import trajstore as ts

        def make(width=4):
            x = torch.linspace(-1, 1, 9)[:, None]
            return ts.ModuleProblem(
                lambda: nn.Sequential(nn.Linear(1, width), nn.BatchNorm1d(width), nn.Linear(width, 1)),
                nn.functional.mse_loss, train=(x, x.sin()), batch_size=3,
            )
    """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    rest = {"operator": {"family": "sgd", "lr": 0.1, "momentum": 0.5}, "steps": 6}
    by_name = ts.Experiment.of(
        {
            "name": "a",
            "problem": {"family": "factory", "function": "my_problem:make", "arguments": {"width": 5}},
            **rest,
        }
    )
    import my_problem

    by_object = ts.Experiment.of({"name": "b", "problem": my_problem.make(5), **rest})
    one, two = (ts.run(e, tmp_path / "s.zarr") for e in (by_name, by_object))
    assert np.array_equal(one.dataset()["params"].values, two.dataset()["params"].values)
    state = one.state_dict(order="backward", seed=0, step=6)
    assert state["1.num_batches_tracked"] == 6
    my_problem.make(5).module().load_state_dict(state, strict=True)
    assert one.config["problem"]["made"]["train"][0]["shape"] == [9, 1]
    assert ts.run(by_name, tmp_path / "s.zarr", resume=True).name == "a"


@pytest.mark.parametrize(
    ("problem", "says"),
    [
        ({"family": "factory", "function": "no_such_module:make"}, "no module 'no_such_module'"),
        ({"family": "factory", "function": "math:make"}, "module 'math' has no 'make'"),
        ({"family": "factory", "function": "builtins:dict"}, "gave a dict; it must return something with build"),
    ],
)
def test_a_function_that_makes_no_problem_is_refused(problem, says):
    with pytest.raises(ConfigurationError, match=says):
        ts.Experiment.of({"name": "a", "problem": problem, "operator": {"family": "sgd", "lr": 1}, "steps": 1}).config()


def test_places_that_are_no_store_are_refused(tmp_path):
    with pytest.raises(NotFoundError, match="there is no store"):
        ts.open(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").touch()
    with pytest.raises(FormatError, match="not a trajstore"):
        ts.open(tmp_path / "folder")
    experiment = ts.Experiment.preset("quadratic", {"steps": 2})
    with pytest.raises(FormatError, match="a folder with other contents"):
        ts.run(experiment, tmp_path / "folder")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="is a file"):
        ts.run(experiment, tmp_path / "file")
    with pytest.raises(ConfigurationError, match="file is a file; a store is a folder"):
        ts.run(experiment, tmp_path / "file" / "store")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "folder"]


def test_a_newer_format_is_refused(record, tmp_path):
    record()
    metadata = tmp_path / "runs.zarr" / "zarr.json"
    metadata.write_text(metadata.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(FormatError, match="store format 2, this trajstore reads format 1; install a newer"):
        ts.open(tmp_path / "runs.zarr")


def test_what_does_not_exist_is_named_with_the_nearest_that_does(record):
    experiment = record()
    with pytest.raises(NotFoundError, match=r"no experiment 'nett'.*did you mean 'net'"):
        experiment.store["nett"]
    with pytest.raises(NotFoundError, match="no order 'bakward'; did you mean 'backward'"):
        experiment.state_dict(order="bakward", seed=0, step=0)
    with pytest.raises(NotFoundError, match="no seed 9; there is 0, 1"):
        experiment.state_dict(order="backward", seed=9, step=0)
    with pytest.raises(NotFoundError, match="no state is stored for step 40; the nearest is step 12"):
        experiment.state_dict(order="backward", seed=0, step=40)


def test_a_fill_tells_what_its_seconds_went_into(tmp_path):
    stored = ts.run(ts.Experiment.of({**SMALL_NET, "steps": 20}), tmp_path / "s.zarr", engine="wavefront", lanes=4)
    for fill in stored.attributes["fills"]:
        assert set(fill["seconds"]) == {"applications", "metrics", "storing"}
        assert all(seconds > 0 for seconds in fill["seconds"].values())


def test_disk_and_time_are_foretold(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "trajstore.recording.cost._TRIAL_SECONDS", 600.0
    )  # where a machine is slow, it would see fewer steps
    experiment = ts.Experiment.of({**SMALL_NET, "problem": {"family": "regression", "width": 64}, "steps": 60})
    cost = ts.cost(experiment, engine="wavefront", lanes=4)
    stored = ts.run(experiment, tmp_path / "s.zarr", engine="wavefront", lanes=4)
    assert 0.7 < cost.disk_bytes / stored.bytes_on_disk() < 1.3
    assert 0 <= cost.metric_seconds <= cost.seconds  # all of it, where the rest is lost in the noise of a busy machine


def test_the_cost_counts_applications_exactly_and_raw_bytes(record):
    cost = ts.cost(ts.Experiment.of({**SMALL_NET, "steps": 20}))
    parameters = 8 * 2 + 8 * 9 + 9
    assert cost.applications == 2 * (20 + 20 * 21 // 2)
    assert cost.exact
    assert cost.snapshots == 4 * 21
    a_step = 8 * (
        2 + 4 + 97 + 2
    )  # the problem's metrics, everyone's, sketch (no wider than the parameters), leg and mask
    assert cost.raw_bytes == 4 * 21 * (parameters * 4 + a_step) + 2 * 20 * 8
    assert 0 < cost.seconds < math.inf


def make_problem(width):
    x = torch.linspace(-1, 1, 6)[:, None]
    return ts.ModuleProblem(lambda: nn.Linear(1, width), lambda out, y: (out - y).square().mean(), (x, x))


def test_resuming_with_another_problem_in_the_same_words_is_refused(tmp_path):
    rest = {"name": "a", "operator": {"family": "sgd", "lr": 0.1}, "steps": 2}
    ts.run(ts.Experiment.of({**rest, "problem": make_problem(2)}), tmp_path / "s.zarr")
    with pytest.raises(ConflictError, match=r"differs in problem\.module\.bound"):
        ts.run(ts.Experiment.of({**rest, "problem": make_problem(3)}), tmp_path / "s.zarr", resume=True)


def test_what_others_keep_in_the_store_is_left_alone(record, tmp_path):
    record()
    root = open_root(tmp_path / "runs.zarr")
    root.create_group("mine").create_array("data", data=np.arange(3))
    with pytest.raises(ConflictError, match="exists but is not an experiment"):
        record(name="mine")
    assert root["mine"]["data"][...].tolist() == [0, 1, 2]
    assert list(ts.open(tmp_path / "runs.zarr")) == ["net"]
    (tmp_path / "runs.zarr" / "net" / "zarr.json").unlink()
    with pytest.raises(DamageError, match=r"has lost its zarr\.json"):
        record()
    assert (tmp_path / "runs.zarr" / "net" / "params").exists()


def test_a_declaration_that_died_is_done_again(record, tmp_path, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trajstore.storage.writing.declaring.config_digest", die)
        with pytest.raises(KeyboardInterrupt):
            record()
    assert list(ts.open(tmp_path / "runs.zarr")) == []
    assert all(slab.complete for slab in record().slabs())


def test_an_interrupted_recording_has_its_provenance(record, tmp_path):
    def interrupt(done: int, where: str) -> None:
        if where.startswith("seed 1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ts.run(ts.Experiment.of(SMALL_NET), tmp_path / "runs.zarr", progress=interrupt)
    first, second = ts.open(tmp_path / "runs.zarr")["net"].attributes["fills"]
    assert first["ended"] is not None
    assert second["ended"] is None


@pytest.mark.parametrize("damage", ["junk in zarr.json", "junk in a chunk", "array deleted"])
def test_damage_is_one_line_that_names_the_experiment(record, tmp_path, damage):
    record(name="sound")
    record()
    group = tmp_path / "runs.zarr" / "net"
    if damage == "junk in zarr.json":
        (group / "zarr.json").write_text("{ junk")
    elif damage == "junk in a chunk":
        (group / "committed" / "c" / "0" / "0" / "0" / "0").write_bytes(b"junk")
    else:
        shutil.rmtree(group / "leg")
    store = ts.open(tmp_path / "runs.zarr")
    assert list(store) == ["net", "sound"]
    with pytest.raises(FormatError, match=r"'net'.*damaged"):
        store["net"].slabs()
    assert all(slab.complete for slab in store["sound"].slabs())
    with pytest.raises(FormatError, match=r"'net'.*damaged"):
        record(resume=True)


@pytest.mark.parametrize("metric", ["a/b", "top 5", "params", "Step", "train_LOSS", "seed", ""])
def test_metrics_must_be_names_for_arrays_and_columns(tmp_path, metric):
    p = dataclasses.replace(make_problem(1), metrics={})
    live = p.build(torch.device("cpu"))
    live.examples = {"train_loss": 1, metric: 1}

    class Named:
        def build(self, device):
            return live

        def describe(self):
            return {}

    experiment = ts.Experiment.of(
        {"name": "a", "problem": Named(), "operator": {"family": "sgd", "lr": 0.1}, "steps": 2}
    )
    with pytest.raises(ConfigurationError, match=f"metric {metric!r}"):
        ts.run(experiment, tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()
