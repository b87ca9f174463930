"""The measures that every problem has, against the stored states themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import trajstore as ts
from tests.conftest import SMALL_NET
from trajstore.errors import ConfigurationError

TABLE = {**SMALL_NET, "orders": ["forward", "backward", "forward+backward/4@5"], "record": {"every": 3}}


@pytest.mark.parametrize("engine", ["reference", "wavefront"])
def test_norms_distances_and_the_loss_on_the_newest_batch(tmp_path, engine):
    stored = ts.run(ts.Experiment.of(TABLE), tmp_path / "s.zarr", engine=engine)
    ds = stored.dataset().load()
    live = ts.Experiment.of(TABLE).live
    steps = [0, 3, 6, 9, 12]
    for order in TABLE["orders"]:
        for seed in TABLE["seeds"]:
            here = ds.sel(order=order, seed=seed)
            theta = here["params"].sel(snapshot=steps).values.astype(np.float64)
            assert here["param_norm"].sel(step=steps).values == pytest.approx(np.linalg.norm(theta, axis=0), rel=1e-12)
            far = np.linalg.norm(theta - theta[:, :1], axis=0)
            assert here["start_distance"].sel(step=steps).values == pytest.approx(far, rel=1e-12)
            gaps = np.linalg.norm(np.diff(theta, axis=1), axis=0)
            assert here["step_distance"].sel(step=steps[1:]).values == pytest.approx(gaps, rel=1e-12)
            for n in steps[1:]:
                params = stored.state_dict(order=order, seed=seed, step=n)
                batch = live.batches(seed)[n]
                loss, _ = live.loss(params, {}, batch)
                assert float(here["batch_loss"].sel(step=n)) == pytest.approx(float(loss), rel=1e-4)  # float32
    assert not (ds["measured"].sel(step=0) & 0b1010 << 1).any()
    assert torch.is_grad_enabled()


def test_a_problem_may_not_take_their_names(tmp_path):
    table = {**SMALL_NET, "problem": taken()}
    with pytest.raises(ConfigurationError, match="batch_loss"):
        ts.run(ts.Experiment.of(table), tmp_path / "s.zarr")


def taken():
    """A problem with a metric of a taken name."""
    family = ts.Experiment.of(SMALL_NET).problem

    class Taken:
        def describe(self):
            return {"family": "taken"}

        def build(self, device):
            live = family.build(device)
            live.examples = {**live.examples, "batch_loss": 1}
            return live

    return Taken()
