"""Recordings of every kind that an earlier trajstore made go on, verify, replay and merge, wherever modules lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from obstore.store import from_url

import trajstore as ts
from tests.golden.make import HERE, KINDS, checkpoints, experiment, loop, summary
from tests.tools.buckets import serving, settings
from trajstore.errors import ConflictError, ResumedWarning
from trajstore.exchange.importing import import_checkpoints
from trajstore.exchange.merge import merge
from trajstore.reading.verify import verify
from trajstore.replay.compare import replay

BITS = 1e-4
"""How far another machine's arithmetic may be off."""


@pytest.fixture
def store(tmp_path: Path) -> ts.Store:
    shutil.unpack_archive(HERE / "kinds.zip", tmp_path)
    return ts.open(tmp_path / "kinds.zarr", trust=True)


@pytest.fixture
def held() -> dict[str, Any]:
    return json.loads((HERE / "kinds.json").read_text())


def test_it_holds_what_it_held_and_is_sound(store: ts.Store, held: dict[str, Any]) -> None:
    assert summary(store) == held
    assert list(verify(store)) == []
    rows = dict(store.sql("SELECT experiment, count(*) FROM metrics GROUP BY ALL").fetchall())
    assert rows == {name: sum(slab[3] for slab in told["slabs"]) for name, told in held.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_problem_of_ones_own_or_of_images_goes_on_and_replays(kind: str, store: ts.Store) -> None:
    before = store[kind].dataset().load()
    ts.run(experiment(kind, 6), store.place, engine="reference", resume=True)
    stored = ts.run(experiment(kind, 9), store.place, engine="reference", extend=True)
    assert all(slab.complete and slab.last_step == 9 for slab in stored.slabs())
    assert stored.dataset()["params"].sel(snapshot=before.snapshot).equals(before["params"])
    assert list(verify(store)) == []
    if kind != "given":  # of an object, nothing says how it is made
        assert max(slab.off for slab in replay(store[kind])) < BITS


def test_a_problem_that_differs_is_refused_all_the_same(store: ts.Store) -> None:
    other = ts.Experiment.of({**experiment("given", 9).config(), "problem": KINDS["named"]["problem"]})
    with pytest.raises(ConflictError, match="differs in problem"):
        ts.run(other, store.place, extend=True)


def test_a_loop_and_its_optimizer_go_on(store: ts.Store, tmp_path: Path) -> None:
    with pytest.warns(ResumedWarning):
        loop(store.place.path, 9, resume=True)
    loop(tmp_path / "whole.zarr", 9)
    here, whole = (ts.open(place)["loop"].dataset() for place in (store.place.path, tmp_path / "whole.zarr"))
    assert here.sizes["step"] == whole.sizes["step"] == 10
    assert float(abs(here["params"] - whole["params"]).max()) < BITS
    assert list(verify(store)) == []


def test_further_checkpoints_are_imported(store: ts.Store, tmp_path: Path) -> None:
    stored = import_checkpoints(
        store.place.path, "imported", checkpoints(tmp_path, [2, 8, 10]), "step{step}.pt", seed=1
    )
    assert stored.dataset()["snapshot"].values.tolist() == [0, 2, 4, 6, 8, 10]
    assert list(verify(store)) == []


def test_they_are_merged_into_another_store(store: ts.Store, held: dict[str, Any], tmp_path: Path) -> None:
    other = ts.Store(tmp_path / "other.zarr")
    merge(store, other)
    assert summary(other) == held
    for kind in ("named", "given", "images"):
        ts.run(experiment(kind, 8), tmp_path / "third.zarr", engine="reference")
    assert ts.open(tmp_path / "third.zarr")["given"].config["problem"]["object"] == "trajstore:ModuleProblem"
    merge(ts.open(tmp_path / "third.zarr"), other)  # what is recorded now is the same experiment
    assert {name: max(slab.last_step for slab in other[name].slabs()) for name in ("named", "given", "images")} == {
        "named": 8, "given": 8, "images": 8,
    }  # fmt: skip
    assert list(verify(other)) == []


def test_one_in_a_bucket_goes_on_and_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.unpack_archive(HERE / "bucket.zip", tmp_path)
    with serving() as address:
        for name, value in settings(address).items():
            monkeypatch.setenv(name, value)
        objects, kept = from_url("s3://bucket/golden.zarr"), tmp_path / "bucket.zarr"
        for file in (file for file in kept.rglob("*") if file.is_file()):
            objects.put(str(file.relative_to(kept)), file.read_bytes())
        store = ts.open("s3://bucket/golden.zarr", trust=True)
        assert summary(store) == json.loads((HERE / "bucket.json").read_text())
        stored = ts.run(experiment("named", 9), store.place, engine="reference", extend=True)
        assert list(verify(store)) == []
        assert max(slab.off for slab in replay(stored)) < BITS
        merge(store, ts.Store(tmp_path / "folder.zarr"))
    assert summary(ts.open(tmp_path / "folder.zarr"))["named"]["slabs"] == [
        [*slab[:2], 9, 10, True] for slab in json.loads((HERE / "bucket.json").read_text())["named"]["slabs"]
    ]
