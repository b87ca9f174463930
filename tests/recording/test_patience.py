"""Workers that hang are told of, and a recording without any ends; neither waits for ever, silently."""

from __future__ import annotations

import os
import re
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import trajstore as ts
from tests.conftest import SMALL_NET
from tests.recording.test_distributing import _workers_of
from trajstore.errors import WorkerError
from trajstore.recording.workers import cluster as clusters
from trajstore.recording.workers import connected, patience

NET = ts.Experiment.of({**SMALL_NET, "steps": 20, "seeds": [0]})


@pytest.fixture(scope="module")
def one_worker() -> Iterator[tuple[Any, int]]:
    """A client, and the process of its only worker."""
    before = set(_workers_of(os.getpid()))
    with connected(1) as client:
        (process,) = set(_workers_of(os.getpid())) - before
        yield client, process


def test_a_worker_that_hangs_is_told_of_with_what_it_has(
    one_worker: tuple[Any, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, process = one_worker
    monkeypatch.setattr(patience, "_SILENT", 0.5)
    (address,) = client.nthreads()
    said: list[str] = []

    def heard(message: str, *_: object, **__: object) -> None:
        said.append(message)
        if len(said) == 2:
            os.kill(process, signal.SIGCONT)

    monkeypatch.setattr(patience.warnings, "warn", heard)
    os.kill(process, signal.SIGSTOP)
    stored = ts.run(NET, tmp_path / "s.zarr", engine="reference", scheduler=client)
    assert stored.commits().complete.all(), "it goes on when the worker does"
    assert len(said) >= 2, "said again, if it goes on"
    for message in said[:2]:
        assert message.startswith("experiment 'net': no task has come back from the workers for ")
        assert f"{address} has to get ready; end a worker that hangs" in message


def test_what_a_worker_has_is_told_by_seeds(
    one_worker: tuple[Any, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, process = one_worker
    monkeypatch.setattr(patience, "_SILENT", 0.5)
    stopped: list[int] = []
    said: list[str] = []

    def heard(message: str, *_: object, **__: object) -> None:
        if stopped and not said:
            said.append(message)
            os.kill(process, signal.SIGCONT)

    def stop(*_: object) -> None:
        if not stopped:
            stopped.append(process)
            os.kill(process, signal.SIGSTOP)

    monkeypatch.setattr(patience.warnings, "warn", heard)
    ts.run(NET, tmp_path / "s.zarr", engine="reference", scheduler=client, progress=stop)
    assert said
    assert re.search(r"tcp://\S+ has (the result of )?seed 0( and \d+ more)?; end a worker that hangs", said[0])


def test_without_workers_a_recording_ends_in_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    monkeypatch.setattr(patience, "_ALONE", 0.5)
    with LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as nobody:  # type: ignore[no-untyped-call]
        with pytest.raises(
            WorkerError, match=r"experiment 'net': nothing has come from the scheduler at .*no worker is connected"
        ) as error:
            ts.run(NET, tmp_path / "s.zarr", engine="reference", scheduler=nobody)
        assert "\n" not in str(error.value)
    stored = ts.run(NET, tmp_path / "s.zarr", engine="reference", workers=0, resume=True)
    assert stored.commits().complete.all(), "its locks are free"


@pytest.mark.slow
def test_workers_that_take_their_time_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    asked: list[object] = []
    original = patience.Patience._workers

    def counted(self: patience.Patience) -> object:
        asked.append(1)
        if len(asked) == 3:
            late.scale(1)
        return original(self)

    monkeypatch.setattr(patience.Patience, "_workers", counted)
    monkeypatch.setattr(patience, "_SILENT", 0.3)
    with (
        warnings.catch_warnings(record=True) as said,
        LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address="127.0.0.1:0") as late,  # type: ignore[no-untyped-call]
    ):
        warnings.simplefilter("always")
        stored = ts.run(NET, tmp_path / "s.zarr", engine="reference", scheduler=late)
    assert any("no worker is connected" in str(one.message) for one in said)
    assert stored.commits().complete.all()


@pytest.mark.slow
def test_a_scheduler_that_ends_is_told_of(tmp_path: Path) -> None:
    from distributed import LocalCluster

    ending = LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0")  # type: ignore[no-untyped-call]

    def end(*_: object) -> None:
        ending.close()

    with pytest.raises(WorkerError, match="experiment 'net': the scheduler has ended, or its tasks were cancelled"):
        ts.run(NET, tmp_path / "s.zarr", engine="reference", scheduler=ending, progress=end)
    assert ts.run(NET, tmp_path / "s.zarr", engine="reference", workers=0, resume=True).commits().complete.all()


def test_workers_that_do_not_start_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_STARTING", 0.01)
    with pytest.raises(WorkerError, match="1 workers did not start within"), connected(1):
        pytest.fail("there is none yet")
