"""What it costs to look into a store grows with what is in it, and no faster; counted in requests to a bucket."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch
from torch import nn
from trajstore.cli.inspection import info, ls

import trajstore as ts
from trajstore._common.units import human_bytes
from trajstore.storage.places import requests
from trajstore.storage.places.opening import place_of

AN_EXPERIMENT = 10
"""Requests that a listing makes at most for an experiment with one slab."""


@pytest.fixture
def place() -> str:
    return f"memory://{uuid.uuid4().hex}.zarr"


@contextmanager
def counted(patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The keys that are asked for meanwhile."""
    asked: list[str] = []

    def counting(request: Callable[..., Any]) -> Callable[..., Any]:
        def made(there: Any, key: Any, *rest: Any, **named: Any) -> Any:
            asked.append(str(key))
            return request(there, key, *rest, **named)

        return made

    with patch.context() as patched:
        for name in ("get", "head", "create", "replace", "delete", "below", "level"):
            patched.setattr(requests, name, counting(getattr(requests, name)))
        yield asked


def loop(place: str, seed: int = 0, name: str = "e0") -> None:
    """Record a loop of one step."""
    with ts.record(place, name, nn.Linear(2, 2), seed=seed, sketch=4) as rec:
        rec.step(loss=1.0)


def copies(place: str, begin: int, end: int) -> None:
    """Put copies of the first experiment beside it, as they are."""
    whole: Any = place_of(place)
    for key, _ in whole.files("e0"):
        for copy in range(begin, end):
            obstore.put(whole.objects, key.replace("e0/", f"e{copy}/", 1), whole.read(key))


def asked_in_sql(place: str) -> None:
    assert ts.open(place).sql("SELECT count(*) FROM runs").fetchall() == [(len(list(ts.open(place))),)]


def shown(place: str) -> None:
    assert "e0" in repr(ts.open(place))


def told(place: str) -> None:
    info(place, "e0")


@pytest.mark.parametrize("look", [ls, shown, asked_in_sql], ids=["ls", "repr", "sql"])
def test_looking_into_a_store_asks_for_each_experiment_a_few_times(
    look: Callable[[str], None], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop(place)
    counts, number = [], 1
    for more in (2, 4, 8):
        copies(place, number, more)
        number = more
        look(place)  # what an index takes once
        with counted(monkeypatch) as asked:
            look(place)
        counts.append(len(asked))
    two, four, eight = counts
    assert eight - four == 2 * (four - two), "linear"
    assert 0 < (eight - four) / 4 <= 2 * AN_EXPERIMENT


def test_one_experiment_is_read_whatever_else_is_there(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loop(place)
    with counted(monkeypatch) as before:
        told(place)
    copies(place, 1, 6)
    with counted(monkeypatch) as after:
        told(place)
    assert sorted(after) == sorted(before)
    assert not [key for key in after if key.startswith("e1")]


def test_a_state_is_read_whatever_other_slabs_there_are(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> list[str]:
        with counted(monkeypatch) as keys:
            states.append(ts.open(place)["e0"].state_dict(order="forward", seed=0, step=1)["weight"])
        return sorted(keys)

    states: list[torch.Tensor] = []
    loop(place)
    alone = asked()
    for seed in (1, 2, 3):
        loop(place, seed)
    assert asked() == alone
    assert torch.equal(*states)


def test_what_the_disk_holds_is_told_beside_the_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "s.zarr")
    loop(folder)
    environment = {**os.environ, "BLOCKSIZE": "512"}
    told = subprocess.run(["du", "-s", f"{folder}/e0"], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    taken = 512 * int(told.stdout.split()[0])
    held = sum(file.stat().st_size for file in Path(folder, "e0").rglob("*") if file.is_file())
    assert taken > 2 * held, "of files that are smaller than a block"
    ls(folder, json=True)
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["bytes"], row["disk_bytes"]) == (held, taken)
    ls(folder)
    assert f"{human_bytes(held)} ({human_bytes(taken)} on disk)" in capsys.readouterr().out
    info(folder, "e0")
    assert f"{human_bytes(held)} ({human_bytes(taken)} on disk), states" in capsys.readouterr().out


def test_in_a_bucket_objects_take_what_they_hold(place: str) -> None:
    loop(place)
    assert ts.open(place)["e0"].bytes_taken() == ts.open(place)["e0"].bytes_on_disk() > 1_000


def test_a_recording_costs_the_same_however_many_there_were(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for seed in range(6):
        with counted(monkeypatch) as asked:
            loop(place, seed)
        counts.append(len(asked))
    assert counts[5] <= counts[1], counts
