"""What needs a GPU, against the same on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import trajstore as ts
from tests.conftest import SMALL_NET
from trajstore.recording.leaving import Leaving

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU on this machine")
DOUBLE = {**SMALL_NET, "problem": {**SMALL_NET["problem"], "dtype": "float64"}, "orders": ["forward", "backward"]}


@needs_gpu
@pytest.mark.parametrize("how", [{"engine": "reference"}, {"lanes": 1}, {"lanes": 8}])
def test_a_gpu_records_what_the_cpu_records(tmp_path, how):
    experiment = ts.Experiment.of({**DOUBLE, "steps": 60})
    there = ts.run(experiment, tmp_path / "gpu.zarr", device="cuda", **how).dataset()
    here = ts.run(experiment, tmp_path / "cpu.zarr", device="cpu", engine="reference").dataset()
    for name in ("params", "train_loss", "batch_loss", "start_distance", "step_distance", "sketch"):
        np.testing.assert_allclose(there[name], here[name], rtol=1e-9, atol=1e-12, err_msg=name)


@needs_gpu
def test_a_compiled_wave_is_replayed_as_a_graph():
    from trajstore.engine import Work
    from trajstore.engine.orders import Leg
    from trajstore.engine.plan import Plan, make_engine, ready
    from trajstore.operators.adam import Adam

    experiment = ts.Experiment.of(DOUBLE)
    live, operator = experiment.problem.build(torch.device("cuda")), Adam(1e-3)
    plan, wave = ready(Plan("wavefront", 4, compiled=True), live, operator, [(0, 0)])
    assert plan.compiled
    plain = make_engine(Plan("reference"), live, operator, [(0, 0)])
    steps = list(range(1, 80, 3))
    for engine in (wave, plain):
        assert [it.step for _, it in engine.run([Work(0, Leg("backward"), engine.start(0), steps)])] == steps
    ours, theirs = (
        [it for _, it in engine.run([Work(0, Leg("backward"), engine.start(0), steps)])] for engine in (wave, plain)
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.state.params, other.state.params, rtol=1e-9, atol=1e-12)


@needs_gpu
def test_what_leaves_a_gpu_arrives_whole_while_more_is_computed():
    leaving, sent = Leaving(), []
    for k in range(32):
        tensor = torch.full((1_000_000,), float(k), device="cuda")
        sent.append(leaving.send([tensor, tensor[:3] * 2]))
        del tensor
    for k, arrived in enumerate(sent):
        whole, part = arrived()
        assert whole.is_pinned()
        assert (whole == k).all()
        assert part.tolist() == [2.0 * k] * 3


def test_host_tensors_are_there_already():
    tensor = torch.arange(3)
    (arrived,) = Leaving().send([tensor])()
    assert arrived is tensor


def test_iterates_that_wait_to_arrive_arrive_in_order(tmp_path, monkeypatch):
    """On the CPU nothing waits; here it does, as on a GPU."""
    experiment = ts.Experiment.of({**DOUBLE, "orders": ["forward", "backward", "backward+backward@5"]})
    whole = ts.run(experiment, tmp_path / "one.zarr", engine="reference")
    monkeypatch.setattr("trajstore.recording.here._ON_THE_WAY", {"cpu": 4})
    waited = ts.run(experiment, tmp_path / "other.zarr", engine="reference")
    assert np.array_equal(waited.commits().records, whole.commits().records)
