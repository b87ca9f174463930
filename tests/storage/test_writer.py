"""Slabs: what is committed is shown, all of it and nothing else."""

from __future__ import annotations

import hashlib
import os
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import zarr

from trajstore.errors import ConflictError, WriteError
from trajstore.storage.format.commits import Commits
from trajstore.storage.format.layout import Entry, Layout
from trajstore.storage.format.schema import Schema
from trajstore.storage.places import durable
from trajstore.storage.places.durable import DurableStore
from trajstore.storage.places.folder import FolderStore
from trajstore.storage.places.place import keeper_of
from trajstore.storage.writing import slab_writer as writer_module
from trajstore.storage.writing.declaring import declare
from trajstore.storage.writing.pipeline import Pipeline
from trajstore.storage.writing.segment import Observation
from trajstore.storage.writing.slab_writer import Ledger, SlabWriter

STEPS, EVERY = 23, 2
SNAPSHOTS = (*range(0, STEPS, EVERY), STEPS)
LAYOUT = Layout.of([Entry("w", "parameter", (5,), "float32"), Entry("position", "position", (), "int64")], {})
SCHEMA = Schema(
    orders=("forward", "backward"), seeds=(0, 1), init_seeds=(0, 1), data_seeds=(0, 1), steps=STEPS,
    snapshots=SNAPSHOTS, layout=LAYOUT, metrics={"a": 3, "b": None}, components=4, parameters=5, batch_size=0,
    codec="pcodec", snapshots_per_segment=5,
)  # fmt: skip


def values(n: int):
    rng = np.random.default_rng(n)
    metrics = {"a": float(rng.standard_normal())} | ({"b": float("nan")} if n % 3 == 0 else {})
    snapshot = (rng.standard_normal(5).astype(np.float32), np.array([n])) if n in SNAPSHOTS else None
    return metrics, rng.standard_normal(4), snapshot


@pytest.fixture
def group(tmp_path: Path) -> zarr.Group:
    root = zarr.open_group(FolderStore(tmp_path / "s.zarr"), mode="a", zarr_format=3)
    return declare(root, "e", SCHEMA, {"name": "e"}, [])


class Writing:
    """A slab's writer with a pipeline of its own; `commit` waits until what it commits is true."""

    def __init__(self, group: zarr.Group) -> None:
        self.pipeline = Pipeline()
        self.slab = SlabWriter(Ledger(group, SCHEMA, 1, 0), self.pipeline)

    def append(self, n: int, **other) -> None:
        metrics, sketch, snapshot = values(n)
        self.slab.append(Observation(n, 0, {**metrics, **other}, sketch, snapshot))

    def commit(self) -> None:
        self.slab.commit()
        self.pipeline.drain()


def write(group: zarr.Group, until: int, begin: int = 0) -> Writing:
    writing = Writing(group)
    for n in range(begin, until + 1):
        writing.append(n)
    writing.pipeline.drain()
    return writing


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
            digest.update(struct.pack(f"<{len(metrics)}d", *metrics.values()))
            digest.update(struct.pack("<4d", *sketch))
            if snapshot:
                digest.update(struct.pack("<5f", *snapshot[0]) + struct.pack("<q", n))
                count += 1
        words = list(struct.unpack("<4q", digest.digest()))
        assert group["committed"][1, 0, segment].tolist() == [end - begin, count, *words, 0]


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
        slab.append(n)
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


def chunks(group: zarr.Group) -> dict[str, bytes]:
    root = Path(group.store.root)
    return {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}


@pytest.mark.parametrize("until", [0, 3, 9, 10, 13, 20])
def test_a_new_writer_goes_on_in_the_middle_of_a_segment(group, tmp_path, until):
    write(group, STEPS).commit()
    whole = chunks(group)
    other = zarr.open_group(FolderStore(tmp_path / "t.zarr"), mode="a", zarr_format=3)
    half = declare(other, "e", SCHEMA, {"name": "e"}, [])
    write(half, until).commit()
    write(half, STEPS, begin=until + 1).commit()
    there = chunks(half)
    assert whole.pop("e/zarr.json") != there.pop("e/zarr.json")  # an experiment that is another has another id
    assert there == whole


def test_steps_that_are_committed_may_be_written_again_only_as_they_are(group):
    write(group, 13).commit()
    before = chunks(group)
    again = write(group, 13)
    assert chunks(group) == before
    with pytest.raises(ConflictError, match=r"order 'backward', seed 0: step 12 is recorded already, with other"):
        again.append(12, a=0.5)
    for n in range(14, STEPS + 1):
        again.append(n)
    again.commit()
    with pytest.raises(ConflictError, match="step 20 is recorded already"):
        again.append(20, a=0.5)
    assert Commits.of(group, SCHEMA).complete[1, 0]


def test_what_a_writer_that_died_left_uncommitted_does_not_count(group):
    """It recorded every step of a segment; the next one records every second."""
    write(group, 9).commit()
    dead = write(group, 18)
    ledger = dead.slab.ledger
    cut = dead.slab._segment.cut()
    for block in cut.blocks():
        block()
    for name, column in cut.written().series.items():
        ledger._series[name].put(cut.written().steps, column)
    writing = Writing(group)
    for n in range(10, STEPS + 1, 3):
        writing.append(n)
    writing.commit()
    assert np.flatnonzero(Commits.of(group, SCHEMA).steps[1, 0]).tolist() == [*range(10), *range(10, STEPS + 1, 3)]
    assert group["leg"][1, 0].tolist().count(-1) == 14 - 5


def test_changing_what_was_appended_changes_nothing_that_is_stored(group):
    writing = Writing(group)
    rows = {n: values(n) for n in range(STEPS + 1)}
    for n, (metrics, sketch, snapshot) in rows.items():
        writing.slab.append(Observation(n, 0, metrics, sketch, snapshot))
        sketch += 1
        metrics["a"] = -1.0
        for vector in snapshot or ():
            vector += 1
    writing.commit()
    for n in SNAPSHOTS:
        assert np.array_equal(group["params"][1, 0, :, SNAPSHOTS.index(n)], values(n)[2][0])
        assert np.array_equal(group["sketch"][1, 0, n], values(n)[1])
        assert group["a"][1, 0, n] == values(n)[0]["a"]


def test_the_first_error_is_raised_at_the_next_call_and_at_the_end(group, monkeypatch):
    def full(self, key, value):
        if "params" in key:
            raise OSError(28, "No space left on device")
        original(self, key, value)

    original = DurableStore.set_sync
    monkeypatch.setattr(DurableStore, "set_sync", full)
    writing = Writing(group)
    for n in range(10):
        writing.append(n)
    message = r"order 'backward', seed 0: steps 0 to 9 could not be written \(No space left on device\); what was"
    writing.slab.commit()
    with pytest.raises(WriteError, match=message):
        writing.pipeline.drain()
    with pytest.raises(WriteError, match=message):
        writing.append(10)
    with pytest.raises(WriteError, match=message):
        writing.pipeline.close()
    assert not Commits.of(group, SCHEMA).steps.any()


def test_a_forked_child_cannot_write(group):
    writing = write(group, 3)
    child = os.fork()
    if child == 0:
        try:
            writing.append(4)
        except ConflictError as error:
            os._exit(42 if "is a fork of process" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    for n in range(4, STEPS + 1):
        writing.append(n)
    writing.commit()
    assert Commits.of(group, SCHEMA).complete[1, 0]


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


def test_a_commit_looks_after_its_own_slab_only(group, monkeypatch):
    """Each looking after all would make many slabs cost their square."""
    looked: list[Path] = []
    holds = durable._Anchor.holds
    monkeypatch.setattr(durable._Anchor, "holds", lambda anchor: looked.append(anchor._path) or holds(anchor))
    slabs = [Ledger(group, SCHEMA, order, seed) for order in (0, 1) for seed in (0, 1)]
    slabs[0].check()
    at = group.store.root / "e"
    assert set(looked) <= {at, at / "committed/c/0/0"}
    assert at in looked
    keeper_of(group).check()
    assert len({path for path in looked if path.parent.parent.name == "c"}) in (0, len(slabs))
