"""Slabs: what is committed is shown, all of it and nothing else."""

from __future__ import annotations

import hashlib
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import zarr

from trajstore.storage import writer as writer_module
from trajstore.storage.layout import Entry, Layout
from trajstore.storage.local import DurableStore
from trajstore.storage.reader import Commits
from trajstore.storage.schema import Schema, declare
from trajstore.storage.writer import SlabWriter

STEPS, EVERY = 23, 2
SNAPSHOTS = (*range(0, STEPS, EVERY), STEPS)
LAYOUT = Layout.of([Entry("w", "parameter", (5,), "float32"), Entry("position", "position", (), "int64")], {})
SCHEMA = Schema(
    orders=("forward", "backward"), seeds=(0, 1), init_seeds=(0, 1), data_seeds=(0, 1), steps=STEPS,
    snapshots=SNAPSHOTS, layout=LAYOUT, metrics={"a": 3, "b": None}, components=4, batch_size=0, codec="pcodec",
    snapshots_per_segment=5,
)  # fmt: skip


def values(n: int):
    rng = np.random.default_rng(n)
    metrics = {"a": float(rng.standard_normal())} | ({"b": float("nan")} if n % 3 == 0 else {})
    snapshot = (rng.standard_normal(5).astype(np.float32), np.array([n])) if n in SNAPSHOTS else None
    return metrics, rng.standard_normal(4), snapshot


@pytest.fixture
def group(tmp_path: Path) -> zarr.Group:
    root = zarr.open_group(DurableStore(tmp_path / "s.zarr"), mode="a", zarr_format=3)
    return declare(root, "e", SCHEMA, {"name": "e"}, [])


def write(group: zarr.Group, until: int) -> SlabWriter:
    slab = SlabWriter(group, SCHEMA, 1, 0)
    for n in range(until + 1):
        slab.append(n, 0, *values(n))
    return slab


def test_everything_comes_back(group):
    write(group, STEPS).commit()
    commits = Commits.of(group, SCHEMA)
    assert commits.steps[1, 0].all()
    assert commits.snapshots[1, 0].all()
    assert commits.complete.tolist() == [[False, False], [True, False]]
    for n in range(STEPS + 1):
        metrics, sketch, snapshot = values(n)
        assert group["a"][1, 0, n] == metrics["a"]
        assert np.isnan(group["b"][1, 0, n])
        assert group["measured"][1, 0, n] == (3 if "b" in metrics else 1)
        assert np.array_equal(group["sketch"][1, 0, n], sketch)
        if snapshot:
            s = SNAPSHOTS.index(n)
            assert np.array_equal(group["params"][1, 0, :, s], snapshot[0])
            assert group["counters"][1, 0, :, s] == [n]


def test_digests_are_those_of_the_format_page(group):
    """An independent reader's digest: struct and hashlib on the values themselves."""
    write(group, STEPS).commit()
    starts = [*SNAPSHOTS[::5], STEPS + 1]
    for segment, (begin, end) in enumerate(pairwise(starts)):
        digest, count = hashlib.sha256(), 0
        for n in range(begin, end):
            metrics, sketch, snapshot = values(n)
            digest.update(struct.pack("<qqq", n, 0, 3 if "b" in metrics else 1))
            digest.update(struct.pack("<2d", metrics["a"], float("nan")))
            digest.update(struct.pack("<4d", *sketch))
            if snapshot:
                digest.update(struct.pack("<5f", *snapshot[0]) + struct.pack("<q", n))
                count += 1
        words = list(struct.unpack("<4q", digest.digest()))
        assert group["committed"][1, 0, segment].tolist() == [end - begin, count, *words]


@pytest.mark.parametrize("until", [0, 3, 9, 10, 12, 20, 22])
def test_what_was_committed_counts_and_what_was_not_does_not(group, until):
    write(group, until)  # dies here, without a last commit
    commits = Commits.of(group, SCHEMA)
    full = sum(start <= until for start in SNAPSHOTS[5::5])  # segments that were full
    expected = SNAPSHOTS[5 * full] if full else 0
    assert commits.steps[1, 0].sum() == expected
    assert commits.snapshots[1, 0].sum() == 5 * full
    assert commits.last_step[1, 0] == expected - 1


def test_a_partial_segment_is_committed_and_replaced_by_one_with_the_same_prefix(group, monkeypatch):
    monkeypatch.setattr(writer_module, "COMMIT_STEPS", 3)
    slab = write(group, 13)
    commits = Commits.of(group, SCHEMA)
    # 10 steps make the first segment; the second was committed after 3 more, and one waits.
    assert commits.records[1, 0, :, 0].tolist() == [10, 3, -1]
    assert commits.last_step[1, 0] == 12
    partial = commits.records[1, 0, 1].copy()
    for n in range(14, STEPS + 1):
        slab.append(n, 0, *values(n))
    slab.commit()
    assert Commits.of(group, SCHEMA).complete[1, 0]
    assert group["committed"][1, 0, 1].tolist() != partial.tolist()
    for n in range(STEPS + 1):
        assert group["a"][1, 0, n] == values(n)[0]["a"]


def test_data_beyond_the_record_is_hidden_even_where_it_is_on_disk(group):
    write(group, STEPS).commit()
    records = group["committed"][1, 0]
    records[1, :2] = [4, 2]
    records[2] = -1
    group["committed"][1, 0] = records
    commits = Commits.of(group, SCHEMA)
    assert commits.last_step[1, 0] == 13
    assert commits.snapshots[1, 0].tolist() == [True] * 7 + [False] * 6
    assert not commits.complete[1, 0]


def test_a_new_recording_of_a_slab_first_takes_back_the_old_one(group):
    write(group, STEPS).commit()
    write(group, 3)
    assert not Commits.of(group, SCHEMA).steps[1, 0].any()


def test_the_record_is_written_after_everything_that_it_vouches_for(group, monkeypatch):
    order: list[str] = []
    original = DurableStore.set_sync

    def spy(self, key, value):
        order.append(key)
        original(self, key, value)

    monkeypatch.setattr(DurableStore, "set_sync", spy)
    write(group, STEPS).commit()
    last = len(order) - 1 - order[::-1].index("e/committed/c/1/0/0/0")
    assert last == len(order) - 1
    assert any(key.startswith("e/params/c/1/0") for key in order[:last])


def test_no_partial_file_is_left(group, tmp_path):
    write(group, STEPS).commit()
    assert not list(tmp_path.rglob("*.partial"))


def test_unwritten_slabs_read_as_nothing(group):
    assert np.isnan(group["params"][0, 1]).all()
    assert (group["counters"][0, 1] == -1).all()
    assert (group["measured"][0, 1] == 0).all()
    assert (group["leg"][0, 1] == -1).all()
    assert (group["committed"][0, 1] == -1).all()
