"""Replay: what was recorded comes out again, or it is told from where on it does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import trajstore as ts
from tests.conftest import SMALL_NET
from tests.recording.test_resume import stop_after
from trajstore.errors import ConfigurationError
from trajstore.reading.handles import open_root
from trajstore.replay.compare import replay
from trajstore.storage.writing.segment import array_of
from trajstore.storage.writing.slab_writer import Ledger

ORDERS = ["forward", "backward", "backward/4", "forward+backward@5"]


@pytest.mark.parametrize("how", [{"engine": "reference"}, {"engine": "wavefront", "lanes": 3}], ids=["plain", "wave"])
def test_a_recording_comes_out_again(tmp_path, how):
    experiment = ts.Experiment.of({**SMALL_NET, "orders": ORDERS, "record": {"every": 2}})
    with pytest.raises(KeyboardInterrupt):
        ts.run(experiment, tmp_path / "s.zarr", progress=stop_after(150), durability="none", **how)
    stored = ts.open(tmp_path / "s.zarr")["net"]
    begun = {(s.order, s.seed): s.recorded for s in stored.slabs() if s.recorded}
    told = list(replay(stored))
    assert {(slab.order, slab.seed): slab.compared for slab in told} == begun
    assert all(slab.differs_from is None for slab in told)
    assert str(told[0]) == "order 'forward', seed 0: 7 steps came out the same, bit for bit"


def test_what_differs_is_told_with_its_step_and_size(tmp_path):
    """A store whose records and data agree with each other, but not with its configuration."""
    ts.run(ts.Experiment.of({**SMALL_NET, "seeds": [0]}), tmp_path / "s.zarr", engine="reference", durability="none")
    group = open_root(tmp_path / "s.zarr")["net"]
    array_of(group, "params")[1, 0, :3, 5] *= np.float32(1 + 1e-6)
    ledger = Ledger(group, ts.open(tmp_path / "s.zarr")["net"].schema, 1, 0)
    record = ledger.records.copy()
    rows = [row for rows in ledger._stored_rows(0) for row in rows]
    from trajstore.storage.writing.segment import Segment

    segment = Segment(group, ledger.schema, ledger.corner, 0)
    for row in rows:
        segment.append(row)
    record[0] = segment.cut().written().record
    ledger.take_over(record)
    forward, backward = replay(ts.open(tmp_path / "s.zarr")["net"])
    assert forward.differs_from is None
    assert backward.differs_from == 5
    assert 1e-9 < backward.off < 1e-5
    assert "different from step 5 on, by at most" in str(backward)


def test_what_cannot_be_replayed_says_why(tmp_path):
    x = torch.linspace(-1, 1, 5)[:, None]
    problem = ts.ModuleProblem(lambda: nn.Linear(1, 1), nn.functional.mse_loss, train=(x, x), batch_size=2)
    operator = {"family": "sgd", "lr": 0.1}
    experiment = ts.Experiment.of({"name": "object", "problem": problem, "operator": operator, "steps": 1})
    stored = ts.run(experiment, tmp_path / "s.zarr", engine="reference", durability="none")
    with pytest.raises(ConfigurationError, match="experiment 'object' cannot be replayed: its problem cannot be made"):
        list(replay(stored))
    with ts.record(tmp_path / "s.zarr", "mine", nn.Linear(2, 1), steps=2, durability="none") as rec:
        rec.step()
    with pytest.raises(ConfigurationError, match=r"'mine' was recorded by a training loop, .* it cannot be replayed; "):
        list(replay(ts.open(tmp_path / "s.zarr")["mine"]))
