"""Stores in a real S3 server: what is recorded, who may record, what dies, and what is copied there and back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from obstore.store import from_url
from zarr.storage import ObjectStore

import trajstore as ts
from tests.conftest import SMALL_NET
from tests.recording.test_resume import contents
from tests.tools.buckets import serving, settings
from tests.tools.torture import start
from tests.tools.waiting import HANGS
from trajstore.errors import BusyError, ConfigurationError, NotFoundError, ResumedWarning, UnreachableError
from trajstore.exchange.merge import merge, remove
from trajstore.reading.verify import verify
from trajstore.storage.places.bucket import Bucket
from trajstore.storage.places.place import TAKEN_OUT, slab_lock
from trajstore.storage.writing.slab_writer import Ledger

HOW = {"engine": "reference"}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving() as address:
        yield address


@pytest.fixture
def place(server, tmp_path, monkeypatch) -> str:
    """The URL of a store of the test's own."""
    for name, value in settings(server).items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{tmp_path.name}/runs.zarr"


@pytest.fixture
def local(tmp_path) -> ts.StoredExperiment:
    """The same experiment in a folder."""
    return ts.run(ts.Experiment.of(SMALL_NET), tmp_path / "local.zarr", **HOW)


def chunks(place: str) -> dict[str, bytes]:
    """As `contents` of a folder."""
    whole = ts.Store(place).place
    keys = [key for key, _ in whole.files("") if "/resume/" not in key and not key.endswith("zarr.json")]
    return {key: whole.read(key) for key in keys}


def findings(place: str) -> list[str]:
    return [str(finding) for finding in verify(ts.Store(place))]


def test_the_same_bytes_as_in_a_folder(place, local):
    stored = ts.run(ts.Experiment.of(SMALL_NET), place, **HOW)
    assert chunks(place) == contents(local.store.place.path)
    assert findings(place) == []
    assert stored.bytes_on_disk() > 10_000
    assert [slab.complete for slab in stored.slabs()] == [True] * 4
    state = stored.arrays(order="backward", seed=1, step=7)
    for name, array in local.arrays(order="backward", seed=1, step=7).items():
        assert np.array_equal(array, state[name])
    with pytest.raises(NotFoundError, match="no state is stored for step 99"):
        stored.arrays(order="backward", seed=1, step=99)


def test_every_reader_reads_it(place, local):
    ts.run(ts.Experiment.of(SMALL_NET), place, **HOW)
    own = ts.open(place)["net"].dataset().load()
    xr.testing.assert_equal(own.drop_attrs(), local.dataset().load().drop_attrs())
    query = 'SELECT "order", seed, step, test_loss FROM metrics ORDER BY ALL'
    assert ts.open(place).sql(query).fetchall() == local.store.sql(query).fetchall()
    plain = ObjectStore(from_url(place), read_only=True)
    shown = xr.open_zarr(plain, group="net", consolidated=False)
    assert np.array_equal(shown.test_loss.values, own.test_loss.values)
    assert zarr.open_group(plain, mode="r")["net"]["params"].shape == own.params.shape


def test_copied_there_and_back(place, local, tmp_path):
    merge(local.store, ts.Store(place))
    assert findings(place) == []
    assert not any(slab.copied for slab in merge(local.store, ts.Store(place)))
    merge(ts.open(place), ts.Store(tmp_path / "back.zarr"))
    assert contents(tmp_path / "back.zarr") == contents(local.store.place.path) == chunks(place)
    remove(ts.open(place), "net")
    assert list(ts.open(place)) == []
    assert [key for key, _ in ts.Store(place).place.files("")] == ["zarr.json"]


def begin(function, *args):
    """In a process of its own, which was forked from one that knows nothing of the server."""
    return start(told, {k: v for k, v in os.environ.items() if k.startswith("AWS_")}, function, args)


def told(settings: dict[str, str], function, args) -> None:
    os.environ.update(settings)
    function(*args)


def record_and_die(place: str, after: int) -> None:
    done = 0

    def tell(more: int, where: str) -> None:
        nonlocal done
        done += more
        if done > after:
            time.sleep(1)  # what was handed over is written
            os.kill(os.getpid(), 9)

    ts.run(ts.Experiment.of({**SMALL_NET, "seeds": [0]}), place, resume=True, progress=tell, **HOW)


def test_a_recording_that_was_killed_goes_on(place, tmp_path):
    experiment = ts.Experiment.of({**SMALL_NET, "seeds": [0]})
    for after in (2, 60):
        process, _ = begin(record_and_die, place, after)
        process.join()
        assert process.exitcode == -9
        assert [f for f in verify(ts.Store(place)) if not f.harmless] == []
    stored = ts.run(experiment, place, resume=True, **HOW)
    whole = ts.run(experiment, tmp_path / "whole.zarr", **HOW)
    assert np.array_equal(stored.commits().records, whole.commits().records)
    fences = stored.group["committed"][..., -1]
    assert fences.max() > 0, "the locks of the dead were taken over"
    assert findings(place) == []
    xr.testing.assert_equal(stored.dataset().load().drop_attrs(), whole.dataset().load().drop_attrs())


def train(rec: ts.Recorder, model: torch.nn.Module, steps: range) -> None:
    for n in steps:
        with torch.no_grad():
            model.weight.mul_(0.9)
        rec.step(loss=float(n))
        if n % 4 == 0:
            rec.log(n - 1, late=10.0 * n)


def test_a_training_loop_is_recorded_and_goes_on(place):
    model = torch.nn.Linear(2, 1)
    with ts.record(place, "mine", model=model) as rec:
        train(rec, model, range(1, 9))
    with pytest.warns(ResumedWarning):
        rec = ts.record(place, "mine", model=model, resume=True).__enter__()
    assert rec.last == 8
    train(rec, model, range(9, 14))
    rec.close()
    dataset = ts.open(place)["mine"].dataset().load()
    assert np.flatnonzero(dataset.recorded[0, 0]).tolist() == list(range(14))
    assert dataset.loss[0, 0, 1:14].values.tolist() == list(range(1, 14))
    assert dataset.late[0, 0, [3, 7, 11]].values.tolist() == [40, 80, 120]
    assert findings(place) == []


def record_seed(place: str, seed: int) -> None:
    ts.run(ts.Experiment.of({**SMALL_NET, "seeds": [seed]}), place, extend=True, **HOW)


def test_processes_record_seeds_of_one_experiment_at_once(place):
    processes = [begin(record_seed, place, seed) for seed in range(4)]
    for process, connection in processes:
        connection.recv()
        fine, told = connection.recv()
        assert fine, told
        process.join()
    stored = ts.open(place)["net"]
    assert sorted(stored.schema.seeds) == [0, 1, 2, 3]
    assert all(slab.complete for slab in stored.slabs())
    assert findings(place) == []


def test_workers_write_under_the_locks_of_the_client(place, local):
    stored = ts.run(ts.Experiment.of(SMALL_NET), place, workers=2, **HOW)
    assert np.array_equal(stored.commits().records, local.commits().records)
    assert findings(place) == []


def test_what_is_damaged_is_found_repaired_and_recorded_again(place, local):
    ts.run(ts.Experiment.of(SMALL_NET), place, **HOW)
    whole, bucket = chunks(place), ts.Store(place).place
    key = "net/params/c/1/0/0/0"
    broken = bytearray(bucket.read(key))
    broken[40] ^= 1
    from obstore import put

    put(bucket.objects, key, bytes(broken))
    (found,) = findings(place)
    assert found.startswith("experiment 'net', order 'backward', seed 0, steps 0 to 12: not what was committed")
    assert all(finding.repaired for finding in verify(ts.Store(place), repair=True))
    assert all("what a repair took out is kept here" in found for found in findings(place))
    ts.run(ts.Experiment.of(SMALL_NET), place, resume=True, **HOW)
    kept = {key: content for key, content in chunks(place).items() if TAKEN_OUT in key}
    assert {key: content for key, content in chunks(place).items() if key not in kept} == whole
    assert bytes(broken) in kept.values()


def one_more(rec: ts.Recorder) -> None:
    try:
        rec.step(loss=1.0)
    finally:
        rec.close()


def test_a_second_writer_is_told_and_the_first_can_be_shut_out(place):
    model = torch.nn.Linear(2, 1)
    rec = ts.record(place, "mine", model=model).__enter__()
    rec.step(loss=1.0)
    another = Bucket(place)
    with (
        pytest.raises(BusyError, match="the slab is being written by process"),
        another.lock(slab_lock("mine", "forward", 0), "the slab"),
    ):
        pass
    assert len(another.unlock()) == 1
    with another.lock(slab_lock("mine", "forward", 0), "the slab"):
        Ledger(zarr.open_group(another.keeper(read_only=False), path="mine"), rec._ledger.schema, 0, 0)
        with pytest.raises(BusyError, match="was taken over by process"):
            one_more(rec)
    assert [f for f in verify(ts.Store(place)) if not f.harmless] == []


def test_what_is_not_there_or_does_not_answer_is_one_line(place, monkeypatch):
    with pytest.raises(NotFoundError, match="there is no store at s3://bucket/"):
        ts.open(place)
    no_bucket = r"s3://no-such-bucket/runs\.zarr: there is no bucket 'no-such-bucket' \(404 Not Found\); make it first"
    with pytest.raises(UnreachableError, match=no_bucket):
        ts.open("s3://no-such-bucket/runs.zarr")
    with pytest.raises(UnreachableError, match=no_bucket):
        ts.run(ts.Experiment.of(SMALL_NET), "s3://no-such-bucket/runs.zarr", **HOW)
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ALLOW_HTTP")
        with pytest.raises(UnreachableError, match=r"its endpoint is http.*; set AWS_ALLOW_HTTP=true"):
            ts.open("s3://bucket/unencrypted.zarr")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UnreachableError, match=r"s3://bucket/unreachable\.zarr: "):
        ts.open("s3://bucket/unreachable.zarr")


def test_what_is_in_memory_is_of_one_process(tmp_path):
    place = f"memory://{tmp_path.name}.zarr"
    with pytest.raises(ConfigurationError, match="in the memory of this process"):
        ts.run(ts.Experiment.of(SMALL_NET), place, workers=2)
    stored = ts.run(ts.Experiment.of(SMALL_NET), place, **HOW)
    assert all(slab.complete for slab in ts.open(place)["net"].slabs())
    assert repr(stored.store).startswith(f"<trajstore {place}>")
    assert "experiment 'net'" in repr(stored)


def test_ctrl_c_is_heard_while_a_server_does_not_answer(place, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        command = [str(Path(sys.executable).with_name("trajstore")), "ls", place]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            silent.settimeout(HANGS)
            connection, _ = silent.accept()
            with connection:
                process.send_signal(signal.SIGINT)
                try:
                    _, told = process.communicate(timeout=120)  # a request gives up after three minutes
                finally:
                    process.kill()
    assert told.startswith("trajstore: interrupted")
    assert process.returncode == 130


def test_the_commands_take_urls(place, tmp_path, trajstore):
    def run(*arguments: str) -> str:
        code, out, err = trajstore(*arguments)
        assert code == 0, err
        return out

    fewer = ["--seeds", "0", "--steps", "3", "--set", "problem.width=4", "--set", "problem.depth=1"]
    run("record", "fig4", "--store", place, "--name", "x", "--orders", "backward", "--engine", "reference", *fewer)
    assert "x" in run("ls", place)
    assert "steps" in run("info", place, "x")
    assert run("verify", place) == f"{place}: sound\n"
    assert "4" in run("sql", place, "SELECT count(*) FROM metrics")
    run("export", place, "x", "-o", "step.safetensors", "--order", "backward", "--seed", "0", "--step", "3")
    assert (tmp_path / "step.safetensors").stat().st_size > 100
    assert run("unlock", place) == f"{place}: 0 locks freed\n"
    assert run("rm", place, "x", "--yes") == f"removed x from {place}\n"
