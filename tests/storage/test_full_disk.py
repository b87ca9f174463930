"""A full disk: one line names the file, what was committed stays, removing makes room, and recording goes on."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import trajstore as ts
from tests.conftest import SMALL_NET
from tests.tools.waiting import HANGS
from trajstore.errors import ConfigurationError, WriteError
from trajstore.exchange.merge import remove
from trajstore.reading.verify import verify
from trajstore.storage.places.opening import place_of

NET = {
    **SMALL_NET, "problem": {"family": "regression", "width": 24, "depth": 2, "points": 21}, "steps": 300,
    "seeds": [0, 1, 2, 3], "orders": ["forward"],
}  # fmt: skip
SIZE, BALLAST = 2_400_000, 1_500_000
"""Bytes of a disk, and of what else is on it at first: two of four slabs find room beside that."""


def told_by(error: OSError) -> str:
    return " ".join(str(part) for part in (error.strerror or error, error.filename) if part)


def filled(disk: Path) -> Path:
    """Take the last byte of a disk."""
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))
    return filler


def play(disk: Path) -> dict[str, Any]:
    """Record on a small disk until it is full, and go on from there; tell what was seen."""
    store, seen, ballast = disk / "runs.zarr", dict[str, Any](), disk / "ballast"
    ballast.write_bytes(bytes(BALLAST))
    how: dict[str, Any] = {"engine": "reference"}
    try:
        ts.run(ts.Experiment.of(NET), store, **how)
    except WriteError as error:
        seen["recording"] = str(error)
    filler = filled(disk)
    committed = [slab.recorded for slab in ts.open(store)["net"].slabs()]
    seen["committed"] = committed
    seen["findings"] = [str(found) for found in verify(ts.Store(store)) if not found.harmless]
    loss = ts.open(store)["net"].dataset()["train_loss"].values
    seen["read"] = [int(n) for n in (loss == loss).sum(axis=-1).ravel()]  # NaN where nothing is committed
    try:
        ts.run(ts.Experiment.of(NET), store, resume=True, **how)
    except OSError as error:
        seen["resuming"] = told_by(error)
    seen["later"] = [slab.recorded for slab in ts.open(store)["net"].slabs()]
    free = os.statvfs(disk).f_bavail
    remove(ts.open(store), "net")
    seen["freed"] = os.statvfs(disk).f_bavail - free
    seen["left"] = sorted(file.name for file in store.iterdir())
    filler.unlink()
    with suppress(WriteError):
        ts.run(ts.Experiment.of(NET), store, **how)
    seen["again"] = [slab.complete for slab in ts.open(store)["net"].slabs()]
    ballast.unlink()
    ts.run(ts.Experiment.of(NET), store, resume=True, **how)
    seen["whole"] = [slab.complete for slab in ts.open(store)["net"].slabs()]
    seen["sound"] = [str(found) for found in verify(ts.Store(store))]
    return seen


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """On a file system of its own, which nobody else sees and which ends with the process."""
    disk = tmp_path / "disk"
    disk.mkdir()
    alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f'mount -t tmpfs -o size={SIZE} tmpfs "$0"'
    try:
        if subprocess.run([*alone, mount, str(disk)], capture_output=True, check=False).returncode:
            pytest.skip("this system lets nobody mount a file system of its own")
    except FileNotFoundError:
        pytest.skip("this system has no unshare")
    done = subprocess.run(
        [*alone, f'{mount} && exec "$1" -m tests.storage.test_full_disk "$0"', str(disk), sys.executable],
        capture_output=True, text=True, check=False, timeout=HANGS, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert "No space left on device: " in seen["recording"]
    assert str(disk / "runs.zarr" / "net") in seen["recording"]
    assert "what was committed before is kept; --resume continues" in seen["recording"]
    assert seen["committed"][0] == 301
    assert 0 in seen["committed"]
    assert seen["findings"] == []
    assert seen["read"] == seen["committed"] == seen["later"]
    assert "No space left on device" in seen["resuming"]
    assert str(disk / "runs.zarr") in seen["resuming"]
    assert seen["freed"] > 0
    assert seen["left"] == ["zarr.json"]
    assert seen["again"][0]
    assert not seen["again"][3]
    assert seen["whole"] == [True] * 4
    assert seen["sound"] == []


@pytest.fixture
def store(tmp_path: Path) -> Path:
    ts.run(ts.Experiment.of({**SMALL_NET, "steps": 3}), tmp_path / "runs.zarr", engine="reference")
    return tmp_path / "runs.zarr"


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EACCES])
def test_an_experiment_that_cannot_be_renamed_stays_as_it_was(
    code: int, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a mount point: nothing of it is touched before it is sure that it can be removed."""
    rename = Path.rename

    def refused(path: Path, target: Any) -> Path:
        if path.name == "net":
            raise OSError(code, os.strerror(code), str(path))
        return rename(path, target)

    before = {file: file.read_bytes() for file in store.rglob("*") if file.is_file()}
    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(ConfigurationError, match=f"{os.strerror(code)}.*; it is as it was"):
        remove(ts.open(store), "net")
    assert {file: file.read_bytes() for file in store.rglob("*") if file.is_file()} == before
    monkeypatch.undo()
    remove(ts.open(store), "net")
    assert [file.name for file in store.iterdir()] == ["zarr.json"]


def ended(store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Remove an experiment, die when the first file was deleted, and return what is left."""
    unlink, deleted = os.unlink, list[Any]()

    def killed(path: Any, **named: Any) -> None:
        if deleted:
            raise KeyboardInterrupt
        deleted.append(path)
        unlink(path, **named)

    monkeypatch.setattr("os.unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(ts.open(store), "net")
    monkeypatch.undo()
    (left,) = store.glob(".removed-*")
    assert [file for file in left.rglob("*") if file.is_file()]
    return left


def test_what_a_removal_that_died_left_is_named_and_deleted(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = ended(store, monkeypatch)
    assert list(ts.open(store)) == []
    (found,) = verify(ts.Store(store))
    assert found.harmless
    assert "left of something that was removed" in str(found)
    assert left.name in str(found)
    assert [found.repaired for found in verify(ts.Store(store), repair=True)] == [True]
    assert list(verify(ts.Store(store))) == []
    assert not left.exists()


@pytest.mark.parametrize("earlier", [False, True])
def test_the_next_writer_deletes_it(earlier: bool, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = ended(store, monkeypatch)
    if earlier:  # releases before renamed them out of the store
        grave = store.parent / "runs.zarr.traj" / "removed" / "0123"
        grave.parent.mkdir()
        left = left.rename(grave)
        assert "0123" in str(*verify(ts.Store(store)))
    ts.run(ts.Experiment.of({**SMALL_NET, "name": "other", "steps": 3}), store, engine="reference")
    assert not left.exists()
    assert list(verify(ts.Store(store))) == []


def test_files_that_cannot_be_deleted_are_told_of_and_nothing_else(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = os.unlink

    def refused(path: Any, **named: Any) -> None:
        if path == "zarr.json":
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        unlink(path, **named)

    monkeypatch.setattr("os.unlink", refused)
    with pytest.raises(WriteError, match="is removed, but some of its files cannot be deleted"):
        remove(ts.open(store), "net")
    assert list(ts.open(store)) == []
    ts.run(ts.Experiment.of({**SMALL_NET, "steps": 3}), store, engine="reference")  # it waits for nothing
    (found,) = verify(ts.Store(store), repair=True)
    assert (found.harmless, found.repaired) == (True, False)
    monkeypatch.undo()
    assert [found.repaired for found in verify(ts.Store(store), repair=True)] == [True]


def test_what_is_declared_or_removed_half_is_named_and_deleted(store: Path) -> None:
    document = store / "net" / "zarr.json"
    told = json.loads(document.read_text())
    told["attributes"]["trajstore"] = {"declaring": True}
    document.write_text(json.dumps(told))
    (found,) = verify(ts.Store(store))
    assert found.harmless
    assert "declared half, or removed half" in str(found)
    assert [found.repaired for found in verify(ts.Store(store), repair=True)] == [True]
    assert list(verify(ts.Store(store))) == []
    assert not (store / "net").exists()


def test_a_slab_without_room_for_its_lock_is_removed_only_if_nothing_is_stored_of_it(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    (store.parent / "runs.zarr.traj" / "locks" / "net" / "backward.1.lock").unlink()
    opening = os.open

    def full(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if str(path).endswith("backward.1.lock"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return opening(path, flags, *more, **named)

    monkeypatch.setattr("os.open", full)
    with pytest.raises(OSError, match="No space left"):  # somebody may be writing it, who came by another path
        remove(ts.open(store), "net")
    assert ts.open(store)["net"].slabs()
    shutil.rmtree(store / "net" / "committed" / "c" / "1" / "1")
    remove(ts.open(store), "net")
    assert list(ts.open(store)) == []


def test_a_lock_needs_no_room_for_its_holders_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trajstore.errors import BusyError

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.pwrite", full)
    place = place_of(tmp_path / "runs.zarr")
    place.make()
    with (
        place.lock("a.lock", "it"),
        pytest.raises(BusyError, match="it is being written by another process"),
        place.lock("a.lock", "it"),
    ):
        pass


if __name__ == "__main__":
    sys.stdout.write(json.dumps(play(Path(sys.argv[1]))) + "\n")
