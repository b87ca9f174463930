"""Merge and remove."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import trajstore as ts
from tests.conftest import SMALL_NET
from tests.recording.test_resume import contents, stop_after
from trajstore.errors import BusyError, ConflictError, FormatError, NotFoundError, TrajstoreError
from trajstore.exchange.merge import merge, remove
from trajstore.reading.verify import verify
from trajstore.storage.places.folder import Folder

HOW = {"engine": "reference", "durability": "none"}


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    monkeypatch.setattr("trajstore.recording.schema.segment_length", lambda layout: 4)


def recorded(place: Path, **changes) -> ts.Store:
    ts.run(ts.Experiment.of({**SMALL_NET, **changes}), place, **HOW)
    return ts.open(place)


def test_seeds_and_orders_of_two_stores_come_together(tmp_path):
    a = recorded(tmp_path / "a.zarr", seeds=[0, 2], orders=["forward"])
    b = recorded(tmp_path / "b.zarr", seeds=[1, 2], orders=["backward", "forward"])
    recorded(tmp_path / "b.zarr", name="other")
    done = merge(b, ts.Store(tmp_path / "a.zarr"))
    assert {(m.experiment, m.order, m.seed): m.copied for m in done if m.experiment == "net"} == {
        ("net", "backward", 1): True, ("net", "backward", 2): True, ("net", "forward", 1): True,
        ("net", "forward", 2): False,
    }  # fmt: skip
    a = ts.open(tmp_path / "a.zarr")
    assert list(a) == ["net", "other"]
    assert contents(tmp_path / "a.zarr" / "other") == contents(tmp_path / "b.zarr" / "other")
    stored = a["net"]
    assert (stored.schema.orders, stored.schema.seeds) == (("forward", "backward"), (0, 2, 1))
    assert [(s.order, s.seed) for s in stored.slabs() if not s.complete] == [("backward", 0)]
    assert list(verify(a)) == []
    ours, theirs = stored.dataset().load(), b["net"].dataset().load()
    for name in ("params", "test_loss", "batch_index"):
        at = {d: theirs[d] for d in ("order", "seed") if d in theirs[name].dims}
        assert np.array_equal(ours[name].sel(at), theirs[name], equal_nan=True)
    whole = recorded(tmp_path / "c.zarr", seeds=[0, 2, 1], orders=["forward", "backward"])
    ts.run(ts.Experiment.of({**SMALL_NET, "seeds": [0, 2, 1]}), tmp_path / "a.zarr", resume=True, **HOW)
    assert contents(tmp_path / "a.zarr" / "net") == contents(whole.place.path / "net")
    assert not any(m.copied for m in merge(b, a))


def test_a_slab_that_is_further_on_replaces_one_that_was_stopped(tmp_path):
    experiment = ts.Experiment.of({**SMALL_NET, "seeds": [0]})
    with pytest.raises(KeyboardInterrupt):
        ts.run(experiment, tmp_path / "a.zarr", progress=stop_after(50), **HOW)
    b = recorded(tmp_path / "b.zarr", seeds=[0])
    done = merge(b, ts.open(tmp_path / "a.zarr"))
    assert [(m.order, m.copied) for m in done] == [("forward", False), ("backward", True)]
    assert contents(tmp_path / "a.zarr") == contents(tmp_path / "b.zarr")
    with pytest.raises(KeyboardInterrupt):
        ts.run(experiment, tmp_path / "c.zarr", progress=stop_after(50), **HOW)
    assert not any(m.copied for m in merge(ts.open(tmp_path / "c.zarr"), b))
    assert list(verify(ts.open(tmp_path / "a.zarr"))) == list(verify(b)) == []


def test_recordings_of_own_loops_come_together(tmp_path):
    for place, seed, steps in (("a", 0, 5), ("b", 1, 9)):
        with ts.record(tmp_path / place, "mine", nn.Linear(2, 1), seed=seed, steps=steps, durability="none") as rec:
            for n in range(steps):
                rec.step(loss=n)
    merge(ts.open(tmp_path / "b"), ts.open(tmp_path / "a"))
    stored = ts.open(tmp_path / "a")["mine"]
    assert [(s.seed, s.last_step, s.complete) for s in stored.slabs()] == [(0, 5, True), (1, 9, True)]
    assert list(verify(stored.store)) == []


def test_what_contradicts_is_refused_and_nothing_is_written(tmp_path):
    a = recorded(tmp_path / "a.zarr", seeds=[0])
    other = recorded(tmp_path / "b.zarr", seeds=[1], operator={"family": "sgd", "lr": 0.1})
    before = contents(a.place.path)
    with pytest.raises(
        ConflictError, match=r"'net' is in .*a.zarr and in .*b.zarr, and differs in operator.lr: 0.05 / 0.1"
    ):
        merge(other, a)
    longer = recorded(tmp_path / "c.zarr", seeds=[1], steps=20)
    with pytest.raises(ConflictError, match=r"steps: 12 / 20 \(extend the shorter one first\)"):
        merge(longer, a)
    with pytest.raises(ConflictError, match="are the same store"):
        merge(a, a)
    with pytest.raises(NotFoundError, match="no experiment 'nte'"):
        merge(a, other, ["nte"])
    assert contents(a.place.path) == before


def test_damaged_slabs_are_not_taken_over(tmp_path):
    a, b = recorded(tmp_path / "a.zarr", seeds=[0]), recorded(tmp_path / "b.zarr", seeds=[1])
    file = b.place.path / "net/params/c/1/0/0/1"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(FormatError, match="order 'backward', seed 1: steps 4 to 7 are damaged"):
        merge(b, a)
    assert [s.last_step for s in ts.open(a.place)["net"].slabs() if s.seed == 1] == [12, -1]


def test_remove(tmp_path):
    a = recorded(tmp_path / "a.zarr")
    recorded(tmp_path / "a.zarr", name="other")
    with a["net"].locked("forward", 1), pytest.raises(BusyError):
        remove(a, "net")
    remove(a, "net")
    assert list(ts.open(a.place)) == ["other"]
    assert not (a.place.path / "net").exists()
    assert sorted(file.name for file in a.place.path.iterdir()) == ["other", "zarr.json"]
    with pytest.raises(NotFoundError):
        remove(a, "net")


SMALLER = {**SMALL_NET, "problem": {"family": "regression", "width": 3, "depth": 1, "points": 5}, "seeds": [0]}


def removed(store: Path, key: str) -> bytes | None:
    shutil.rmtree(store, ignore_errors=True)
    return None


def changed(store: Path, key: str) -> bytes | None:
    file = store / key
    if file.suffix == ".json" or not file.is_file():
        return None
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.write_bytes(whole)
    return bytes(whole)


def unreadable(store: Path, key: str) -> bytes | None:
    raise OSError(errno.EIO, "Input/output error", str(store / key))


@pytest.mark.parametrize("fault", [removed, changed, unreadable])
def test_whatever_becomes_of_the_source_while_it_is_merged_the_target_is_sound(fault, tmp_path, monkeypatch):
    """At each file that is read to be copied: nothing that the target had is lost, and nothing that it has is wrong."""
    with pytest.raises(KeyboardInterrupt):
        ts.run(ts.Experiment.of(SMALLER), tmp_path / "begun.zarr", progress=stop_after(50), **HOW)
    ts.run(ts.Experiment.of(SMALLER), tmp_path / "whole.zarr", **HOW)
    whole = ts.open(tmp_path / "whole.zarr")["net"].dataset().load()
    had = ts.open(tmp_path / "begun.zarr")["net"].dataset()["recorded"].load()
    source, target = tmp_path / "source.zarr", tmp_path / "target.zarr"
    read, reads, failed = Folder.read, 0, 0

    def counting(self: Folder, key: str, most: int | None = None) -> bytes | None:
        nonlocal reads
        if self.path == source and "/c/" in key:
            reads += 1
            if reads == at:
                return fault(source, key)
        return read(self, key, most)

    monkeypatch.setattr(Folder, "read", counting)
    at = 0
    for _ in range(1000):
        at += 5  # a sample of them
        reads = 0
        for place, origin in ((source, "whole.zarr"), (target, "begun.zarr")):
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(tmp_path / origin, place)
        try:
            merge(ts.open(source), ts.open(target))
        except (TrajstoreError, OSError):
            failed += 1
        assert not [found for found in verify(ts.Store(target)) if not found.harmless], at
        ds = ts.open(target)["net"].dataset().load()
        assert (ds["recorded"] | ~had).all()
        there = ds["recorded"].values
        assert np.array_equal(ds["test_loss"].values[there], whole["test_loss"].values[there]), at
        if reads < at:
            break
        merge(ts.open(tmp_path / "whole.zarr"), ts.open(target))
        assert ts.open(target)["net"].dataset().load()["params"].variable.equals(whole["params"].variable)
    assert failed >= 3, "the faults reach what is merged"
