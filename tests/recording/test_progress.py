"""How far an experiment is, told alike wherever it is told: what was to be recorded, not what there is room for."""

from __future__ import annotations

import json
from contextlib import suppress

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import trajstore as ts
from tests.conftest import record_half
from trajstore.exchange.merge import merge


def loop(path, seed=0, length=10, **options):
    """Record a loop of so many steps, whose metric `m` is the step."""
    with ts.record(path, "loop", nn.Linear(2, 1), seed=seed, durability="none", **options) as rec:
        for step in range(rec.last + 1, length + 1):
            rec.step(m=step)
    return ts.open(path)["loop"]


def told(experiment, trajstore):
    """Return the last step, as every place tells it that tells one."""
    store, name = str(experiment.store), experiment.name
    (row,) = json.loads(trajstore("ls", store, "--json")[1])
    (line,) = [line for line in trajstore("info", store, name)[1].splitlines() if line.startswith("steps")]
    shown = repr(experiment).split("steps        0 to ")[1].split(",")[0]
    listed = repr(experiment.store).splitlines()[2].split()
    with xr.open_dataset(store, engine="trajstore", group=name) as opened:
        sizes = {opened.sizes["step"], experiment.dataset().sizes["step"]}
        sizes |= {experiment.store.datatree()[name].sizes["step"]}
    asked = experiment.store.sql("SELECT steps FROM experiments UNION ALL SELECT steps FROM runs").fetchall()
    steps = {row["steps"], int(line.split()[1].strip(",")), int(shown), *(n for (n,) in asked), *(n - 1 for n in sizes)}
    assert str(*steps) in listed
    (last,) = steps
    return last


def test_a_loop_ends_where_it_ended(tmp_path, trajstore):
    experiment = loop(tmp_path / "s.zarr", length=100)
    assert told(experiment, trajstore) == 100
    assert "101 of 101" in repr(experiment)
    assert "1 of 1 slabs complete" in repr(experiment)
    ds = experiment.dataset()
    assert (ds.sizes["step"], ds.sizes["snapshot"], bool(ds["recorded"].all())) == (101, 101, True)
    assert ds["m"].values[0, 0, 1:].tolist() == list(range(1, 101))
    assert ds["params"].shape[-1] == 101
    assert np.isfinite(ds["params"].values).all()
    with xr.open_zarr(tmp_path / "s.zarr", group="loop", chunks=None, consolidated=False) as plain:
        assert plain.sizes["step"] == 4096  # the room


def test_slabs_of_different_lengths_end_with_the_longest(tmp_path, trajstore):
    loop(tmp_path / "s.zarr", seed=0, length=10)
    experiment = loop(tmp_path / "s.zarr", seed=1, length=20, order="other")
    assert told(experiment, trajstore) == 20
    assert "11 of 11" in repr(experiment)
    assert "21 of 21" in repr(experiment)
    assert "2 of 4 slabs complete" in repr(experiment)
    ds = experiment.dataset()
    assert ds["recorded"].sum("step").values.tolist() == [[11, 0], [0, 21]]


def test_a_declared_loop_keeps_its_length_and_may_be_longer(tmp_path, trajstore):
    with suppress(KeyboardInterrupt), ts.record(tmp_path / "s.zarr", "loop", nn.Linear(2, 1), steps=50) as rec:
        for _ in range(10):
            rec.step()
        raise KeyboardInterrupt
    experiment = ts.open(tmp_path / "s.zarr")["loop"]
    assert told(experiment, trajstore) == 50
    assert "11 of 51, not complete" in repr(experiment)
    with pytest.warns(ts.errors.ResumedWarning):
        experiment = loop(tmp_path / "s.zarr", length=70, steps=50, resume=True)
    assert told(experiment, trajstore) == 70
    assert "71 of 71" in repr(experiment)
    assert loop(tmp_path / "s.zarr", seed=1, length=3, steps=80).progress().steps == 80


def test_a_recording_in_progress_ends_at_its_last_committed_step(tmp_path):
    with ts.record(tmp_path / "s.zarr", "loop", nn.Linear(2, 1)) as rec:
        for _ in range(5):
            rec.step()
        during = ts.open(tmp_path / "s.zarr")["loop"]
        committed = int(during.commits().last_step.max())
        assert during.progress().steps == max(0, committed) < 10
        assert "not complete" in repr(during)
        opened = during.dataset()
    assert opened.sizes["step"] == max(0, committed) + 1  # a dataset is what was committed when it was opened
    assert np.isfinite(opened["param_norm"].values).sum() == opened["recorded"].sum()
    assert ts.open(tmp_path / "s.zarr")["loop"].progress().steps == 5


def test_late_metrics_sparse_steps_and_few_states_end_there_too(tmp_path, trajstore):
    with ts.record(tmp_path / "s.zarr", "loop", nn.Linear(2, 1), snapshots=ts.every(7)) as rec:
        for step in range(10, 110, 10):
            rec.step(step, m=step)
            rec.log(step - 10, late=step)
    experiment = ts.open(tmp_path / "s.zarr")["loop"]
    assert told(experiment, trajstore) == 100
    assert "11 of 11" in repr(experiment)
    ds = experiment.dataset()
    assert ds["late"].sizes["step"] == ds["measured"].sizes["step"] == 101
    assert ds["late"].values[0, 0, :100:10].tolist() == list(range(10, 110, 10))
    assert ds["snapshot"].values[-1] == 98
    with pytest.raises(ts.errors.NotFoundError, match="the nearest is step 98"):
        experiment.arrays(order="forward", seed=0, step=103)


def test_a_loop_longer_than_its_first_room_is_told_at_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("trajstore.recording.loop.recorder._GROWTH", 8)
    experiment = loop(tmp_path / "s.zarr", length=30)
    assert experiment.schema.steps > 30
    assert experiment.progress().steps == 30
    chunks = experiment.dataset()["m"].chunks
    assert sum(chunks[-1]) == 31


@pytest.mark.parametrize(
    ("record", "wanted"),
    [({"every": 4}, 51), ({"steps": [3, 50]}, 4), ({"log_until": 10, "every": 50}, None)],
)
def test_what_counts_as_complete_is_what_was_to_be_recorded(tmp_path, trajstore, record, wanted):
    asked = ts.Experiment.preset("quadratic", {"steps": 200, "seeds": [0], "record": record})
    experiment = ts.run(asked, tmp_path / "s.zarr")
    count = len(asked.grid)
    assert wanted in (None, count)
    assert f"{count} of {count}" in repr(experiment)
    assert "not complete" not in repr(experiment)
    assert told(experiment, trajstore) == 200
    again = ts.Experiment.preset("quadratic", {"name": "half", "steps": 200, "seeds": [0], "record": record})
    record_half(again, tmp_path / "half.zarr")
    assert f"of {count}, not complete" in repr(ts.open(tmp_path / "half.zarr")["half"])


def test_an_adaptive_recording_is_not_told_as_part_of_a_grid(tmp_path):
    grid = {"adaptive": "train_loss", "tolerance": 1.0}
    asked = ts.Experiment.preset("quadratic", {"steps": 60, "seeds": [0], "record": grid})
    experiment = ts.run(asked, tmp_path / "s.zarr")
    counts = experiment.commits().steps.sum(-1).ravel().tolist()
    assert max(counts) < 61
    for count in counts:
        assert f"{count} of {count}" in repr(experiment)


def test_merged_loops_keep_what_was_declared(tmp_path):
    loop(tmp_path / "a.zarr", seed=0, length=3, steps=20)
    loop(tmp_path / "b.zarr", seed=1, length=5)
    merge(ts.open(tmp_path / "b.zarr"), ts.open(tmp_path / "a.zarr"))
    merged = ts.open(tmp_path / "a.zarr")["loop"]
    assert merged.progress().steps == 20
    assert merged.dataset()["recorded"].sum("step").values.tolist() == [[4, 6]]


def test_a_loop_of_an_older_trajstore_ends_at_its_last_step(tmp_path):
    experiment = loop(tmp_path / "s.zarr", length=9)
    assert "declared_steps" not in experiment.config
    assert experiment.progress().steps == 9
    assert torch.is_tensor(experiment.state_dict(order="forward", seed=0, step=9)["weight"])
