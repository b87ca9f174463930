"""Every version of trajstore reads every store that an earlier one wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import trajstore as ts
from tests.golden.make import HERE, TINY, Tied, summary
from trajstore.reading.verify import verify
from trajstore.replay.compare import replay
from trajstore.storage.format.schema import APART


@pytest.fixture(params=range(1, APART + 1))
def golden(request, tmp_path) -> tuple[ts.Store, dict]:
    shutil.unpack_archive(HERE / f"v{request.param}.zip", tmp_path)
    return ts.open(tmp_path / "golden.zarr"), json.loads((HERE / f"v{request.param}.json").read_text())


def test_it_holds_what_it_held(golden):
    store, expected = golden
    assert summary(store) == expected


def test_it_is_sound_and_asked_in_sql(golden):
    store, expected = golden
    assert list(verify(store)) == []
    rows = dict(store.sql("SELECT experiment, count(*) FROM metrics GROUP BY ALL").fetchall())
    assert rows == {name: sum(slab[3] for slab in told["slabs"]) for name, told in expected.items()}
    ((count,),) = store.sql("SELECT count(sharpness) FROM metrics WHERE experiment = 'loop'").fetchall()
    assert count == 5


def test_its_states_load_into_modules(golden):
    store, _ = golden
    model = Tied().bfloat16()
    model.load_state_dict(store["loop"].state_dict(order="forward", seed=7, step=9), strict=True)
    assert model.norm.num_batches_tracked == 9
    assert model.first.weight is model.second.weight
    assert model.first.weight.dtype == torch.bfloat16


def test_it_goes_on(golden, tmp_path: Path):
    """A format that can be read but not written would be half a promise."""
    store, _ = golden
    longer = ts.Experiment.of({**TINY, "steps": 17, "seeds": [1, 3, 5]})
    stored = ts.run(longer, store.place, engine="reference", extend=True)
    assert all(slab.complete for slab in stored.slabs())
    assert list(verify(store)) == []
    told = list(replay(stored))
    assert len(told) == 6
    # On the machine that made it, nothing differs; elsewhere the last bits may.
    assert max(slab.off for slab in told) < 1e-4


def test_who_recorded_it_is_told_wherever_that_lies(golden):
    store, expected = golden
    for name in expected:
        stored = store[name]
        assert stored.document["format"] == (APART if name == "often" else 1)
        assert [fill["ended"] is not None for fill in stored.fills] == [True] * (
            35 if name == "often" else len(stored.fills)
        )
        assert {(order, seed) for fill in stored.fills for order, seed in fill["slabs"]} == {
            (order, seed) for order, seed, *_ in expected[name]["slabs"]
        }
