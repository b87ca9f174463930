"""One writer a slab, whatever path it comes by and whatever is deleted meanwhile; a store that is moved is missed."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

import trajstore as ts
from tests.conftest import SMALL_NET, Record
from tests.tools.waiting import HANGS, until
from trajstore.errors import BusyError, ResumedWarning, WriteError
from trajstore.reading.verify import verify
from trajstore.storage.format.schema import Schema
from trajstore.storage.places.place import ReplacedError
from trajstore.storage.writing.slab_writer import Ledger

HALF, WHOLE = 10, 20
FIRST = f"""
import sys, time
from pathlib import Path
import torch, trajstore as ts
from trajstore.storage.writing import slab_writer
slab_writer.COMMIT_STEPS = 4
store, half, go = map(Path, sys.argv[1:])
with ts.record(store, "mine", torch.nn.Linear(2, 1), seed=0) as rec:
    for n in range(1, {WHOLE} + 1):
        rec.step(loss=float(n))
        if n == {HALF}:
            half.touch()
            while not go.exists():
                time.sleep(0.02)
"""


class First:
    """A process that records, and stops half-way until it is let go."""

    def __init__(self, store: Path, folder: Path) -> None:
        half, self._go = folder / "half", folder / "go"
        program = [sys.executable, "-c", FIRST, str(store), str(half), str(self._go)]
        self.process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)

        def half_way() -> bool:
            assert self.process.poll() is None, self.process.stderr.read() if self.process.stderr else ""
            return half.exists() and ts.open(store)["mine"].slabs()[0].last_step >= 8

        until(half_way, "what is recorded is committed half-way")

    def ends(self) -> tuple[int, str]:
        """Let it go on to its end: exit code, and what it said."""
        self._go.touch()
        _, told = self.process.communicate(timeout=HANGS)
        return self.process.returncode, told


@pytest.fixture
def first(tmp_path: Path) -> Iterator[First]:
    begun = First(tmp_path / "runs.zarr", tmp_path)
    yield begun
    begun.process.kill()
    begun.process.communicate()


def second(store: Path) -> None:
    with ts.record(store, "mine", torch.nn.Linear(2, 1), seed=0, resume=True) as rec:
        rec.step(loss=0.0)


def sound(store: Path) -> np.ndarray:
    """The loss of every step, in a store that is sound."""
    assert not [found for found in verify(ts.Store(store)) if not found.harmless]
    losses: np.ndarray = ts.open(store)["mine"].dataset()["loss"].values[0, 0, 1 : WHOLE + 1]
    return losses


def refused(store: Path) -> None:
    with pytest.raises(BusyError, match=r"experiment 'mine', order 'forward', seed 0 is being written by"):
        second(store)


@contextmanager
def mounted(source: Path, target: Path) -> Iterator[bool]:
    """Mount a folder at another path, if this system lets somebody do that here."""
    target.mkdir(parents=True)
    command = ["mount", "--bind", str(source), str(target)]
    there = bool(shutil.which("mount")) and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield there
    finally:
        if there:
            subprocess.run(["umount", str(target)], check=True)


def test_a_second_writer_is_refused_by_whatever_path_it_comes_and_whatever_was_deleted(
    first: First, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    store, locks = tmp_path / "runs.zarr", tmp_path / "runs.zarr.traj" / "locks"
    refused(store)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link.zarr").symlink_to(store)
    refused(tmp_path / "elsewhere" / "link.zarr")
    assert not (tmp_path / "elsewhere" / "link.zarr.traj").exists()
    (tmp_path / "again").symlink_to(tmp_path)
    refused(tmp_path / "again" / "runs.zarr")
    with mounted(store, tmp_path / "mounts" / "runs.zarr") as there:
        if there:
            refused(tmp_path / "mounts" / "runs.zarr")
    mine = locks / "mine" / "forward.0.lock"
    with mine.open("r+") as file, pytest.raises(BlockingIOError):  # as releases do that know no other lock
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert f"process {first.process.pid}" in mine.read_text()
    mine.unlink()
    refused(store)
    shutil.rmtree(tmp_path / "runs.zarr.traj")
    refused(store)
    group = zarr.open_group(store, mode="r")["mine"]  # a lock is no part of the hierarchy
    assert isinstance(group, zarr.Group)
    assert {"params", "committed", "resume"} <= set(dict(group.members()))
    assert not [w for w in recwarn if "hierarchy" in str(w.message)]
    assert first.ends() == (0, "")
    assert sound(store).tolist() == list(range(1, WHOLE + 1))


def test_a_release_that_locks_beside_a_link_is_kept_out(tmp_path: Path) -> None:
    from trajstore.storage.places.locks import lock

    (tmp_path / "runs.zarr").mkdir()
    (tmp_path / "link.zarr").symlink_to(tmp_path / "runs.zarr")
    with (
        lock(tmp_path / "link.zarr.traj" / "locks" / "mine" / "forward.0.lock", "x"),
        pytest.raises(BusyError),
    ):
        second(tmp_path / "link.zarr")


@pytest.mark.parametrize("what", ["the store", "the experiment"])
def test_what_is_moved_while_it_is_recorded_ends_in_one_clear_line(first: First, tmp_path: Path, what: str) -> None:
    store, away = tmp_path / "runs.zarr", tmp_path / "moved.zarr"
    if what == "the store":
        store.rename(away)
    else:
        shutil.copytree(store, away, ignore=shutil.ignore_patterns("mine"))
        (store / "mine").rename(away / "mine")
    code, told = first.ends()
    assert code == 1
    last = told.strip().splitlines()[-1]
    assert "WriteError: experiment 'mine' is not in" in last
    assert "moved, removed or replaced while it was written" in last
    assert "KeyError" not in told
    assert not (store / "mine").exists(), "nothing is begun again at the old path"
    committed = sound(away)
    there = np.isfinite(committed)
    assert 4 <= there.sum() <= HALF
    assert committed[there].tolist() == list(range(1, there.sum() + 1))
    with pytest.warns(ResumedWarning):
        second(away)


def removed(folder: Path) -> bool:
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def test_what_is_removed_while_it_is_recorded_stays_removed(first: First, tmp_path: Path) -> None:
    until(lambda: removed(tmp_path / "runs.zarr"), "what is just written is removed")
    code, told = first.ends()
    assert code == 1
    *_, last = told.strip().splitlines()
    assert "experiment 'mine'" in last
    assert "is not in" in last or "could not be written" in last, "the latter if a commit lost its files half-way"
    assert not (tmp_path / "runs.zarr").exists()


def ledger(store: Path) -> Ledger:
    group = zarr.open_group(ts.Store(store).place.keeper(read_only=False), path="net", mode="r+", zarr_format=3)
    return Ledger(group, Schema.of(group), 0, 0)


def test_a_record_that_another_writer_replaced_is_not_written_over(record: Record, tmp_path: Path) -> None:
    """As when two machines mount a file system that keeps no locks between them."""
    store = Path(str(record(SMALL_NET, seeds=[0]).store))
    one, other = ledger(store), ledger(store)
    other.discard([0])
    before = (store / "net" / "committed" / "c" / "0" / "0" / "0" / "0").read_bytes()
    with pytest.raises(ReplacedError, match=r"committed/c/0/0/0/0 was replaced by another process.*--resume"):
        one.take_over(one.records)
    assert (store / "net" / "committed" / "c" / "0" / "0" / "0" / "0").read_bytes() == before
    other.discard([0])


def test_a_writer_tells_an_experiment_of_the_same_name_from_its_own(record: Record, tmp_path: Path) -> None:
    store = Path(str(record(SMALL_NET, seeds=[0]).store))
    mine = ledger(store)
    (store / "net").rename(tmp_path / "before")
    shutil.copytree(tmp_path / "before", store / "net")
    with pytest.raises(WriteError, match="replaced while it was written"):
        mine.discard([0])


def test_a_writer_misses_the_folder_that_its_lock_is_on(record: Record) -> None:
    store = Path(str(record(SMALL_NET, seeds=[0]).store))
    mine, folder = ledger(store), store / "net" / "committed" / "c" / "0" / "0"
    folder.rename(store.parent / "before")
    shutil.copytree(store.parent / "before", folder)
    with pytest.raises(WriteError, match="replaced while it was written"):
        mine.discard([0])


def test_a_step_observed_after_the_move_is_not_written_anywhere(record: Record, tmp_path: Path) -> None:
    store = Path(str(record(SMALL_NET, seeds=[0]).store))
    mine = ledger(store)
    written = mine.read(0)
    mine.records[0] = -1
    store.rename(tmp_path / "moved.zarr")
    with pytest.raises(WriteError, match="moved"):
        mine.adopt(written)
    assert not store.exists()


def test_many_slabs_are_locked_though_few_files_may_be_open(tmp_path: Path) -> None:
    import resource
    from contextlib import ExitStack

    from trajstore.storage.places.locks import lock

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:
        with ExitStack() as held:
            for k in range(300):
                held.enter_context(lock(tmp_path / f"{k}.lock", "x"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
