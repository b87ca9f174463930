"""Late metrics whose records are lost: what was begun is noted, so that nothing passes for what never was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import trajstore as ts
from tests.storage.test_missing_files import HOW, TINY
from trajstore import analysis
from trajstore.errors import DamageError
from trajstore.exchange.merge import merge
from trajstore.reading.handles import open_root
from trajstore.reading.verify import verify
from trajstore.storage.format.codecs import write_block
from trajstore.storage.writing.late_metrics import LateSeries

NOTE = "slabs_begun"


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("computed") / "s.zarr"
    ts.run(ts.Experiment.of(TINY), store, **HOW)
    analysis.compute(ts.open(store)["net"], "gradient_norm")
    return store


@pytest.fixture
def store(computed: Path, tmp_path: Path) -> Path:
    shutil.copytree(computed, tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


def document(store: Path) -> Path:
    return store / "net" / "gradient_norm_committed" / "zarr.json"


def noted(store: Path) -> object:
    return json.loads(document(store).read_text())["attributes"].get(NOTE)


def lose(store: Path) -> None:
    """Lose values and records of a slab, with their folders."""
    for array in ("gradient_norm", "gradient_norm_committed"):
        shutil.rmtree(store / "net" / array / "c" / "1")


def wrong(store: Path, **how: bool) -> list[str]:
    return [str(found) for found in verify(ts.Store(store), **how) if not found.harmless]


def test_values_and_records_that_are_lost_together_are_missed(store: Path) -> None:
    assert noted(store) == [[0, 0, 1], [1, 0, 1]]
    assert wrong(store) == []
    lose(store)
    said = "experiment 'net', order 'backward', seed 0: 'gradient_norm' of steps 0 to 4095 is damaged"
    with pytest.raises(DamageError, match=said):
        ts.open(store)["net"].late()
    with pytest.raises(DamageError, match=said):
        ts.open(store)["net"].dataset().load()
    with pytest.raises(DamageError, match=said):
        ts.open(store).sql("SELECT gradient_norm FROM metrics").fetchall()
    with pytest.raises(DamageError, match=said):
        analysis.compute(ts.open(store)["net"], "gradient_norm")
    with pytest.raises(DamageError, match=said):
        merge(ts.open(store), ts.Store(store.parent / "other.zarr"))
    assert "order 'backward', seed 0, steps 0 to 9: 'gradient_norm' is not what was committed" in wrong(store)[0]


def test_what_is_lost_is_taken_out_and_computed_again(store: Path, computed: Path) -> None:
    lose(store)
    assert wrong(store, repair=True)
    assert wrong(store) == []
    assert analysis.compute(ts.open(store)["net"], "gradient_norm") == 10
    again, before = (ts.open(one)["net"].late()["gradient_norm"] for one in (store, computed))
    assert [one.tobytes() for one in again] == [one.tobytes() for one in before]


@pytest.mark.parametrize("dies_at", ["record", "note", "values"])
def test_a_computation_that_died_before_its_first_value_has_lost_nothing(
    dies_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ts.run(ts.Experiment.of({**TINY, "orders": ["forward"], "steps": 3}), tmp_path / "s.zarr", **HOW)
    written: list[str] = []

    def dies_there(what: str) -> None:
        written.append(what)
        if what == dies_at:
            raise InterruptedError

    def write(array: zarr.Array[Any], *rest: Any) -> None:
        dies_there("values" if array.basename == "gradient_norm" else "record")
        write_block(array, *rest)

    def update(array: zarr.Array[Any], attributes: dict[str, Any]) -> object:
        if NOTE in attributes:
            dies_there("note")
        return whole(array, attributes)

    whole = zarr.Array.update_attributes
    with monkeypatch.context() as patch:
        patch.setattr("trajstore.storage.writing.late_metrics.write_block", write)
        patch.setattr("zarr.Array.update_attributes", update)
        with pytest.raises(InterruptedError):
            analysis.compute(ts.open(tmp_path / "s.zarr")["net"], "gradient_norm")
    assert written[-1] == dies_at
    assert list(dict.fromkeys(written)) == ["record", "note", "values"][: len({*written})]
    assert wrong(tmp_path / "s.zarr") == []
    assert not ts.open(tmp_path / "s.zarr")["net"].late()["gradient_norm"][0].any()
    assert analysis.compute(ts.open(tmp_path / "s.zarr")["net"], "gradient_norm") == 4
    assert wrong(tmp_path / "s.zarr") == []


def test_a_store_without_notes_is_read_as_ever_and_gets_them(store: Path) -> None:
    whole = json.loads(document(store).read_text())
    del whole["attributes"][NOTE]
    document(store).write_text(json.dumps(whole, indent=2))
    assert wrong(store) == []
    assert ts.open(store)["net"].late()["gradient_norm"][0].all()
    ts.run(ts.Experiment.of({**TINY, "steps": 11}), store, extend=True, **HOW)
    analysis.compute(ts.open(store)["net"], "gradient_norm")
    assert noted(store) == [[0, 0, 1], [1, 0, 1]]
    assert wrong(store) == []


def test_what_is_merged_is_noted_where_it_goes(store: Path, tmp_path: Path) -> None:
    merge(ts.open(store), ts.Store(tmp_path / "other.zarr"))
    assert noted(tmp_path / "other.zarr") == noted(store)
    assert wrong(tmp_path / "other.zarr") == []


def test_notes_grow_with_what_was_declared(store: Path) -> None:
    ts.run(ts.Experiment.of({**TINY, "seeds": [0, 1]}), store, extend=True, **HOW)
    assert noted(store) == [[0, 0, 1], [1, 0, 1]]
    analysis.compute(ts.open(store)["net"], "gradient_norm")
    assert noted(store) == [[0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 1]]
    assert wrong(store) == []


def test_a_note_that_says_nothing_is_damage(store: Path) -> None:
    whole = json.loads(document(store).read_text())
    for note in (3, [3], [[0, 0]], [[0, 0, "1"]], [[-1, 0, 1]], {"0": 1}, None):
        whole["attributes"][NOTE] = note
        document(store).write_text(json.dumps(whole))
        with pytest.raises(DamageError, match=r"experiment 'net': net/gradient_norm_committed/zarr\.json is damaged"):
            ts.open(store)["net"].late()
    assert wrong(store, repair=True)
    assert wrong(store) == []
    assert ts.open(store)["net"].late()["gradient_norm"][0].all()


def test_slabs_that_are_computed_by_two_processes_are_all_noted(store: Path) -> None:
    """Each has opened the documents before the other notes what it does."""
    ts.run(ts.Experiment.of({**TINY, "seeds": [0, 1]}), store, extend=True, **HOW)
    opened = [open_root(store)["net"] for _ in range(2)]
    schema = ts.open(store)["net"].schema
    for order, group in enumerate(opened):
        with ts.open(store)["net"].locked(schema.orders[order], 1):
            LateSeries(group, schema, (order, 1), "gradient_norm").put(np.array([0]), np.array([1.0]))
    assert noted(store) == [[0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 1]]


def test_in_a_bucket_too() -> None:
    url = "memory://lost-records.zarr"
    ts.run(ts.Experiment.of(TINY), url, **HOW)
    analysis.compute(ts.open(url)["net"], "gradient_norm")
    place = ts.open(url).place
    with ts.open(url).declaring():
        for array in ("gradient_norm/c/1/0/0", "gradient_norm_committed/c/1/0/0/0"):
            assert place.exists(f"net/{array}")
            place.delete(f"net/{array}")
    with pytest.raises(DamageError, match="order 'backward', seed 0: 'gradient_norm'"):
        ts.open(url)["net"].late()
