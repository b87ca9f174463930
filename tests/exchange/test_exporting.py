"""Exports hold every committed value, load where they are meant to, and appear whole or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import trajstore as ts
from tests.conftest import SMALL_NET
from trajstore.errors import NotFoundError, WriteError
from trajstore.exchange.export import export_metrics, export_state
from trajstore.exchange.export_arrays import export_arrays
from trajstore.reading.handles import open_root
from trajstore.storage.writing.segment import array_of

ORDERS = ["forward", "backward", "backward+backward@4", "backward/3?train_loss"]
SERIES = {"steps", "leg", "metrics", "measured", "sketch"}


class Net(nn.Module):
    """BatchNorm, a weight and a buffer that two modules share, and every dtype that can be stored."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.outer.weight = self.inner.weight
        self.first, self.norm, self.last = nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.again = self.norm
        self.gain = nn.Parameter(torch.rand(4).bfloat16())
        self.frozen = nn.Parameter(torch.rand(2, 2), requires_grad=False)
        self.register_buffer("float64s", torch.rand(3, dtype=torch.float64))
        self.register_buffer("float16s", torch.rand(2, 3).half())
        self.register_buffer("bytes8", torch.tensor([0, 255], dtype=torch.uint8))
        self.register_buffer("ints16", torch.tensor([[-3], [7]], dtype=torch.int16))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("empty", torch.zeros(0, 2))
        self.register_buffer("transient", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(x)) * self.gain.float()
        return self.last(torch.tanh(self.outer(torch.relu(self.inner(hidden)))))


def net_problem() -> ts.ModuleProblem:
    x = torch.linspace(-1, 1, 9)[:, None]
    return ts.ModuleProblem(Net, nn.functional.mse_loss, train=(x, x.sin()), batch_size=3)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Two stores, to be copied: a whole one, of a problem given as an object, and one that was stopped."""
    folder = tmp_path_factory.mktemp("recordings")
    table = {"name": "mine", "operator": {"family": "sgd", "lr": 0.1}, "steps": 7, "seeds": [0, 3], "orders": ORDERS}
    left = 5

    def interrupt(done: int, where: str) -> None:
        nonlocal left
        left -= done if where.startswith("seed 1") else 0
        if left < 0:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        whole = ts.Experiment.of({**table, "problem": net_problem()})
        ts.run(whole, folder / "whole.zarr", engine="reference")
        patch.setattr("trajstore.recording.schema.segment_length", lambda layout: 4)
        with pytest.raises(KeyboardInterrupt):
            ts.run(ts.Experiment.of(SMALL_NET), folder / "half.zarr", progress=interrupt, engine="reference")
    return folder


@pytest.fixture
def stored(recordings, tmp_path):
    """Every slab is complete."""
    return ts.open(shutil.copytree(recordings / "whole.zarr", tmp_path / "runs.zarr"))["mine"]


@pytest.fixture
def half(recordings, tmp_path):
    """Seed 0 is complete; of seed 1 there are some steps of `forward`, and of `backward` the start."""
    return ts.open(shutil.copytree(recordings / "half.zarr", tmp_path / "runs.zarr"))["net"]


def everything(folder: Path) -> dict[str, int | None]:
    """What lies below a folder, but for locks and the index."""
    return {
        str(f.relative_to(folder)): f.stat().st_mtime_ns if f.is_file() else None
        for f in folder.rglob("*")
        if not any(part.endswith(".traj") for part in f.relative_to(folder).parts)
    }


def rows_of(file: Path, columns: str = "*") -> list[tuple]:
    return duckdb.sql(f"SELECT {columns} FROM read_parquet('{file}')").fetchall()


def test_every_state_loads_strictly_with_its_own_names_shapes_and_dtypes(stored, tmp_path):
    layout, file = stored.schema.layout, tmp_path / "state.safetensors"
    entries = {e.name: e for e in layout.entries if e.role in ("parameter", "buffer") and e.in_state_dict}
    fresh = Net().state_dict()
    assert {"outer.weight", "again.running_mean", "again.num_batches_tracked"} <= layout.tied.keys() <= fresh.keys()
    for i, order in enumerate(ORDERS):
        for k, seed in enumerate((0, 3)):
            for step in (0, 4, 7):
                export_state(stored, file, order=order, seed=seed, step=step, force=True)
                state = load_file(file)
                assert state.keys() == fresh.keys()
                vectors = {a: stored.group[a][i, k, :, step] for a in ("params", "counters")}
                for name, tensor in state.items():
                    entry = entries[layout.tied.get(name, name)]
                    assert (tensor.dtype, tensor.shape) == (fresh[name].dtype, fresh[name].shape)
                    raw = vectors[entry.array][entry.offset : entry.offset + entry.size].reshape(entry.shape)
                    assert np.array_equal(tensor.to(torch.float64).numpy(), raw.astype(np.float64))
                module = Net()
                module.load_state_dict(state, strict=True)
                assert all(torch.equal(t, state[name]) for name, t in module.state_dict().items())
                assert module.outer.weight is module.inner.weight
    x = torch.linspace(-1, 1, 9)[:, None]
    loss = nn.functional.mse_loss(module.eval()(x), x.sin()).item()
    recorded = stored.dataset()["train_loss"].sel(order=order, seed=seed, step=step)
    assert loss == pytest.approx(float(recorded), rel=1e-5)


def test_a_state_says_where_it_comes_from_and_is_the_same_bytes_each_time(stored, tmp_path):
    files = [tmp_path / f"{k}.safetensors" for k in range(4)]
    for file in files:
        export_state(stored, file, order=ORDERS[2], seed=3, step=5)
    assert len({file.read_bytes() for file in files}) == 1
    with safe_open(files[0], "pt") as opened:
        assert opened.metadata() == {
            "format": "pt", "trajstore_format": "1", "experiment": "mine", "order": "backward+backward@4", "seed": "3",
            "step": "5", "config_digest": stored.attributes["config_digest"],
        }  # fmt: skip
    plain = tmp_path / "plain"
    plain.touch()
    assert files[0].stat().st_mode == plain.stat().st_mode  # others may read it, where they may read what I write


def test_metrics_are_those_of_the_dataset(record, tmp_path):
    record("quadratic", steps=3)  # has other metrics, which are not to appear
    experiment = record(record={"every": 5}, orders=["forward", "backward/4?train_loss"])
    file = tmp_path / "metrics.parquet"
    export_metrics(experiment, file)
    ds, metrics = experiment.dataset(), list(experiment.schema.metrics)
    described = duckdb.sql(f"DESCRIBE SELECT * FROM read_parquet('{file}')").fetchall()
    assert [name for name, *_ in described] == ["experiment", "order", "seed", "step", "leg", *metrics]
    assert [kind for _, kind, *_ in described] == ["VARCHAR", "VARCHAR", *["BIGINT"] * 3, *["DOUBLE"] * len(metrics)]
    rows = rows_of(file)
    assert [row[1:4] for row in rows] == [
        (order, seed, step) for order in experiment.schema.orders for seed in (0, 1) for step in (0, 5, 10, 12)
    ]
    for name, order, seed, step, leg, *values in rows:
        here = ds.sel(order=order, seed=seed, step=step)
        assert (name, leg) == ("net", int(here["leg"]))
        for bit, (metric, value) in enumerate(zip(metrics, values, strict=True)):
            assert (value is not None) == bool(int(here["measured"]) >> bit & 1)
            assert value is None or value == float(here[metric])
    told = dict(duckdb.sql(f"SELECT decode(key), decode(value) FROM parquet_kv_metadata('{file}')").fetchall())
    assert told == {
        "trajstore_format": "1", "experiment": "net", "config_digest": experiment.attributes["config_digest"]
    }  # fmt: skip
    export_metrics(experiment, tmp_path / "some.parquet", orders=["forward"], seeds=[1])
    assert rows_of(tmp_path / "some.parquet") == [row for row in rows if row[1:3] == ("forward", 1)]


def test_not_measured_is_null_and_diverged_is_nan(record, tmp_path):
    experiment = record("quadratic", steps=40, seeds=[0], operator={"lr": 1e30}, problem={"dtype": "float32"})
    export_metrics(experiment, tmp_path / "m.parquet", orders=["forward"])
    export_arrays(experiment, tmp_path / "m", orders=["forward"])
    rows = rows_of(tmp_path / "m.parquet", "train_loss, batch_loss, step_distance")
    assert rows[0][1:] == (None, None)
    values = np.array(rows[1:], dtype=np.float64)
    assert np.isnan(values[-1]).all()
    stored = experiment.dataset().sel(order="forward", seed=0)
    assert np.array_equal(values[:, 0], stored["train_loss"].values[1:], equal_nan=True)
    metrics, measured = (np.load(tmp_path / "m" / f"forward.0.{name}.npy") for name in ("metrics", "measured"))
    names = list(experiment.schema.metrics)
    assert measured[0].tolist() == [name not in ("step_distance", "batch_loss") for name in names]
    assert measured[1:].all()
    assert np.isnan(metrics[-1, names.index("train_loss")])
    assert np.array_equal(metrics[:, 0], stored[names[0]].values, equal_nan=True)


def check_folder(folder: Path, experiment: ts.StoredExperiment) -> dict:
    """Compare every number of a folder with the dataset, going only by what `layout.json` says."""
    layout = json.loads((folder / "layout.json").read_text("utf-8"))
    ds, seen = experiment.dataset(), {"layout.json"}

    def load(file: str) -> np.ndarray:
        seen.add(file)
        return np.load(folder / file, mmap_mode="r", allow_pickle=False)

    for told in layout["slabs"]:
        slab = ds.sel(order=told["order"], seed=told["seed"])
        arrays = {name: load(file) for name, file in told["files"].items()}
        sizes = {"snapshot": told["snapshots"], "step": told["steps"], "metric": len(layout["metrics"])}
        for name, array in arrays.items():
            dimensions = layout["arrays"][name]["dimensions"]
            assert array.ndim == len(dimensions)
            assert all(sizes.setdefault(d, n) == n for d, n in zip(dimensions, array.shape, strict=True))
        steps, snapshots = arrays["steps"], arrays["snapshots"]
        assert steps.tolist() == np.flatnonzero(slab["recorded"].values).tolist()
        assert snapshots.tolist() == slab["snapshot"].values[slab["stored"].values].tolist()
        assert (steps[-1], len(snapshots) > 0) == (told["last_step"], True)
        for name, along in (("params", "param"), ("counters", "counter")):
            expected = slab[name].sel(snapshot=snapshots).transpose("snapshot", along).values
            assert arrays[name].dtype == expected.dtype
            assert np.array_equal(arrays[name], expected)
        for name in ("leg", "sketch"):
            assert np.array_equal(arrays[name], slab[name].sel(step=steps).values)
        for column, metric in enumerate(layout["metrics"]):
            expected = slab[metric["name"]].sel(step=steps).values
            assert np.array_equal(arrays["metrics"][:, column], expected, equal_nan=True)
            measured = slab["measured"].sel(step=steps).values >> column & 1
            if metric["late"]:  # in these tests none of them is not finite
                measured = np.isfinite(expected)
            assert np.array_equal(arrays["measured"][:, column], measured)
        row = len(snapshots) - 1
        state = experiment.arrays(order=told["order"], seed=told["seed"], step=int(snapshots[row]))
        for vector in ("params", "counters"):
            for e in layout[vector]:
                flat = arrays[vector][row, e["offset"] : e["offset"] + int(np.prod(e["shape"]))]
                if e["role"] in ("parameter", "buffer") and e["in_state_dict"]:
                    assert np.array_equal(flat.reshape(e["shape"]), state.pop(e["name"]))
        assert state.keys() == layout["tied"].keys()
    for seed in layout["seeds"]:
        here = ds.sel(seed=seed["seed"])
        assert (seed["init_seed"], seed["data_seed"]) == (int(here["init_seed"]), int(here["data_seed"]))
        if seed["batch_index"] is not None:
            assert np.array_equal(load(seed["batch_index"]), here["batch_index"].values)
    assert seen == {f.name for f in folder.iterdir()}
    return layout


def test_arrays_are_those_of_the_dataset(stored, tmp_path):
    export_arrays(stored, tmp_path / "out")
    layout = check_folder(tmp_path / "out", stored)
    assert [(slab["order"], slab["seed"]) for slab in layout["slabs"]] == [(o, s) for o in ORDERS for s in (0, 3)]
    assert all(slab["complete"] for slab in layout["slabs"])
    assert layout["slabs"][0]["files"]["params"] == "forward.0.params.npy"
    assert layout["slabs"][-1]["files"]["leg"] == "backward%2F3%3Ftrain_loss.3.leg.npy"
    assert layout["config"] == stored.config
    assert (layout["config_digest"], layout["fills"]) == tuple(stored.attributes[k] for k in ("config_digest", "fills"))
    assert {e["name"] for e in layout["params"]} >= {"inner.weight", "gain", "float16s", "transient"}
    assert not any(f.stat().st_mode & 0o400 == 0 for f in (tmp_path / "out").iterdir())
    export_arrays(stored, tmp_path / "some", orders=["backward"], seeds=[3])
    assert [slab["files"]["params"] for slab in check_folder(tmp_path / "some", stored)["slabs"]] == [
        "backward.3.params.npy"
    ]


@pytest.mark.parametrize(
    "grid",
    [
        {"every": 2, "snapshot_every": 4}, {"steps": [2, 7]}, {"optimizer_state": True, "sketch": 16},
        {"adaptive": "train_loss", "tolerance": 0.3}, {"codec": "portable"},
    ],
    ids=str,
)  # fmt: skip
def test_arrays_of_any_grid(record, tmp_path, monkeypatch, grid):
    monkeypatch.setattr("trajstore.recording.schema.segment_length", lambda layout: 3)
    monkeypatch.setattr("trajstore.storage.format.schema._PARAM_CHUNK", 10)
    monkeypatch.setattr("trajstore.exchange.export_arrays._BLOCK_BYTES", 300)
    experiment = record(record=grid, operator={"family": "adam", "lr": 0.01}, orders=["backward"])
    export_arrays(experiment, tmp_path / "out")
    check_folder(tmp_path / "out", experiment)


def test_a_loops_own_metrics_are_among_the_arrays_also_those_that_came_late(tmp_path):
    with ts.record(tmp_path / "s.zarr", "mine", nn.Linear(2, 1), steps=6, durability="none") as rec:
        for n in range(1, 5):
            rec.step(loss=1 / n)
            rec.log(n // 2, sharpness=float(n)) if n % 2 else None
    stored = ts.open(tmp_path / "s.zarr")["mine"]
    export_arrays(stored, tmp_path / "out")
    told = {m["name"]: (m["late"], m["about"]) for m in check_folder(tmp_path / "out", stored)["metrics"]}
    assert told["loss"] == (False, "as the loop gave it")
    assert told["sharpness"] == (True, "as the loop gave it, after the step was recorded")
    values, measured = (np.load(tmp_path / "out" / f"forward.0.{name}.npy")[:, -1] for name in ("metrics", "measured"))
    assert np.array_equal(values, [1, 3, np.nan, np.nan, np.nan], equal_nan=True)
    assert measured.tolist() == [True, True, False, False, False]


def test_problems_without_batches_have_no_file_of_them(record, tmp_path):
    experiment = record("quadratic", steps=5, seeds=[2])
    export_arrays(experiment, tmp_path / "out")
    layout = check_folder(tmp_path / "out", experiment)
    assert layout["seeds"] == [{"seed": 2, "init_seed": 2, "data_seed": 2, "batch_index": None}]
    assert "batch_index" not in layout["arrays"]


def test_numpy_alone_reads_the_folder(stored, tmp_path):
    export_arrays(stored, tmp_path / "out", orders=["forward"], seeds=[0])
    program = (
        "import json, sys, numpy as np\n"
        "layout = json.load(open('layout.json', encoding='utf-8'))\n"
        "(slab,) = layout['slabs']\n"
        "params = np.load(slab['files']['params'], mmap_mode='r', allow_pickle=False)\n"
        "e = next(e for e in layout['params'] if e['name'] == 'norm.running_mean')\n"
        "print(*params[-1, e['offset'] : e['offset'] + 4])\n"
        "assert not {'torch', 'zarr', 'trajstore'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", program]
    told = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, text=True, check=True)
    expected = stored.state_dict(order="forward", seed=0, step=7)["norm.running_mean"]
    assert [float(v) for v in told.stdout.split()] == pytest.approx(expected.tolist(), rel=1e-6)


def test_of_a_half_recorded_experiment_only_what_is_committed_is_exported(half, tmp_path):
    slabs = {(s.order, s.seed): s for s in half.slabs()}
    assert 0 < slabs["forward", 1].last_step < 12
    export_arrays(half, tmp_path / "out")
    layout = check_folder(tmp_path / "out", half)
    for told in layout["slabs"]:
        slab = slabs.pop((told["order"], told["seed"]))
        assert (told["complete"], told["last_step"]) == (slab.complete, slab.last_step)
    assert all(slab.recorded == 0 for slab in slabs.values())
    export_metrics(half, tmp_path / "m.parquet")
    last = {(order, seed): step for order, seed, step in rows_of(tmp_path / "m.parquet", '"order", seed, step')}
    assert last == {(slab.order, slab.seed): slab.last_step for slab in half.slabs() if slab.recorded}


def test_what_lies_beyond_the_commit_record_is_not_exported(record, tmp_path, monkeypatch):
    monkeypatch.setattr("trajstore.recording.schema.segment_length", lambda layout: 4)
    experiment = record(record={"snapshot_every": 2})
    committed = array_of(open_root(tmp_path / "runs.zarr")["net"], "committed")
    records = committed[0, 1]
    records[0, :2] = [5, 3]  # snapshots 0, 2, 4 of 0, 2, 4, 6; steps 0 to 4 of 0 to 7
    records[1] = -1
    committed[0, 1] = records
    committed[1, 1] = -1
    export_arrays(experiment, tmp_path / "out")
    layout = check_folder(tmp_path / "out", experiment)
    assert [(s["order"], s["seed"], s["steps"], s["snapshots"], s["complete"]) for s in layout["slabs"]] == [
        ("forward", 0, 13, 7, True), ("forward", 1, 5, 3, False), ("backward", 0, 13, 7, True),
    ]  # fmt: skip
    export_metrics(experiment, tmp_path / "m.parquet", seeds=[1])
    assert rows_of(tmp_path / "m.parquet", '"order", seed, step') == [("forward", 1, n) for n in range(5)]
    with pytest.raises(NotFoundError, match="order 'forward', seed 1: step 6 is not recorded yet; go on with --resume"):
        export_state(experiment, tmp_path / "s.safetensors", order="forward", seed=1, step=6)
    for write in (export_arrays, export_metrics):
        with pytest.raises(NotFoundError, match="'net', order 'backward', seed 1: nothing is recorded yet; go on"):
            write(experiment, tmp_path / "none", orders=["backward"], seeds=[1])
    assert {f.name for f in tmp_path.iterdir()} == {"runs.zarr", "runs.zarr.traj", "out", "m.parquet"}


def test_a_slab_is_never_in_memory_as_a_whole(record, tmp_path, monkeypatch):
    monkeypatch.setattr("trajstore.recording.schema.segment_length", lambda layout: 8)
    monkeypatch.setattr("trajstore.storage.format.schema._PARAM_CHUNK", 4096)
    monkeypatch.setattr("trajstore.exchange.export_arrays._BLOCK_BYTES", 2**17)
    problem = {"family": "regression", "width": 100, "depth": 2, "points": 5}
    experiment = record(problem=problem, steps=120, orders=["forward"], seeds=[0], record={"sketch": 1})
    export_arrays(experiment, tmp_path / "warm")
    tracemalloc.start()
    try:
        export_arrays(experiment, tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    whole = (tmp_path / "out" / "forward.0.params.npy").stat().st_size
    assert whole > 5_000_000
    assert peak < whole / 4
    check_folder(tmp_path / "out", experiment)


def test_the_command_writes_what_the_ending_says(trajstore, stored, tmp_path):
    where = ["--order", "backward", "--seed", "3"]
    code, out, err = trajstore("export", "runs.zarr", "mine", *where, "--step", "5", "-o", "a.safetensors")
    assert (code, out, err) == (0, "a.safetensors\n", "")
    Net().load_state_dict(load_file("a.safetensors"), strict=True)
    assert trajstore("export", "runs.zarr", "mine", "-o", "m.PARQUET")[::2] == (0, "")
    assert len(rows_of(Path("m.PARQUET"))) == len(ORDERS) * 2 * 8
    some = ["--orders", "forward, backward", "--seeds", "0-0"]
    assert trajstore("export", "runs.zarr", "mine", "-o", "some.parquet", *some)[0] == 0
    assert {row[1:3] for row in rows_of(Path("some.parquet"))} == {("forward", 0), ("backward", 0)}
    assert trajstore("export", "runs.zarr", "mine", "-o", "out/", "--numpy", *where)[::2] == (0, "")
    assert len(check_folder(Path("out"), stored)["slabs"]) == 1
    assert {f.name for f in tmp_path.iterdir()} == {
        "runs.zarr", "a.safetensors", "m.PARQUET", "some.parquet", "out"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["it's [a] *", "ü?{1}"])
def test_folders_with_any_name(trajstore, record, tmp_path, name):
    experiment = record(steps=3, seeds=[0])
    (tmp_path / name).mkdir()
    assert trajstore("export", "runs.zarr", "net", "-o", f"{name}/m.parquet")[0] == 0
    assert len((tmp_path / name / "m.parquet").read_bytes()) > 100
    assert trajstore("export", "runs.zarr", "net", "-o", f"{name}/{name}", "--numpy")[0] == 0
    check_folder(tmp_path / name / name, experiment)
    assert {f.name for f in (tmp_path / name).iterdir()} == {"m.parquet", name}


STATE = ["--order", "forward", "--seed", "0", "--step", "5"]
BAD = [
    (["nowhere", "net", "-o", "x.parquet"], "there is no store at nowhere"),
    (["a-file", "net", "-o", "x.parquet"], "not a trajstore"),
    (["runs.zarr", "nett", "-o", "x.parquet"], "did you mean 'net'?"),
    (["runs.zarr", "net"], "Missing option"),
    (["runs.zarr", "net", "-o", "x.npz"], "-o x.npz: the ending says what to write"),
    (["runs.zarr", "net", "-o", "folder"], "or give --numpy for a folder"),
    (["runs.zarr", "net", "-o", ".parquet"], "the ending says what to write"),
    (["runs.zarr", "net", "-o", ""], "the ending says what to write"),
    (["runs.zarr", "net", "-o", "x.parquet", "--numpy"], "--numpy writes a folder"),
    (["runs.zarr", "net", "-o", "x.safetensors"], "this is for one state; give --order, --seed, --step as well"),
    (["runs.zarr", "net", "-o", "x.safetensors", *STATE[:4]], "give --step as well"),
    (["runs.zarr", "net", "-o", "x.safetensors", *STATE[2:]], "give --order as well"),
    (["runs.zarr", "net", "-o", "x.safetensors", *STATE, "--seed", "0-1"], "give one order and one seed"),
    (["runs.zarr", "net", "-o", "x.safetensors", *STATE, "--order", "forward,backward"], "give one order and one seed"),
    (["runs.zarr", "net", "-o", "x.parquet", "--step", "5"], "--step is for one state"),
    (["runs.zarr", "net", "-o", "x", "--numpy", "--step", "5"], "--step is for one state"),
    (["runs.zarr", "net", "-o", "x.safetensors", *STATE, "--step", "five"], "Invalid value for '--step'"),
    (["runs.zarr", "net", "-o", "x.parquet", "--seed", "one"], "'one' is not a seed or a range"),
    (["runs.zarr", "net", "-o", "x.safetensors", *STATE, "--order", "forwrd"], "no order 'forwrd'; did you mean"),
    (["runs.zarr", "net", "-o", "x.safetensors", *STATE, "--seed", "9"], "no seed 9; there is 0, 1"),
    (
        ["runs.zarr", "net", "-o", "x.safetensors", *STATE, "--step", "99"],
        "no state is stored for step 99; the nearest",
    ),
    (["runs.zarr", "net", "-o", "x.safetensors", *STATE, "--step", "-1"], "no state is stored for step -1"),
    (["runs.zarr", "net", "-o", "x.safetensors", *STATE, "--seed", "1", "--step", "12"], "step 12 is not recorded yet"),
    (["runs.zarr", "net", "-o", "x.parquet", "--order", "forwrd"], "no order 'forwrd'; did you mean 'forward'?"),
    (["runs.zarr", "net", "-o", "x.parquet", "--seed", "0,9"], "no seed 9; there is 0, 1"),
    (["runs.zarr", "net", "-o", "x", "--numpy", "--order", "forward,"], "no order ''"),
    (["runs.zarr", "net", "-o", "x", "--numpy", "--seed", "9"], "no seed 9; there is 0, 1"),
    (["runs.zarr", "net", "-o", "there.safetensors", *STATE], "there.safetensors exists already; give --force"),
    (["runs.zarr", "net", "-o", "there.parquet"], "there.parquet exists already; give --force"),
    (["runs.zarr", "net", "-o", "folder.parquet", "--force"], "folder.parquet is a folder"),
    (["runs.zarr", "net", "-o", "device.parquet", "--force"], "device.parquet is not a regular file"),
    (["runs.zarr", "net", "-o", "there", "--numpy"], "there contains other things"),
    (["runs.zarr", "net", "-o", "there", "--numpy", "--force"], "there contains other things"),
    (["runs.zarr", "net", "-o", ".", "--numpy", "--force"], "contains other things"),
    (["runs.zarr", "net", "-o", "a-file", "--numpy", "--force"], "a-file is a file"),
    (["runs.zarr", "net", "-o", "no/x.parquet"], "there is no folder no"),
    (["runs.zarr", "net", "-o", "no/x", "--numpy"], "there is no folder no"),
    (["runs.zarr", "net", "-o", "a-file/x.parquet"], "there is no folder a-file"),
    (["runs.zarr", "net", "-o", "/proc/x.parquet"], "cannot write to /proc"),
    (["runs.zarr", "net", "-o", "/proc/x", "--numpy"], "cannot write to /proc"),
    (["runs.zarr", "net", "-o", "/proc/x.safetensors", *STATE], "cannot write to /proc"),
    (["runs.zarr", "net", "-o", "runs.zarr/x.parquet"], "lies in the store"),
    (["runs.zarr", "net", "-o", "runs.zarr/net/x", "--numpy"], "lies in the store"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_a_wrong_request_gets_one_clear_line_and_writes_nothing(trajstore, half, tmp_path, arguments, says):
    for file in ("a-file", "there.parquet", "there.safetensors"):
        (tmp_path / file).write_text("x")
    for file in ("there/thesis.tex", "there/layout.json", "folder.parquet/x"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    (tmp_path / "device.parquet").symlink_to("/dev/null")
    before = everything(tmp_path)
    code, out, err = trajstore("export", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("trajstore: ")
    assert err.count("\n") == 1
    assert says in err
    assert everything(tmp_path) == before


def test_force_replaces_what_was_exported_before(trajstore, half, tmp_path):
    for arguments in (["x.parquet"], ["x.safetensors", *STATE], ["x", "--numpy"]):
        assert trajstore("export", "runs.zarr", "net", "-o", *arguments)[0] == 0
        before = everything(tmp_path)
        code, _, err = trajstore("export", "runs.zarr", "net", "-o", *arguments)
        assert (code, err) == (2, f"trajstore: {arguments[0]} exists already; give --force to replace it\n")
        assert everything(tmp_path) == before
        fewer = [] if "--step" in arguments else ["--seed", "0"]
        assert trajstore("export", "runs.zarr", "net", "-o", *arguments, *fewer, "--force")[0] == 0
        assert everything(tmp_path).keys() <= before.keys()
        assert everything(tmp_path) != before
    assert {row[2] for row in rows_of(Path("x.parquet"))} == {0}
    assert {slab["seed"] for slab in check_folder(Path("x"), half)["slabs"]} == {0}
    Path("x/notes.txt").write_text("mine")
    code, _, err = trajstore("export", "runs.zarr", "net", "-o", "x", "--numpy", "--force")
    assert code == 2
    assert "contains other things" in err
    assert Path("x/notes.txt").read_text() == "mine"
    Path("empty").mkdir()
    assert trajstore("export", "runs.zarr", "net", "-o", "empty", "--numpy")[0] == 0
    check_folder(Path("empty"), half)


KINDS = {"state": ["x.safetensors", *STATE], "metrics": ["x.parquet"], "arrays": ["x", "--numpy"]}


@pytest.mark.parametrize("arguments", KINDS.values(), ids=list(KINDS))
def test_a_damaged_chunk_is_one_line_and_what_was_there_stays(trajstore, half, tmp_path, arguments):
    assert trajstore("export", "runs.zarr", "net", "-o", *arguments)[0] == 0
    for array in ("params", "leg"):
        shutil.copytree("runs.zarr", "good.zarr")
        for chunk in Path("runs.zarr/net", array, "c").rglob("*"):
            if chunk.is_file():
                chunk.write_bytes(b"junk")
        before = everything(tmp_path)
        code, _, err = trajstore("export", "runs.zarr", "net", "-o", *arguments, "--force")
        if (array, arguments[0]) != ("params", "x.parquet"):
            assert code == 1
            assert "experiment 'net'" in err
            assert "damaged" in err
            assert err.count("\n") == 1
            assert everything(tmp_path) == before
        shutil.rmtree("runs.zarr")
        Path("good.zarr").rename("runs.zarr")


@pytest.mark.parametrize("arguments", KINDS.values(), ids=list(KINDS))
def test_a_full_disk_is_one_line_and_leaves_nothing(trajstore, half, tmp_path, monkeypatch, arguments):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync" if arguments[0].endswith("parquet") else "os.posix_fallocate", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    before = everything(tmp_path)
    code, out, err = trajstore("export", "runs.zarr", "net", "-o", *arguments)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "could not be written (No space left on device); nothing of it was kept" in err
    assert everything(tmp_path) == before


def test_a_folder_that_vanishes_is_an_error_of_writing(half, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("trajstore.reading.sql.write_slab", lambda *_: shutil.rmtree(tmp_path / "out"))
    with pytest.raises(WriteError, match="could not be written"):
        export_metrics(half, tmp_path / "out" / "m.parquet")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("export", [export_metrics, export_arrays])
def test_an_interrupted_export_leaves_nothing(half, tmp_path, monkeypatch, export):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("trajstore.reading.sql.write_slab", interrupt)
    monkeypatch.setattr("trajstore.exchange.export_arrays._write_sketch", interrupt)
    before = everything(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        export(half, tmp_path / "x")
    assert everything(tmp_path) == before
