"""Resume: a recording that was stopped anywhere goes on to the same store, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import trajstore as ts
from tests.conftest import SMALL_NET, stop_after
from trajstore.errors import ConflictError
from trajstore.reading.handles import open_root
from trajstore.storage.places.place import TAKEN_OUT
from trajstore.storage.writing import slab_writer
from trajstore.storage.writing.segment import array_of

PLAIN = {"engine": "reference", "durability": "none"}
WAVE = {"engine": "wavefront", "lanes": 3, "durability": "none"}
ORDERS = ["forward", "backward", "forward+backward@7", "backward+backward@7", "backward/4", "backward/3?train_loss"]
WAYS = {
    "plain": {},
    "adam": {"operator": {"family": "adam", "lr": 0.01}},
    "momentum, sparse states": {
        "operator": {"family": "sgd", "lr": 0.05, "momentum": 0.9}, "record": {"snapshot_every": 5},
    },
    "every second": {"record": {"every": 2}},
}  # fmt: skip


def contents(store: Path) -> dict[str, bytes]:
    """Every chunk of the data, but for the resume states, which need not be the last two, and what was taken out."""
    return {
        str(f.relative_to(store)): f.read_bytes()
        for f in store.rglob("*")
        if f.is_file() and not {"resume", TAKEN_OUT} & {*f.parts} and f.name != "zarr.json"
    }


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    monkeypatch.setattr("trajstore.recording.schema.segment_length", lambda layout: 4)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("plain", PLAIN), ("plain", WAVE), ("adam", WAVE), ("momentum, sparse states", PLAIN), ("every second", WAVE),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in (
            ("adam", PLAIN), ("momentum, sparse states", WAVE), ("every second", PLAIN))),
    ],
    ids=lambda part: part if isinstance(part, str) else part["engine"],
)  # fmt: skip
def test_what_was_stopped_goes_on_to_the_same_bytes(tmp_path, name, how):
    experiment = ts.Experiment.of({**SMALL_NET, "steps": 14, "orders": ORDERS, **WAYS[name]})
    ts.run(experiment, tmp_path / "whole.zarr", **how)
    whole = contents(tmp_path / "whole.zarr")
    for stop in (40, 150):
        place = tmp_path / f"{stop}.zarr"
        with pytest.raises(KeyboardInterrupt):
            ts.run(experiment, place, progress=stop_after(stop), **how)
        begun = [slab.last_step for slab in ts.open(place)["net"].slabs()]
        assert max(begun) > -1
        ts.run(experiment, place, resume=True, **how)
        assert contents(place) == whole


def test_a_forward_leg_goes_on_from_its_last_commit(tmp_path):
    experiment = ts.Experiment.of({**SMALL_NET, "steps": 30, "orders": ["forward"], "seeds": [0]})
    with pytest.raises(KeyboardInterrupt):
        ts.run(experiment, tmp_path / "s.zarr", progress=stop_after(20), **PLAIN)
    (begun,) = ts.open(tmp_path / "s.zarr")["net"].slabs()
    done = 0

    def count(more: int, where: str) -> None:
        nonlocal done
        done += more

    ts.run(experiment, tmp_path / "s.zarr", resume=True, progress=count, **PLAIN)
    assert begun.last_step == 20
    assert done == 30 - begun.last_step


def test_without_its_resume_state_a_slab_is_computed_from_the_start_and_left_as_it_is(tmp_path):
    experiment = ts.Experiment.of({**SMALL_NET, "steps": 30, "orders": ["forward", "backward"]})
    ts.run(experiment, tmp_path / "whole.zarr", **PLAIN)
    place = tmp_path / "s.zarr"
    with pytest.raises(KeyboardInterrupt):
        ts.run(experiment, place, progress=stop_after(100), **PLAIN)
    for file in (place / "net" / "resume").rglob("c/0"):
        file.write_bytes(b"damaged")
    ts.run(experiment, place, resume=True, **PLAIN)
    assert contents(place) == contents(tmp_path / "whole.zarr")


def test_holes_are_filled_and_the_rest_is_left_alone(tmp_path, monkeypatch):
    experiment = ts.Experiment.of({**SMALL_NET, "steps": 30, "orders": ["forward", "backward", "backward/8"]})
    ts.run(experiment, tmp_path / "s.zarr", **PLAIN)
    whole = contents(tmp_path / "s.zarr")
    committed = array_of(open_root(tmp_path / "s.zarr")["net"], "committed")
    for order, seed, segment in [(0, 0, 2), (1, 0, 0), (1, 1, 5), (2, 1, 3), (2, 1, 7)]:
        committed[order, seed, segment] = -1
    appended: list[int] = []
    original = slab_writer.Segment.append
    monkeypatch.setattr(slab_writer.Segment, "append", lambda self, *a: (appended.append(a[0]), original(self, *a))[1])
    ts.run(experiment, tmp_path / "s.zarr", resume=True, **PLAIN)
    assert contents(tmp_path / "s.zarr") == whole
    assert len(appended) == 4 * 4 + 3  # the last segment has three steps


def test_extending_adds_orders_seeds_and_steps(tmp_path):
    base = {**SMALL_NET, "record": {"every": 4}}
    how = {**WAVE, "extend": True}
    first = ts.Experiment.of({**base, "steps": 14, "orders": ["backward"], "seeds": [3]})
    ts.run(first, tmp_path / "s.zarr", **how)
    before = ts.open(tmp_path / "s.zarr")["net"].dataset().load()
    more = ts.Experiment.of({**base, "steps": 30, "orders": ["forward", "backward"], "seeds": [1, 3]})
    stored = ts.run(more, tmp_path / "s.zarr", **how)
    assert stored.schema.orders == ("backward", "forward")
    assert stored.schema.seeds == (3, 1)
    assert stored.schema.snapshots == (0, 4, 8, 12, 14, 16, 20, 24, 28, 30)  # 14 was the last step once
    assert all(slab.complete for slab in stored.slabs())
    now = stored.dataset().load()
    at_once = ts.run(more, tmp_path / "other.zarr", **WAVE).dataset().load()
    shared = [n for n in range(31) if n in at_once.snapshot]
    for name in ("params", "train_loss", "counters", "sketch"):
        dim = "step" if "step" in now[name].dims else "snapshot"
        old = {"order": before.order, "seed": before.seed, dim: before[dim]}
        assert np.array_equal(now[name].sel(old), before[name], equal_nan=True)
        new = {"order": at_once.order, "seed": at_once.seed, dim: shared}
        assert np.array_equal(now[name].sel(new), at_once[name].sel({dim: shared}), equal_nan=True)
    with pytest.raises(ConflictError, match=r"differs in operator\.lr"):
        ts.run(
            ts.Experiment.of({**base, "steps": 30, "operator": {"family": "sgd", "lr": 1}}), tmp_path / "s.zarr", **how
        )
    with pytest.raises(ValueError, match="has 30 steps already; an experiment never shrinks"):
        ts.run(first, tmp_path / "s.zarr", **how)


def test_workers_fill_only_what_is_missing(tmp_path):
    experiment = ts.Experiment.of({**SMALL_NET, "steps": 30, "orders": ["forward", "backward", "backward/8"]})
    how = WAVE
    ts.run(experiment, tmp_path / "whole.zarr", **how)
    place = tmp_path / "s.zarr"
    with pytest.raises(KeyboardInterrupt):
        ts.run(experiment, place, progress=stop_after(700), workers=0, **how)
    states = {f: f.stat().st_mtime_ns for f in place.rglob("c/1/0/0/0") if "params" in f.parts}
    ts.run(experiment, place, resume=True, workers=1, **how)
    assert states
    assert {f: f.stat().st_mtime_ns for f in states} == states
    assert contents(place) == contents(tmp_path / "whole.zarr")
