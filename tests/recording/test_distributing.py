"""Workers compute the same bytes, whoever of them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress

import numpy as np
import psutil
import pytest

import trajstore as ts
from tests.conftest import SMALL_NET, sampled
from tests.tools.waiting import until
from trajstore.engine.reference import ReferenceEngine
from trajstore.engine.walk import Slab, applications, stretches_of, walk
from trajstore.errors import ConfigurationError, WorkerError
from trajstore.recording.workers import connected
from trajstore.recording.workers.parts import bundles, parts_of

ORDERS = ["forward", "backward", "backward/30", "forward+backward@50", "backward/7?train_loss"]
TABLE = {**SMALL_NET, "orders": ORDERS, "steps": 80, "seeds": [0, 4], "record": {"snapshot_every": 2}}


def assert_same(one: ts.StoredExperiment, other: ts.StoredExperiment) -> None:
    a, b = one.dataset().load(), other.dataset().load()
    assert set(a.data_vars) == set(b.data_vars)
    for name in a.data_vars:
        np.testing.assert_array_equal(a[name].values, b[name].values, err_msg=name)
    assert np.array_equal(one.commits().records, other.commits().records)
    assert one.commits().complete.all()


@pytest.fixture(scope="module")
def cluster():
    """Two workers that the tests of this module share, by the address of their scheduler."""
    with connected(2) as client:
        yield client


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> ts.StoredExperiment:
    """The same recording by this process alone."""
    path = tmp_path_factory.mktemp("here") / "here.zarr"
    return ts.run(ts.Experiment.of(TABLE), path, engine="reference", workers=0)


@pytest.mark.parametrize(
    "grid", sampled([{"every": 3, "snapshot_every": 6}, {}, {"steps": [1, 7, 50, 60, 75]}], every=3)
)
def test_workers_record_what_one_process_records(tmp_path, cluster, grid):
    experiment = ts.Experiment.of({**TABLE, "record": grid})
    alone = ts.run(experiment, tmp_path / "here.zarr", engine="reference", workers=0)
    address = cluster.scheduler.address
    assert_same(ts.run(experiment, tmp_path / "there.zarr", engine="reference", scheduler=address), alone)


def test_segments_that_are_cut_into_parts_are_put_together(tmp_path, cluster, here, monkeypatch):
    monkeypatch.setattr("trajstore.recording.workers.client._TASKS_A_WORKER", 200)
    address = cluster.scheduler.address
    assert_same(ts.run(ts.Experiment.of(TABLE), tmp_path / "s.zarr", engine="reference", scheduler=address), here)


def test_a_wave_on_workers_is_the_same_up_to_rounding(tmp_path, cluster, here):
    address = cluster.scheduler.address
    stored = ts.run(ts.Experiment.of(TABLE), tmp_path / "s.zarr", engine="wavefront", lanes=3, scheduler=address)
    plain = [i for i, order in enumerate(ORDERS) if "?" not in order]  # a reset may turn on the last bit
    for name, tolerance in (("params", 1e-4), ("step_distance", 1e-4), ("train_loss", 1e-4)):
        ours, theirs = (e.dataset()[name].values[plain] for e in (stored, here))
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=1e-6)


def test_a_worker_that_is_killed_changes_nothing(tmp_path, here):
    killed, others = [], set(_workers_of(os.getpid()))

    def kill_one(done: int, where: str) -> None:
        if not killed:
            mine = min(set(_workers_of(os.getpid())) - others)
            os.kill(mine, signal.SIGKILL)
            killed.append(mine)

    stored = ts.run(ts.Experiment.of(TABLE), tmp_path / "s.zarr", engine="reference", workers=2, progress=kill_one)
    assert killed
    assert_same(stored, here)
    assert not list((tmp_path / "s.zarr").rglob("*.partial"))


def _workers_of(ancestor: int) -> list[int]:
    """Return the workers among a process's descendants."""
    found = []
    for process in psutil.Process(ancestor).children(recursive=True):
        with suppress(psutil.Error):  # it has ended in between
            found += [process.pid] if "multiprocessing.spawn" in " ".join(process.cmdline()) else []
    return found


def deadly() -> ts.ModuleProblem:
    """A problem whose loss ends the process, but not in the one that tests it."""
    import torch

    def loss(outputs, y):
        if os.environ.get("ALIVE") != str(os.getpid()):
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.nn.functional.mse_loss(outputs, y)

    data = torch.randn(8, 2), torch.randn(8, 1)
    return ts.ModuleProblem(lambda: torch.nn.Linear(2, 1), loss, data)


def test_a_task_that_kills_every_worker_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIVE", str(os.getpid()))
    table = {
        **TABLE,
        "problem": {"family": "factory", "function": "tests.recording.test_distributing:deadly"},
        "steps": 5,
    }
    table |= {"orders": ["backward"], "record": {}}
    with pytest.raises(WorkerError, match="workers died again and again"):
        ts.run(ts.Experiment.of(table), tmp_path / "s.zarr", engine="reference", workers=1)


def test_a_scheduler_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("trajstore.recording.workers.cluster._PATIENCE", 1)
    with pytest.raises(ConfigurationError, match=r"no Dask scheduler answers at 'tcp://127\.0\.0\.1:9'"):
        ts.run(ts.Experiment.of(TABLE), tmp_path / "s.zarr", scheduler="tcp://127.0.0.1:9")
    with pytest.raises(ConfigurationError, match="give workers or a scheduler, not both"):
        ts.run(ts.Experiment.of(TABLE), tmp_path / "s.zarr", scheduler="tcp://127.0.0.1:9", workers=2)


def test_workers_end_with_a_client_that_is_killed(tmp_path):
    code = (
        "import trajstore as ts\n"
        "ts.run(ts.Experiment.preset('fig4', {'steps': 1400}), 's.zarr', engine='reference', workers=1)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.DEVNULL)
    until(lambda: _workers_of(process.pid), "a worker is born")
    born = _workers_of(process.pid)
    process.kill()
    process.wait()
    until(lambda: not any(map(psutil.pid_exists, born)), "the worker ends")


def test_parts_are_every_recorded_step_once_and_bounded():
    experiment = ts.Experiment.of({**TABLE, "record": {"every": 2}})
    engine = ReferenceEngine(experiment.live, experiment.operator, experiment.run_seeds)
    slabs = [Slab(order, k) for order in experiment.orders for k in (0, 1)]
    stretches = stretches_of(slabs, experiment.steps, engine)
    parts = parts_of(stretches, experiment.grid, lambda n: n // 32, most=500)
    for slab in slabs:
        mine = [p for p in parts if slab in stretches[p.stretch].slabs]
        assert sorted(n for p in mine for n in p.steps) == list(experiment.grid)
        for part in mine:
            if stretches[part.stretch].leg.kind == "backward":
                assert len({n // 32 for n in part.steps}) == 1
                assert part.applications <= 500 + 2 * part.steps[-1]
    assert sorted(p for b in bundles(parts, 400, 1) for p in b) == sorted(parts)


def test_stretches_are_the_legs_that_walking_takes():
    experiment = ts.Experiment.of(TABLE)
    engine = ReferenceEngine(experiment.live, experiment.operator, experiment.run_seeds)
    slabs = [Slab(order, 0) for order in experiment.orders]
    stretches = stretches_of(slabs, experiment.steps, engine)
    for visit in walk(slabs, experiment.steps, experiment.grid, engine):
        for slab in visit.slabs:
            n = visit.iterate.step
            (mine,) = [s for s in stretches if slab in s.slabs and (s.begin < n <= s.end or n == s.begin == 0)]
            assert mine.leg.start == visit.leg_start
    assert applications(experiment.orders, experiment.steps, experiment.grid) > 0
