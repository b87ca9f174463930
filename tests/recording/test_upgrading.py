"""What was stored before a field existed goes on, is replayed and merged as if it had been given its default."""

from __future__ import annotations

from pathlib import Path

import pytest

import trajstore as ts
from tests.conftest import SMALL_NET
from trajstore.errors import ConflictError
from trajstore.exchange.merge import merge
from trajstore.reading.handles import open_root
from trajstore.replay.compare import replay
from trajstore.storage.writing.declaring import ATTRIBUTE, set_attributes

IMAGES = {"family": "shapes", "train": 12, "test": 4, "size": 8}
MLP = {"family": "mlp", "width": 4, "depth": 1, "batch_size": 2, "images": IMAGES}
TABLE = {"name": "net", "problem": MLP, "operator": {"family": "sgd", "lr": 0.1}, "steps": 4, "seeds": [0]}
LATER = (("problem", "init"), ("problem", "images", "channels"), ("operator", "momentum"), ("record", "tolerance"))


def older(place: Path, table=TABLE, without=LATER) -> ts.StoredExperiment:
    """Record an experiment, and take some fields out of what is stored of its configuration."""
    ts.run(ts.Experiment.of(table), place, engine="reference", durability="none")
    group = open_root(place)["net"]
    attributes = group.attrs[ATTRIBUTE]
    for *path, field in without:
        at = attributes["config"]
        for part in path:
            at = at[part]
        del at[field]
    set_attributes(group, attributes)
    return ts.open(place)["net"]


def test_it_goes_on(tmp_path):
    stored = older(tmp_path / "s.zarr")
    assert "init" not in stored.config["problem"]
    ts.run(ts.Experiment.of(TABLE), tmp_path / "s.zarr", resume=True)
    grown = ts.run(ts.Experiment.of({**TABLE, "seeds": [1]}), tmp_path / "s.zarr", extend=True)
    assert grown.schema.seeds == (0, 1)
    with pytest.raises(ConflictError, match=r"problem\.init: 'torch' / 'he'"):
        ts.run(ts.Experiment.of({**TABLE, "problem": {**MLP, "init": "he"}}), tmp_path / "s.zarr", resume=True)


def test_it_is_replayed(tmp_path):
    assert [slab.differs_from for slab in replay(older(tmp_path / "s.zarr"))] == [None, None]


@pytest.mark.parametrize("newer_into_older", [True, False])
def test_it_is_merged(tmp_path, newer_into_older):
    old = older(tmp_path / "old.zarr").store
    ts.run(ts.Experiment.of({**TABLE, "seeds": [1]}), tmp_path / "new.zarr")
    new = ts.open(tmp_path / "new.zarr")
    merge(*((new, old) if newer_into_older else (old, new)))
    assert set((old if newer_into_older else new)["net"].schema.seeds) == {0, 1}


def test_a_field_that_always_was_there_is_missed(tmp_path):
    """A configuration without what has no default is no older one."""
    older(tmp_path / "s.zarr", SMALL_NET, [("operator", "lr")])
    with pytest.raises(ConflictError, match=r"operator\.lr: None / "):
        ts.run(ts.Experiment.of(SMALL_NET), tmp_path / "s.zarr", resume=True)
