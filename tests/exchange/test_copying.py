"""A store is copied soundly while it is recorded, repaired, extended or removed: by the command, and by its files."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import nn

import trajstore as ts
from tests.conftest import SMALL_NET
from trajstore.errors import BusyError, DamageError
from trajstore.exchange import copying
from trajstore.reading.handles import open_root
from trajstore.reading.verify import verify
from trajstore.storage.places.bucket import Bucket
from trajstore.storage.places.folder import Folder
from trajstore.storage.writing.resume_slots import ResumeSlots
from trajstore.storage.writing.slab_writer import Ledger

COMMIT = 3
"""Steps between commits; a segment is begun and committed several times before it is full."""
SEGMENT = 8


@pytest.fixture(autouse=True)
def many_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    commit_often(monkeypatch.setattr)


def commit_often(patch: Callable[[str, object], None]) -> None:
    patch("trajstore.recording.schema.segment_length", lambda layout: SEGMENT)
    patch("trajstore.recording.loop.recorder.segment_length", lambda layout: SEGMENT)
    patch("trajstore.recording.loop.recorder.COMMIT_STEPS", COMMIT)


class Loop:
    """A training loop that goes on when it is told to."""

    def __init__(self, store: Path | str, *, seed: int = 0, resume: bool = False) -> None:
        torch.manual_seed(seed)
        self.net = nn.Linear(3, 2)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.5)
        recorder = ts.record(
            store, "mine", self.net, optimizer=self.optimizer, seed=seed, steps=400, sketch=4, durability="none",
            resume=resume,
        )  # fmt: skip
        self.rec = recorder.__enter__()
        self.taken = self.rec.last

    def go(self, steps: int, **more: Any) -> None:
        """Take some steps; those that are due are committed when it returns."""
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = self.net(torch.ones(1, self.net.in_features)).square().sum()
            loss.backward()
            self.optimizer.step()
            self.taken += 1
            self.rec.step(loss=loss.item(), **more)
            if self.taken % 2:
                self.rec.log(self.taken, late=float(self.taken))
        self.rec._observing.drain()
        self.rec._writing.drain()

    def end(self) -> None:
        self.rec.close()


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    running = Loop(tmp_path / "runs.zarr")
    running.go(20)
    yield running
    running.end()


def last_of(store: Path | str, seed: int = 0) -> int:
    """The last step that is committed."""
    stored = ts.open(store)["mine"]
    return int(stored.commits((0, stored.schema.seeds.index(seed))).last_step[0, 0])


def refuse_unsound(copy: Path | str, least: int) -> None:
    """The copy verifies, has what was committed at its begin, and a state to resume from."""
    assert [str(found) for found in verify(ts.Store(copy))] == []
    assert last_of(copy) >= least
    assert resumes_at(copy) is not None


def resumes_at(store: Path | str) -> int | None:
    latest = ResumeSlots(ts.open(store)["mine"].group, "forward", 0).latest(last_of(store))
    return None if latest is None else latest[0]


def refuse_other(copy: Path | str, source: Path | str) -> None:
    """What is in the copy is what is in the source, up to where it goes."""
    last = last_of(copy)
    stored, whole = ts.open(copy)["mine"], ts.open(source)["mine"]
    ours, theirs = (one.dataset().sel(step=slice(last), snapshot=slice(last)) for one in (stored, whole))
    assert ours["recorded"].values[0, 0].all()
    for name in ("params", "loss", "late", "sketch"):
        if name in ours:
            there = ours[name].notnull() if name == "late" else True
            assert np.array_equal(ours[name].where(there), theirs[name].where(there), equal_nan=True), name


@contextmanager
def at_each(source: Path, act: Callable[[int, str], None]) -> Iterator[None]:
    """Have something happen at each moment of a copy: before a file is read of the source, and after records are.

    It is told the number of the moment, and which file, or that it is `records` or a `state`.
    """
    reads, records, states = Folder.read, Ledger.__init__, ResumeSlots._read
    busy, number = False, 0

    def moment(what: str) -> None:
        nonlocal busy, number
        if not busy and threading.current_thread() is threading.main_thread():
            busy, number = True, number + 1
            act(number, what)
            busy = False

    def read(self: Folder, key: str, most: int | None = None) -> bytes | None:
        if self.path == source:
            moment(key)
        return reads(self, key, most)

    def opened(self: Ledger, group: zarr.Group, *rest: Any, **more: Any) -> None:
        records(self, group, *rest, **more)
        if group.store.read_only:
            moment("records")

    def state(self: ResumeSlots, path: str) -> Any:
        if self._group.store.read_only:
            moment("state")
        return states(self, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "read", read)
        patch.setattr(Ledger, "__init__", opened)
        patch.setattr(ResumeSlots, "_read", state)
        yield


def copies_with_commits_at(moments: Sequence[int], loop: Loop, source: Path, folder: Path) -> int:
    """Copy anew, and go on with an earlier copy, with two commits at one moment; return the last moment that came."""
    at = came = 0

    def act(number: int, what: str) -> None:
        nonlocal came
        came = max(came, number)
        if number == at:
            loop.go(2 * COMMIT + 1)

    for at in moments:
        for target in (folder / f"copy{at}.zarr", folder / "kept.zarr"):
            begun, came = last_of(source), 0
            with at_each(source, act):
                ts.open(source).copy(target)
            refuse_unsound(target, begun)
            assert resumes_at(target) == last_of(target)
            assert came < at or last_of(source) - begun >= COMMIT, "the loop commits while it is copied"
        if came < at:
            break
    refuse_other(folder / "kept.zarr", source)
    return came


def test_whatever_is_committed_meanwhile_a_copy_is_sound(loop: Loop, tmp_path: Path) -> None:
    """A segment that is replaced by one that covers more, its chunks, both resume states, and late metrics."""
    copies_with_commits_at((7,), loop, tmp_path / "runs.zarr", tmp_path)


@pytest.mark.slow
def test_so_it_is_at_each_moment(loop: Loop, tmp_path: Path) -> None:
    assert copies_with_commits_at(range(1, 40), loop, tmp_path / "runs.zarr", tmp_path) < 39


def once(act: Callable[[], object], which: Callable[[str], bool]) -> Callable[[int, str], None]:
    """Return what does something at the first of these moments, and has done it exactly once when it is asked."""
    done: list[str] = []

    def first(number: int, what: str) -> None:
        if not done and which(what):
            done.append(what)
            act()

    return first


def is_chunk(what: str) -> bool:
    return "/c/" in what


@pytest.mark.slow
def test_while_a_thread_records(loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, stop = tmp_path / "runs.zarr", threading.Event()
    reads = Folder.read

    def slow(self: Folder, key: str, most: int | None = None) -> bytes | None:
        if self.path == source and is_chunk(key):
            time.sleep(0.02)
        return reads(self, key, most)

    def going_on() -> None:
        while not stop.wait(0.005):
            loop.go(1)

    monkeypatch.setattr(Folder, "read", slow)
    thread = threading.Thread(target=going_on)
    thread.start()
    try:
        begun = last_of(source)
        ts.open(source).copy(tmp_path / "copy.zarr")
        ended = last_of(source)
    finally:
        stop.set()
        thread.join()
    refuse_unsound(tmp_path / "copy.zarr", begun)
    refuse_other(tmp_path / "copy.zarr", source)
    assert ended - begun >= 2 * COMMIT, "the loop commits while it is copied"


def _record_until(store: str, stop: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        commit_often(patch.setattr)
        loop = Loop(store)
        while not stop.wait(0.03) and loop.taken < 5_000:
            loop.go(1)
        loop.end()


@pytest.mark.slow
def test_while_another_process_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, context = tmp_path / "runs.zarr", multiprocessing.get_context("spawn")
    stop, reads, chunks = context.Event(), Folder.read, 0
    process = context.Process(target=_record_until, args=(str(source), stop))
    process.start()

    def slow(self: Folder, key: str, most: int | None = None) -> bytes | None:
        nonlocal chunks
        if self.path == source and is_chunk(key):
            chunks += 1
            time.sleep(0.05 if chunks < 16 else 0)
        return reads(self, key, most)

    monkeypatch.setattr(Folder, "read", slow)
    try:
        while not (source / "mine/committed/c/0/0/0/0").exists():
            assert process.is_alive()
            time.sleep(0.05)
        for number in range(3):
            for target in (tmp_path / f"copy{number}.zarr", tmp_path / "kept.zarr"):
                begun, chunks = last_of(source), 0
                ts.open(source).copy(target)
                assert last_of(source) - begun >= COMMIT, "the loop commits while it is copied"
                refuse_unsound(target, begun)
    finally:
        stop.set()
        process.join()
    refuse_other(tmp_path / "kept.zarr", source)
    ts.open(source).copy(tmp_path / "kept.zarr")
    assert ts.open(tmp_path / "kept.zarr")["mine"].slabs() == ts.open(source)["mine"].slabs()


def complete(store: Path | str) -> list[bool]:
    stored = ts.open(store)["mine"]
    return stored.complete(stored.commits())[0].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "apart", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["in blocks", "in the document"]
)
def test_what_ends_or_goes_on_meanwhile_is_not_called_complete(
    apart: bool, loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if apart:
        monkeypatch.setattr("trajstore.storage.writing.fills._MOST", 1)
    source, target = tmp_path / "runs.zarr", tmp_path / "copy.zarr"
    other = Loop(source, seed=1)
    other.go(5)
    other.end()
    ts.open(source).copy(target)
    assert ts.open(target)["mine"].document["format"] == 1 + apart
    assert complete(target) == [False, True]

    def ended_and_gone_on() -> None:
        nonlocal other
        loop.go(2)  # not committed before it ends
        loop.end()
        with pytest.warns(ts.errors.ResumedWarning):
            other = Loop(source, seed=1, resume=True)
        other.go(5)

    loop.go(SEGMENT)
    begun = last_of(source)
    with at_each(source, once(ended_and_gone_on, is_chunk)):
        ts.open(source).copy(target)
    assert (last_of(source), complete(source)) == (30, [True, False])
    assert (last_of(target), last_of(target, 1)) == (begun, last_of(source, 1))
    assert begun < 30
    assert last_of(source, 1) > 5
    assert complete(target) == [False, False]
    other.end()
    ts.open(source).copy(target)
    assert complete(target) == complete(source) == [True, True]
    assert [str(found) for found in verify(ts.Store(target))] == []
    ours, theirs = (sorted(ts.open(store)["mine"].fills, key=lambda fill: fill["id"]) for store in (target, source))
    assert ours == theirs


def damage(source: Path) -> None:
    file = source / "mine/params/c/0/0/0/1"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.slow
def test_what_is_repaired_meanwhile_is_copied_as_it_is_then(loop: Loop, tmp_path: Path) -> None:
    source, target = tmp_path / "runs.zarr", tmp_path / "copy.zarr"
    loop.end()
    damage(source)
    repaired: list[str] = []

    def repair() -> None:
        repaired.extend(str(found) for found in verify(ts.Store(source), repair=True))

    with at_each(source, once(repair, is_chunk)):
        ts.open(source).copy(target)
    assert any("steps 8 to 15" in found for found in repaired)
    recorded = ts.open(target)["mine"].dataset()["recorded"].values[0, 0]
    assert np.flatnonzero(recorded).tolist() == [*range(8), *range(16, 21)]
    assert [str(found) for found in verify(ts.Store(target))] == []


def test_damage_is_an_error_at_once_even_where_the_recording_goes_on(loop: Loop, tmp_path: Path) -> None:
    source, target, tries = tmp_path / "runs.zarr", tmp_path / "copy.zarr", 0

    def act(number: int, what: str) -> None:
        nonlocal tries
        if what == "records":
            tries += 1
            loop.go(COMMIT)

    damage(source)
    with at_each(source, act), pytest.raises(DamageError, match="order 'forward', seed 0: steps 8 to 15 are damaged"):
        ts.open(source).copy(target)
    assert tries == 3, "to know whether there is anything, to copy it, and to see whether it was taken back"
    assert last_of(target) == -1


def test_what_is_taken_back_again_and_again_is_told(loop: Loop, tmp_path: Path) -> None:
    source, target = tmp_path / "runs.zarr", tmp_path / "copy.zarr"
    ts.open(source).copy(target)
    had = last_of(target)
    loop.go(SEGMENT)
    loop.end()
    tries, right = 0, Ledger(open_root(source, "none")["mine"], ts.open(source)["mine"].schema, 0, 0)  # type: ignore[arg-type]
    records = right.records.copy()

    def taken_back(number: int, what: str) -> None:
        nonlocal tries
        if what == "records":
            tries += 1
            wrong = records.copy()
            wrong[1, 2] += tries
            right.take_over(wrong)

    with at_each(source, taken_back), pytest.raises(BusyError) as told:
        ts.open(source).copy(target)
    slab = "experiment 'mine', order 'forward', seed 0: steps 8 to 15"
    assert str(told.value).startswith(f"{slab} were taken back in {source} each of the {copying._TRIES} times")
    assert "\n" not in str(told.value)
    assert tries == 1 + 2 * copying._TRIES
    refuse_unsound(target, had)
    right.take_over(records)
    ts.open(source).copy(target)
    refuse_unsound(target, last_of(source))


@pytest.mark.slow
def test_a_store_that_is_removed_meanwhile(
    loop: Loop, tmp_path: Path, trajstore: Callable[..., tuple[Any, str, str]]
) -> None:
    source, target = tmp_path / "runs.zarr", tmp_path / "copy.zarr"
    loop.end()
    kept = tmp_path / "elsewhere"
    for moment in ("records", "state", "/c/"):
        with at_each(source, once(lambda: shutil.move(source, kept), lambda what, at=moment: at in what)):  # type: ignore[misc]
            code, out, told = trajstore("copy", str(source), str(target))
        assert (code, out) == (1, "")
        assert told.count("\n") == 1
        assert "experiment 'mine' is not in" in told
        assert [str(found) for found in verify(ts.Store(target))] == []
        kept.rename(source)
    assert trajstore("copy", str(source), str(target))[0] == 0


def stamps(*folders: Path) -> dict[str, tuple[int, int]]:
    files = [file for folder in folders for file in (folder, *folder.rglob("*"))]
    return {str(file): (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def test_the_command(loop: Loop, tmp_path: Path, trajstore: Callable[..., tuple[Any, str, str]]) -> None:
    """It locks and writes nothing where it copies from, and goes on with a copy."""
    source = tmp_path / "runs.zarr"
    before = stamps(source, tmp_path / "runs.zarr.traj")
    code, out, told = trajstore("copy", "runs.zarr", "copy.zarr")
    assert (code, told) == (0, "")
    assert out == "mine: 1 slab copied, 0 there already; 1 not complete yet\n"
    assert stamps(source, tmp_path / "runs.zarr.traj") == before
    loop.go(COMMIT)
    loop.end()
    code, out, _ = trajstore("copy", "runs.zarr", "copy.zarr", "mine", "--json")
    assert (code, json.loads(out)) == (0, [{"experiment": "mine", "order": "forward", "seed": 0, "copied": True}])
    assert trajstore("copy", "runs.zarr", "copy.zarr")[1] == "mine: 0 slabs copied, 1 there already\n"
    code, _, told = trajstore("copy", "runs.zarr", "copy.zarr", "yours")
    assert (code, "no experiment 'yours'" in told) == (2, True)


def before_a_slab(patch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Have something happen once, after an experiment was opened and before any of its records are read."""
    done = list[bool]()

    def then(*slab: Any) -> bool:
        if not done:
            done.append(True)
            act()
        return copying.copy_slab(*slab)

    patch.setattr("trajstore.exchange.merge.copy_slab", then)


@pytest.mark.slow
def test_a_metric_that_is_declared_meanwhile(loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "runs.zarr", tmp_path / "copy.zarr"
    begun = last_of(source)
    before_a_slab(monkeypatch, lambda: loop.go(2 * COMMIT, extra=1.5))
    ts.open(source).copy(target)
    refuse_unsound(target, begun + COMMIT)
    assert np.nanmax(ts.open(target)["mine"].dataset()["extra"]) == 1.5


@pytest.mark.parametrize("at_a_chunk", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_experiment_that_is_extended_meanwhile(
    at_a_chunk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "runs.zarr", tmp_path / "copy.zarr"
    how: Any = {"engine": "reference", "durability": "none"}
    net = SMALL_NET | {"seeds": [0], "orders": ["forward"]}
    opened = ts.run(ts.Experiment.of(net), source, **how)

    def extend() -> None:
        ts.run(ts.Experiment.of(net | {"steps": 20, "seeds": [0, 1]}), source, extend=True, **how)

    if at_a_chunk:
        with at_each(source, once(extend, is_chunk)):
            ts.open(source).copy(target)
        assert [(s.seed, s.last_step) for s in ts.open(target)["net"].slabs()] == [(0, 12)]
        assert [str(found) for found in verify(ts.Store(target))] == []
    else:
        before_a_slab(monkeypatch, extend)
    ts.open(source).copy(target)
    assert [(s.seed, s.last_step) for s in ts.open(target)["net"].slabs()] == [(0, 20), (1, 20)]
    assert [str(found) for found in verify(ts.Store(target))] == []
    ours, theirs = (ts.open(store)["net"].dataset().load() for store in (target, source))
    for name in ("params", "test_loss", "batch_index"):
        assert np.array_equal(ours[name], theirs[name])
    assert opened.commits().steps.tolist() == [[[True] * 13]], "as far as it went when it was opened"


def _is_document(path: str) -> bool:
    return path == "zarr.json"


def _is_noted(path: str) -> bool:
    return path.startswith(("noted-fills/", "resume/")) or path.endswith("_committed/zarr.json")


def _is_record(path: str) -> bool:
    return path.partition("/")[0].endswith("committed")


ORDER = (_is_document, _is_noted, _is_record, lambda path: True)
"""The order in which docs/places.md has the files of an experiment copied by other tools."""


def copied_by_files(
    source: Path, target: Path, order: Sequence[Callable[[str], bool]], between: Callable[[], None]
) -> None:
    """Copy as rsync does, list after list, file by file; some of them vanish or are replaced meanwhile."""
    target.mkdir()
    shutil.copy2(source / "zarr.json", target / "zarr.json")
    for turn, belongs in enumerate(order):
        files = sorted(
            str(file.relative_to(source / "mine")) for file in (source / "mine").rglob("*") if file.is_file()
        )
        for file in files:
            if belongs(file) and not any(other(file) for other in order[:turn]) and ".partial" not in file:
                (target / "mine" / file).parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):
                    shutil.copy2(source / "mine" / file, target / "mine" / file)
                between()


def test_files_are_copied_in_an_order_that_is_sound(loop: Loop, tmp_path: Path) -> None:
    source = tmp_path / "runs.zarr"
    begun = last_of(source)
    copied_by_files(source, tmp_path / "copy.zarr", ORDER, lambda: loop.go(1))
    assert last_of(source) - begun > 4 * SEGMENT
    assert [str(found) for found in verify(ts.Store(tmp_path / "copy.zarr"))] == []
    assert last_of(tmp_path / "copy.zarr") >= begun
    refuse_other(tmp_path / "copy.zarr", source)
    copied_by_files(source, tmp_path / "late.zarr", (lambda path: not _is_record(path), _is_record), lambda: loop.go(1))
    assert [found for found in verify(ts.Store(tmp_path / "late.zarr")) if not found.harmless], "as records come last"


@pytest.mark.slow
def test_out_of_an_object_store_and_within_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop holds its locks in this very process, which therefore could write: nothing is, by whoever copies."""
    source = f"memory://{tmp_path.name}-runs.zarr"
    loop = Loop(source)
    loop.go(20)
    reads, number, busy = Bucket.read, 0, False

    def read(self: Bucket, key: str, most: int | None = None) -> bytes | None:
        nonlocal number, busy
        if not busy and threading.current_thread() is threading.main_thread():
            busy, number = True, number + 1
            loop.go(number % 2)
            busy = False
        return reads(self, key, most)

    for target in (str(tmp_path / "copy.zarr"), str(tmp_path / "copy.zarr"), f"memory://{tmp_path.name}-copy.zarr"):
        begun = last_of(source)
        with monkeypatch.context() as patch:
            patch.setattr(Bucket, "read", read)
            ts.open(source).copy(target)
        assert last_of(source) - begun >= COMMIT, "the loop commits while it is copied"
        refuse_unsound(target, begun)
    loop.end()
    refuse_other(target, source)
    ts.open(source).copy(target)
    assert complete(target) == [True]
