"""Disks that fail, fill up, or lose power: what was committed stays, every error is told, and a recording goes on."""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import pytest

from tests.tools.torture import (
    REFERENCE,
    TINY,
    Report,
    Truth,
    Variant,
    examine,
    in_child,
    record,
    recorded,
    side_by_side,
    start,
)
from tests.tools.waiting import HANGS
from trajstore.errors import TrajstoreError
from trajstore.storage.places.durable import DurableStore


class Scenario(NamedTuple):
    """What is recorded while the disk fails, and what was there before."""

    variant: Variant
    before: Variant | None = None
    stopped: bool = False
    """Whether the disk fails somewhere before the power does, and the recording is begun again in between."""


EXTENDING = {**REFERENCE, "extend": True}
SCENARIOS = {
    "new": Scenario(
        Variant({**TINY, "steps": 3, "seeds": [0]}, REFERENCE, segment=2, commit_steps=1),
    ),
    "extended": Scenario(
        Variant({**TINY, "steps": 4, "seeds": [3, 1], "orders": ["backward", "forward"]}, EXTENDING, segment=3),
        Variant({**TINY, "steps": 2, "seeds": [3], "orders": ["backward"]}, EXTENDING, segment=3),
    ),
    "stopped before": Scenario(
        Variant({**TINY, "steps": 3, "seeds": [0], "orders": ["backward"]}, REFERENCE, segment=2), stopped=True
    ),
}


Prepared = dict[str, tuple[Scenario, Truth, Path | None]]


def prepared(folder: Path) -> Prepared:
    """Record what is there before, and each scenario undisturbed."""
    found: Prepared = {}

    def one(number: int, _: int) -> None:
        name, scenario = list(SCENARIOS.items())[number]
        before, place = None, folder / name / "whole.zarr"
        if scenario.before is not None:
            before = folder / name / "before.zarr"
            in_child(record, scenario.before, before)
            shutil.copytree(before, place)
        found[name] = scenario, in_child(recorded, scenario.variant, place)[0], before

    side_by_side(one, range(len(SCENARIOS)))
    return found


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> Prepared:
    return prepared(tmp_path_factory.mktemp("there"))


# Errors -----------------------------------------------------------------------------------------------------------

KINDS = ("before", "after", "torn", "full")
"""An error before anything is written, one after all is, one in the middle, and a disk that stays full."""


class Failing:
    """The k-th write, flush or deletion of a store fails."""

    def __init__(self, kind: str, at: int) -> None:
        self.kind, self.at, self.calls, self.off = kind, at, 0, False
        self.failed = ""
        self._lock = threading.Lock()

    def install(self) -> None:
        write, flush, delete = DurableStore.set_sync, DurableStore.flush, DurableStore.delete_dir

        def set_sync(store: DurableStore, key: str, value: Any) -> None:
            if self._fails(key):
                if self.kind == "torn":
                    path = store.root / f"{key}.torn.partial"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(value.to_bytes()[: len(value) // 2])
                if self.kind == "after":
                    write(store, key, value)
                raise self.error
            write(store, key, value)

        def flushed(store: DurableStore) -> None:
            fails = self._fails("flush")
            if not fails or self.kind == "after":
                flush(store)
            if fails:
                raise self.error

        async def delete_dir(store: DurableStore, prefix: str) -> None:
            fails = self._fails(f"delete {prefix}")
            if fails and self.kind == "torn":
                for file in [f for f in (store.root / prefix).rglob("*") if f.is_file()][::2]:
                    file.unlink()
            if not fails or self.kind == "after":
                await delete(store, prefix)
            if fails:
                raise self.error

        DurableStore.set_sync, DurableStore.flush, DurableStore.delete_dir = set_sync, flushed, delete_dir

    @property
    def error(self) -> OSError:
        code = errno.EIO if self.kind in ("before", "after") else errno.ENOSPC
        return OSError(code, os.strerror(code))

    def _fails(self, what: str) -> bool:
        with self._lock:
            self.calls += not self.off
            fails = not self.off and (self.calls == self.at or (self.kind == "full" and self.calls > self.at > 0))
            if fails and not self.failed:
                self.failed = what
            return fails


def erring(scenario: Scenario, truth: Truth, kind: str, at: int, place: Path) -> tuple[list[str], int]:
    """Record while the k-th write fails, look, and go on in the same process; return what is wrong, and the writes."""
    failing, told, announced = Failing(kind, at), None, place.with_name("announced")
    failing.install()
    try:
        record(scenario.variant, place, announced)
    except BaseException as error:
        told = error
    failing.off = True
    problems = []
    if failing.failed and told is None:
        problems.append("the error was swallowed")
    if told is not None and not (failing.failed and isinstance(told, OSError | TrajstoreError)):
        problems.append(f"raised {told!r}")
    try:
        problems += examine(place, truth, announced)
        record(scenario.variant, place)
        problems += [f"gone on: {problem}" for problem in examine(place, truth, announced, True)]
    except Exception as error:
        problems.append(f"going on raised {error!r}")
    return [f"{problem} ({failing.failed} failed)" for problem in problems], failing.calls


def errors(most: int, seed: int, folder: Path, there: Prepared | None = None) -> Report:
    """Let every write fail in every way, or a sample of so many."""
    report, rng = Report("failing writes", Counter(failed=0)), random.Random(seed)
    there, moments = there or prepared(folder), []

    def trial(name: str, kind: str, at: int) -> int:
        scenario, truth, before = there[name]
        place = folder / f"{name}-{kind}-{at}" / "s.zarr"
        place.parent.mkdir()
        if before is not None:
            shutil.copytree(before, place)
        try:
            problems, calls = in_child(erring, scenario, truth, kind, at, place)
        except AssertionError as error:
            problems, calls = [str(error)], 0
        report.add(f"seed {seed}, {name}, {kind} {at}", problems, failed=at > 0)
        shutil.rmtree(place.parent)
        return calls

    for name in ("new", "extended"):
        calls = trial(name, "before", 0)
        moments += [(name, kind, at) for kind in KINDS for at in range(1, calls + 1)]
    chosen = rng.sample(moments, min(most, len(moments)))
    side_by_side(lambda number, _: trial(*chosen[number]), range(len(chosen)))
    return report


def test_every_error_is_told_and_nothing_committed_is_lost(tmp_path, there):
    report = errors(10, 1, tmp_path, there)
    assert report.counts["failed"] == 10
    assert not report.problems, "\n".join([f"{report}, seed 1", *report.problems])


SMALL = SCENARIOS["new"].variant


def test_when_an_error_is_told_nothing_is_written_any_more(tmp_path):
    """Locks are free then: a write that was under way would fall among those of whoever comes next."""
    assert in_child(writing_after_an_error, SMALL, tmp_path / "s.zarr") == []


def writing_after_an_error(variant: Variant, place: Path) -> list[str]:
    """Let the first commit fail while another thread writes states; return what was still being written after."""
    write, encoding, under_way = DurableStore.set_sync, threading.Event(), []

    def set_sync(store: DurableStore, key: str, value: Any) -> None:
        under_way.append(key)
        if key.startswith("net/params/c/1/"):
            encoding.set()
            time.sleep(1)
        if key.startswith("net/committed/c/") and encoding.wait(HANGS):
            under_way.remove(key)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write(store, key, value)
        under_way.remove(key)

    DurableStore.set_sync = set_sync
    with pytest.raises(OSError, match="could not be written"):
        record(variant, place)
    return list(under_way)


# Power cuts -------------------------------------------------------------------------------------------------------

CUT = 77


@dataclass
class Change:
    """A change of a directory: it survives a power cut for certain once the directory was fsynced."""

    kind: str
    path: PurePath
    """Relative to the store."""
    content: bytes = b""
    synced: bool = True
    """Whether the content was fsynced before."""
    durable: bool = False


@dataclass
class Journal:
    """What a process changed in a store, by its calls to the kernel; it dies at one of them as if power had failed."""

    root: Path
    at: int
    seed: str
    changes: list[Change] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._synced, self._lock, self._os = set[int](), threading.RLock(), {}
        there = list(self.root.rglob("*")) if self.root.exists() else []
        self._folders = {PurePath(), *(PurePath(f.relative_to(self.root)) for f in there if f.is_dir())}
        self._files = {PurePath(f.relative_to(self.root)): f.read_bytes() for f in there if f.is_file()}

    def install(self) -> None:
        for name in ("mkdir", "replace", "rename", "link", "unlink", "remove", "rmdir"):
            self._os[name] = getattr(os, name)
            setattr(os, name, self._noting(name))
        os.fsync = self._fsync

    def _noting(self, name: str) -> Callable[..., None]:
        def call(*args: Any, **options: Any) -> None:
            with self._lock:
                change = self._change(name, args, options.get("dir_fd"))
                self._os[name](*args, **options)
                if change is not None:
                    self.changes.append(change)
                    self._cut()

        return call

    def _change(self, name: str, args: tuple[Any, ...], folder: int | None) -> Change | None:
        moves = name in ("replace", "rename", "link")
        path = Path(os.fspath(args[1 if moves else 0]))
        if folder is not None:
            path = Path(f"/proc/self/fd/{folder}").readlink() / path
        if not path.is_relative_to(self.root) or path.suffix == ".partial" or path == self.root:
            return None
        inside = PurePath(path.relative_to(self.root))
        if not moves:
            return Change({"mkdir": "mkdir", "rmdir": "rmdir"}.get(name, "remove"), inside)
        if Path(args[0]).is_dir():  # what is removed goes by another name, which nothing reads
            return Change("rmdir", PurePath(Path(args[0]).relative_to(self.root)))
        content = Path(args[0]).read_bytes()
        return Change("put", inside, content, Path(args[0]).stat().st_ino in self._synced)

    def _fsync(self, descriptor: int) -> None:
        with self._lock:
            status = os.fstat(descriptor)
            if not stat.S_ISDIR(status.st_mode):
                self._synced.add(status.st_ino)
                return
            folder = Path(f"/proc/self/fd/{descriptor}").readlink()
            if folder.is_relative_to(self.root):
                for change in self.changes:
                    change.durable |= change.path.parent == PurePath(folder.relative_to(self.root))

    def _cut(self) -> None:
        if len(self.changes) == self.at:
            shutil.copytree(self.root, self.root.with_name("all.zarr"))  # as after SIGKILL
            how = random.Random(self.seed).choice(["none", "last", "some"])
            self._leave(how, self.root.with_name(f"{how}.zarr"))
            os._exit(CUT)

    def _leave(self, how: str, place: Path) -> None:
        """Make what may be there after a power cut: of what is not durable, no change, the last one, or any."""
        rng, pending = random.Random(f"{self.seed}/{how}"), [c for c in self.changes if not c.durable]
        files, folders = dict(self._files), set(self._folders)
        for change in self.changes:
            kept = {
                "none": False,
                "last": change.kind == "mkdir" or change is pending[-1] if pending else False,
                "some": rng.random() < 0.5,
            }
            path = change.path
            if not (change.durable or kept[how]) or path.parent not in folders:
                continue
            if change.kind == "mkdir":
                folders.add(path)
            elif change.kind == "put":
                length = len(change.content) if change.synced else rng.randrange(len(change.content) + 1)
                files[path] = change.content[:length]
            elif change.kind == "remove":
                files.pop(path, None)
            else:
                folders = {f for f in folders if not f.is_relative_to(path)}
                files = {f: content for f, content in files.items() if not f.is_relative_to(path)}
        for folder in sorted(folders):
            (place / folder).mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            (place / path).write_bytes(content)


def recording_until(scenario: Scenario, place: Path, at: int, seed: str) -> int:
    """Record until power fails; return how many moments there were if it did not."""
    journal, variant = Journal(place, at, seed), replace(scenario.variant, fsync=True)
    failing = Failing("full", random.Random(seed).randrange(1, 100) if scenario.stopped else 0)
    failing.install()
    journal.install()
    with suppress(OSError):
        record(variant, place, place.with_name("announced"))
    failing.off = True
    if failing.failed:
        record(variant, place)
    return len(journal.changes)


def going_on(scenario: Scenario, truth: Truth, place: Path) -> list[str]:
    """Look at what a power cut left, and go on with it."""
    announced = place.with_name("announced")
    problems = examine(place, truth, announced)
    try:
        record(scenario.variant, place)
        problems += [f"gone on: {problem}" for problem in examine(place, truth, announced, True)]
    except Exception as error:
        problems.append(f"going on raised {error!r}")
    return problems


def cuts(most: int, seed: int, folder: Path, there: Prepared | None = None) -> Report:
    """Cut the power after every change of a directory, or a sample of so many."""
    report, rng = Report("power cuts", Counter(cut=0)), random.Random(seed)
    there, moments = there or prepared(folder), []

    def begun(name: str, at: int) -> tuple[Path, int]:
        scenario, _, before = there[name]
        place = folder / f"{name}-{at}" / "s.zarr"
        place.parent.mkdir()
        if before is not None:
            shutil.copytree(before, place)
        process, connection = start(recording_until, scenario, place, at, f"{seed}/{at}")
        with closing(connection):
            connection.recv()
            process.join(HANGS)
            process.kill()
            if process.exitcode == CUT:
                return place, at
            fine, told = connection.recv() if connection.poll() else (False, f"ended with {process.exitcode}")
            if not fine:
                report.add(f"seed {seed}, {name}, cut {at}", [str(told)])
            return place, told

    def trial(name: str, at: int) -> None:
        place, _ = begun(name, at)
        scenario, truth, _ = there[name]
        for left in sorted(place.parent.glob("*.zarr")):
            if left == place:
                continue
            try:
                problems = in_child(going_on, scenario, truth, left)
            except AssertionError as error:
                problems = [str(error)]
            report.add(f"seed {seed}, {name}, cut {at}, {left.stem}", problems, left=1)
        report.add("", [], cut=1)
        shutil.rmtree(place.parent)

    for name in there:
        moments += [(name, at) for at in range(1, begun(name, 0)[1] + 1)]
    chosen = rng.sample(moments, min(most, len(moments)))
    side_by_side(lambda number, _: trial(*chosen[number]), range(len(chosen)))
    return report


def test_a_power_cut_takes_nothing_that_was_committed(tmp_path, there):
    report = cuts(4, 1, tmp_path, there)
    assert report.counts["cut"] == 4
    assert not report.problems, "\n".join([f"{report}, seed 1", *report.problems])


def test_a_new_store_has_its_name_for_certain_before_anything_is_committed(tmp_path):
    folders = in_child(synced_before_the_first_commit, SMALL, tmp_path / "s.zarr")
    assert str(tmp_path / "s.zarr") in folders
    assert str(tmp_path) in folders


def synced_before_the_first_commit(variant: Variant, place: Path) -> list[str]:
    """Return the directories that were fsynced before a commit record was written."""
    synced, before, write = [], [], DurableStore.set_sync
    os.fsync = lambda descriptor: synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))

    def set_sync(store: DurableStore, key: str, value: Any) -> None:
        if "/committed/c/" in key and not before:
            before.extend(synced)
        write(store, key, value)

    DurableStore.set_sync = set_sync
    record(replace(variant, fsync=True), place)
    return before


def test_folders_that_a_recording_left_when_it_died_are_durable_once_the_next_one_commits(tmp_path):
    truth, _ = in_child(recorded, SMALL, tmp_path / "whole" / "s.zarr")
    in_child(dying_before_a_flush_then_losing_power, SMALL, tmp_path / "s.zarr")
    announced = tmp_path / "announced"
    assert announced.read_text().count("\n") > 5
    assert in_child(examine, tmp_path / "none.zarr", truth, announced, True) == []


def dying_before_a_flush_then_losing_power(variant: Variant, place: Path) -> None:
    """Record until the first states are written and not flushed, record again to the end, and keep what is durable."""
    journal, flush = Journal(place, 0, ""), DurableStore.flush

    def dying(store: DurableStore) -> None:
        if any(change.path.parts[:3] == ("net", "params", "c") for change in journal.changes):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        flush(store)

    journal.install()
    variant = replace(variant, fsync=True)
    DurableStore.flush = dying
    with pytest.raises(OSError, match="could not be written"):
        record(variant, place)
    DurableStore.flush = flush
    record(variant, place, place.with_name("announced"))
    journal._leave("none", place.with_name("none.zarr"))
