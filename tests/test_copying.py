"""A store is copied soundly while it is recorded, repaired, extended or removed: by the command, and by its files."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import nn

import trajstore as ts
from tests.conftest import SMALL_NET
from trajstore import copying
from trajstore.errors import BusyError, DamageError, OutdatedError
from trajstore.merging import merge
from trajstore.storage.folder import Folder
from trajstore.storage.resume import ResumeSlots
from trajstore.storage.segment import array_of
from trajstore.storage.writer import Ledger
from trajstore.store import open_root
from trajstore.verifying import verify

COMMIT = 3
"""Steps between commits; a segment is begun and committed several times before it is full."""
SEGMENT = 8


@pytest.fixture(autouse=True)
def many_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    commit_often(monkeypatch.setattr)


def commit_often(patch: Callable[[str, object], None]) -> None:
    patch("trajstore.flattening.segment_length", lambda layout: SEGMENT)
    patch("trajstore.recorder.COMMIT_STEPS", COMMIT)


class Loop:
    """A training loop that goes on when it is told to."""

    def __init__(self, store: Path | str, *, seed: int = 0, steps: int = 400, size: int = 3) -> None:
        torch.manual_seed(seed)
        self.net = nn.Linear(size, 2)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.5)
        self.rec = ts.record(
            store, "mine", self.net, optimizer=self.optimizer, seed=seed, steps=steps, sketch=4, durability="none"
        ).__enter__()
        self.taken = 0

    def go(self, steps: int) -> None:
        """Take some steps; those that are due are committed when it returns."""
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = self.net(torch.ones(1, self.net.in_features)).square().sum()
            loss.backward()
            self.optimizer.step()
            self.taken += 1
            self.rec.step(loss=loss.item())
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


def refuse_unsound(copy: Path | str, source: Path | str, least: int) -> None:
    """The copy verifies, has what was committed at its begin, as it is in the source, and a state to resume from."""
    assert [str(found) for found in verify(ts.Store(copy))] == []
    stored, whole = ts.open(copy)["mine"], ts.open(source)["mine"]
    last = last_of(copy)
    assert last >= least
    ours, theirs = (one.dataset().sel(step=slice(last), snapshot=slice(last)) for one in (stored, whole))
    assert ours["recorded"].values[0, 0].all()
    for name in ("params", "loss", "late", "sketch"):
        if name in ours:
            there = ours[name].notnull() if name == "late" else True
            assert np.array_equal(ours[name].where(there), theirs[name].where(there), equal_nan=True), name
    resumes = ResumeSlots(stored.group, "forward", 0).latest(last)
    assert resumes is not None
    assert resumes[0] == last


@contextmanager
def at_each(source: Path, act: Callable[[int], None]) -> Iterator[None]:
    """Have something happen at each moment of a copy: before a file is read of the source, and after records are."""
    reads, records, states = Folder.read, Ledger.__init__, ResumeSlots._read
    busy, number = False, 0

    def moment() -> None:
        nonlocal busy, number
        if not busy and threading.current_thread() is threading.main_thread():
            busy, number = True, number + 1
            act(number)
            busy = False

    def read(self: Folder, key: str, most: int | None = None) -> bytes | None:
        if self.path == source:
            moment()
        return reads(self, key, most)

    def opened(self: Ledger, group: zarr.Group, *rest: Any, **more: Any) -> None:
        records(self, group, *rest, **more)
        if group.store.read_only:
            moment()

    def state(self: ResumeSlots, path: str) -> Any:
        if self._group.store.read_only:
            moment()
        return states(self, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "read", read)
        patch.setattr(Ledger, "__init__", opened)
        patch.setattr(ResumeSlots, "_read", state)
        yield


def copies_with_commits_at(moments: Sequence[int], loop: Loop, source: Path, folder: Path) -> int:
    """Copy anew, and go on with an earlier copy, with two commits at one moment; return the last moment that came."""
    at, came, went_on = 0, 0, 0

    def act(number: int) -> None:
        nonlocal came
        came = max(came, number)
        if number == at:
            loop.go(2 * COMMIT + 1)

    for at in moments:
        for target in (folder / f"copy{at}.zarr", folder / "kept.zarr"):
            begun, came = last_of(source), 0
            with at_each(source, act):
                ts.open(source).copy(target)
            refuse_unsound(target, source, begun)
            went_on += last_of(source) - begun >= COMMIT
            if came < at:
                break
    assert went_on >= len(moments), "the loop commits while it is copied"
    return came


def test_whatever_is_committed_meanwhile_a_copy_is_sound(loop: Loop, tmp_path: Path) -> None:
    """A segment that is replaced by one that covers more, its chunks, both resume states, and late metrics."""
    copies_with_commits_at((3, 6, 8, 9, 11, 13), loop, tmp_path / "runs.zarr", tmp_path)


@pytest.mark.slow
def test_so_it_is_at_each_moment(loop: Loop, tmp_path: Path) -> None:
    assert copies_with_commits_at(range(1, 40), loop, tmp_path / "runs.zarr", tmp_path) < 39
