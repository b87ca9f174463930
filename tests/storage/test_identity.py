"""An experiment that is open stays the one that was opened, or says that it is gone; never does it show another."""

from __future__ import annotations

import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zarr

import trajstore as ts
from tests.conftest import SMALL_NET, Record
from trajstore.errors import OutdatedError
from trajstore.exchange.merge import merge, remove
from trajstore.reading import origin
from trajstore.reading.handles import open_root
from trajstore.reading.verify import verify
from trajstore.storage.places import expected, identity, requests
from trajstore.storage.writing.declaring import set_attributes
from trajstore.store import Store

NET = {**SMALL_NET, "orders": ["forward"], "seeds": [0], "steps": 6}
OTHER = {"operator": {"family": "sgd", "lr": 0.1}}


class Open:
    """An experiment, and what is open of it."""

    def __init__(self, stored: ts.StoredExperiment) -> None:
        self.store = Store(str(stored.store.place.address))
        self.experiment = self.store["net"]
        self.ds = self.experiment.dataset()
        self.plain = xr.open_dataset(stored.store.place.address, engine="trajstore", group="net")
        self.pickled = pickle.dumps(self.ds)


READING: dict[str, Callable[[Open], Any]] = {
    "the commit records": lambda o: o.experiment.commits(),
    "how far its slabs are": lambda o: o.experiment.slabs(),
    "a state": lambda o: o.experiment.arrays(order="forward", seed=0, step=3),
    "a state dict": lambda o: o.experiment.state_dict(order="forward", seed=0, step=3),
    "its states as a dataset": lambda o: o.ds.params.values,
    "a metric as a dataset": lambda o: o.ds.train_loss.values,
    "a metric of xarray's engine": lambda o: o.plain.train_loss.values,
    "states of xarray's engine": lambda o: o.plain.params[0, 0, :, 2].values,
    "states through a copy": lambda o: pickle.loads(o.pickled).params.values,
    "a metric through a copy": lambda o: pickle.loads(o.pickled).train_loss.values,
    "another dataset of it": lambda o: o.experiment.dataset(),
    "a state of its dataset": lambda o: o.ds.traj.state_dict(order="forward", seed=0, step=3),
}


def again(stored: ts.StoredExperiment, **changes: Any) -> ts.StoredExperiment:
    remove(stored.store, "net")
    return ts.run(ts.Experiment.of({**NET, **changes}), Path(stored.store.place.address))


@pytest.mark.parametrize("what", ["another, of other numbers", "the same again"])
def test_what_is_open_of_an_experiment_never_shows_the_next_one_of_its_name(record: Record, what: str) -> None:
    opened = Open(stored := record(NET))
    was = opened.ds.train_loss.values.copy()
    after = again(stored, **(OTHER if what.startswith("another") else {}))
    identity._confirmed.clear()  # as in a process that has seen nothing of it yet
    told = r"experiment 'net' in .*runs\.zarr is another one than was opened: .*open it again, with trajstore\.open"
    for name, read in READING.items():
        with pytest.raises(OutdatedError, match=told):
            pytest.fail(f"{name} was read: {read(opened)}")
    assert np.array_equal(after.dataset().train_loss.values, was) == (what == "the same again")
    assert opened.store["net"].commits().complete.all(), "opened again by the same store, it is the new one"


def test_without_looking_it_would_show_the_numbers_of_the_next_one(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above injects is what it is to be guarded against."""
    opened = Open(stored := record(NET))
    was = opened.ds.train_loss.values.copy()
    monkeypatch.setattr(expected, "refuse_another", lambda *_: None)
    again(stored, **OTHER)
    for name, read in READING.items():
        assert read(opened) is not None, name
    assert not np.array_equal(opened.ds.train_loss.values, was)


def test_what_is_open_of_an_experiment_that_is_removed_says_so(record: Record) -> None:
    opened = Open(stored := record(NET))
    remove(stored.store, "net")
    for name, read in READING.items():
        with pytest.raises(OutdatedError, match=r"'net' is not in .*runs\.zarr any more, .*removed or moved"):
            pytest.fail(f"{name} was read: {read(opened)}")


@pytest.mark.slow
def test_workers_of_dask_see_it_too(record: Record) -> None:
    import dask

    opened = Open(stored := record(NET))
    again(stored, **OTHER)
    with (
        dask.config.set(scheduler="processes", num_workers=1),
        pytest.raises(OutdatedError, match="another one"),
    ):
        opened.ds.params.compute()


def test_a_relation_of_sql_never_shows_the_next_one(record: Record) -> None:
    stored = record(NET)
    asked = "SELECT train_loss FROM metrics ORDER BY step"
    was, relation = Store(stored.store.place).sql(asked).fetchall(), Store(stored.store.place).sql(asked)
    again(stored, **OTHER)
    assert relation.fetchall() == was, "what it was when it was asked"
    assert Store(stored.store.place).sql(asked).fetchall() != was


def test_an_experiment_that_grows_or_is_being_recorded_or_repaired_stays_itself(tmp_path: Path) -> None:
    with ts.record(tmp_path / "s.zarr", "net", torch.nn.Linear(2, 1), steps=4) as rec:
        rec.step(loss=1.0)
        opened = ts.open(tmp_path / "s.zarr")["net"]
        given = opened.attributes["id"]
        rec.step(loss=2.0, new=3.0)
        rec.log(0, later=1.0)
        assert opened.slabs()[0].last_step >= -1
    assert opened.slabs()[0].last_step == 2
    (tmp_path / "s.zarr/net/params/c/0/0/0/0").write_bytes(b"x")
    assert [found for found in verify(ts.Store(tmp_path / "s.zarr"), repair=True) if found.repaired]
    opened.commits()
    with ts.record(tmp_path / "s.zarr", "net", torch.nn.Linear(2, 1), seed=1, steps=9) as rec:
        rec.step(loss=1.0)
    opened.commits()
    assert ts.open(tmp_path / "s.zarr")["net"].attributes["id"] == given


def test_a_copy_in_its_place_is_the_same_experiment(record: Record, tmp_path: Path) -> None:
    opened = Open(stored := record(NET))
    was, store = opened.ds.train_loss.values, Path(stored.store.place.address)
    shutil.copytree(store, tmp_path / "copy")
    shutil.rmtree(store)
    shutil.copytree(tmp_path / "copy", store)
    for read in READING.values():
        read(opened)
    assert np.array_equal(opened.ds.train_loss.values, was)


def without_id(store: Store, *, fills: bool = True) -> None:
    """Make an experiment as releases did that gave it no id."""
    group = open_root(store.place)["net"]
    assert isinstance(group, zarr.Group)
    stored: Any = group.attrs["trajstore"]
    kept = {key: value for key, value in stored.items() if key != "id"}
    set_attributes(group, kept | ({} if fills else {"fills": []}))


def test_one_without_an_id_is_told_by_its_recordings_and_else_by_its_configuration(record: Record) -> None:
    store = record(NET).store
    without_id(store)
    opened = store["net"]
    assert "id" not in opened.attributes
    record(NET, resume=True)
    ts.run(ts.Experiment.of({**NET, "seeds": [0, 1]}), Path(store.place.address), extend=True)
    without_id(store)
    opened.commits()
    again(opened)
    with pytest.raises(OutdatedError, match="another one"):
        opened.commits()
    without_id(store)
    opened = store["net"]
    again(opened)
    without_id(store)
    with pytest.raises(OutdatedError, match="another one"):
        opened.commits()
    without_id(store, fills=False)
    opened = store["net"]
    again(opened, **OTHER)
    without_id(store, fills=False)
    with pytest.raises(OutdatedError, match="another one"):
        opened.commits()


def test_a_file_that_was_written_of_another_one_is_not_looked_up_in_it(record: Record, tmp_path: Path) -> None:
    stored = record(NET)
    ds = stored.dataset()[["train_loss"]]
    text = str(ds.attrs[origin.ORIGIN])
    assert origin.attributes_of(ds.assign_attrs({origin.ORIGIN: text}))["config"] == stored.config
    again(stored)
    assert origin.attributes_of(ds.assign_attrs({origin.ORIGIN: text})) == {}


@pytest.fixture
def in_a_bucket(record: Record, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ts.StoredExperiment:
    """An experiment in an object store, as one that is elsewhere."""
    address = f"memory://{tmp_path.name}/s.zarr"
    merge(record(NET).store, Store(address))
    monkeypatch.setattr(Store(address).place, "asks", True)
    monkeypatch.setattr(Store(address).place, "only_here", False)
    return Store(address)["net"]


def test_in_a_bucket_it_is_seen_too(
    in_a_bucket: ts.StoredExperiment, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_SURE", 0.0)
    ds, store = in_a_bucket.dataset(), in_a_bucket.store
    ds.train_loss.load()
    ds = in_a_bucket.dataset()
    remove(store, "net")
    with pytest.raises(OutdatedError, match="is not in memory://"):
        ds.params.load()
    merge(record(NET, resume=True).store, store)
    for read in (lambda: ds.params.load(), lambda: ds.train_loss.load(), in_a_bucket.commits):
        with pytest.raises(OutdatedError, match="is another one"):
            read()


def test_in_a_bucket_looking_costs_no_request_a_chunk(
    in_a_bucket: ts.StoredExperiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Counter[str] = Counter()

    def counted(name: str) -> None:
        original = getattr(requests, name)

        def call(store: object, key: str, *rest: object) -> object:
            asked[f"{name} {'document' if key == 'net/zarr.json' else 'other'}"] += 1
            return original(store, key, *rest)

        monkeypatch.setattr(requests, name, call)

    counted("head")
    counted("get")
    monkeypatch.setattr(identity, "_SURE", 3600.0)
    for _ in range(5):
        in_a_bucket.dataset().load()
    assert asked["get other"] > 50
    assert asked["get document"] + asked["head document"] <= 2
    monkeypatch.setattr(identity, "_SURE", 0.0)
    before = asked["head document"]
    in_a_bucket.commits()
    assert asked["head document"] > before, "when it is to be looked at each time, it is"


def test_the_document_is_read_again_only_when_it_has_changed(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = record(NET)
    opened = Open(stored)
    opened.ds.params.load()
    looked = []
    monkeypatch.setattr(identity, "_is_still", lambda *_: looked.append(1) or True)
    opened.experiment.dataset().params.load()
    assert not looked
    (Path(stored.store.place.address) / "net/zarr.json").touch()
    opened.experiment.dataset().params.load()
    assert len(looked) == 1
