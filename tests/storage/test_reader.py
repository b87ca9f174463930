"""What counts is read with as much memory as it takes, and refused only where that is more than there is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

import trajstore as ts
from tests.storage.test_writer import LAYOUT
from tests.tools.hostile import config_of
from trajstore.errors import FormatError
from trajstore.reading.handles import open_root
from trajstore.storage.format.checking import checked_schema
from trajstore.storage.format.commits import Commits
from trajstore.storage.format.layout import Entry, Layout
from trajstore.storage.format.schema import Schema
from trajstore.storage.writing.declaring import declare
from trajstore.storage.writing.pipeline import Pipeline
from trajstore.storage.writing.segment import Observation
from trajstore.storage.writing.slab_writer import Ledger, SlabWriter

STEPS = 2_000
SEEDS = tuple(range(40))
SCHEMA = Schema(
    orders=("forward", "backward"), seeds=SEEDS, init_seeds=SEEDS, data_seeds=SEEDS, steps=STEPS,
    snapshots=(0, 1_000, STEPS), layout=LAYOUT, metrics={"a": None}, components=4, parameters=5, batch_size=0,
    codec="pcodec", snapshots_per_segment=5,
)  # fmt: skip
OPENS, COUNTS = 32 * (STEPS + 1) + 36 * 3, 80 * (2 * (STEPS + 1) + 8 * 7)
"""Bytes that opening it takes at once, and knowing what counts in all of it."""


def declared(folder: Path, schema: Schema) -> tuple[ts.Store, zarr.Group]:
    config = config_of(schema) | {"name": "e"}
    return ts.Store(folder), declare(open_root(folder), "e", schema, config, [])


def test_a_store_of_many_slabs_opens_where_there_is_memory_for_what_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, group = declared(tmp_path / "s.zarr", SCHEMA)
    series = 8 * 80 * (STEPS + 1)
    assert OPENS < COUNTS < series / 3, "not even the legs of all its slabs are held at once"
    monkeypatch.setattr("trajstore.storage.format.checking.most_bytes", lambda: COUNTS)
    assert not store["e"].commits().steps.any()
    assert store["e"].dataset().sizes["seed"] == 40
    monkeypatch.setattr("trajstore.storage.format.checking.most_bytes", lambda: OPENS)
    assert store["e"].schema == replace(SCHEMA, made_by=store["e"].schema.made_by)
    assert Ledger(group, SCHEMA, 1, 39).last_step == -1, "a slab is written and verified by itself"
    with pytest.raises(FormatError, match=r"experiment 'e': to find out what counts of 80 slabs of 2,000 steps would"):
        store["e"].commits()
    monkeypatch.setattr("trajstore.storage.format.checking.most_bytes", lambda: OPENS - 1)
    with pytest.raises(FormatError, match="2,000 steps with 3 states would take"):
        store["e"]


def test_states_of_any_size_are_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred gigabytes of states, of a network of 25 million parameters, on a machine with one."""
    layout = Layout.of([Entry("w", "parameter", (25_000_000,), "float32")], {})
    large = replace(
        SCHEMA, layout=layout, snapshots=tuple(range(0, STEPS, 2)), snapshots_per_segment=2, parameters=25_000_000
    )
    assert 4 * 25_000_000 * len(large.snapshots) >= 100 * 10**9
    monkeypatch.setattr("trajstore.storage.format.checking.most_bytes", lambda: 10**9 // 2)
    checked_schema(large.to_json())
    assert Schema.from_json(large.to_json()) == large


@pytest.mark.parametrize("together", [1, 3, 10**6])
def test_what_counts_does_not_depend_on_how_many_slabs_are_read_at_a_time(
    together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps and states that count, told from those written after the last commit, slab by slab."""
    schema = replace(SCHEMA, seeds=(0, 1, 2, 3), init_seeds=(0,) * 4, data_seeds=(0, 1, 2, 3), steps=6,
                     snapshots=(0, 2, 4, 6), snapshots_per_segment=2)  # fmt: skip
    store, group = declared(tmp_path / "s.zarr", schema)
    ends = {(0, 0): 6, (0, 2): 3, (1, 1): 4, (1, 3): 0}
    for corner, last in ends.items():
        pipeline = Pipeline()
        slab = SlabWriter(Ledger(group, schema, *corner), pipeline)
        for n in range(last + 1):
            state = (np.full(5, n, np.float32), np.array([n])) if n % 2 == 0 else None
            slab.append(Observation(n, 0, {"a": float(n)}, np.zeros(4), state))
        slab.commit()
        pipeline.close()
    legs = group["leg"]
    assert isinstance(legs, zarr.Array)
    legs[0, 1, :3] = 0  # written, and not committed
    legs[0, 2, 4] = 0
    monkeypatch.setattr("trajstore.storage.format.commits._AT_ONCE", 8 * 7 * together)
    commits = Commits.of(group, schema)
    for i, k in np.ndindex(2, 4):
        last = ends.get((i, k), -1)
        assert commits.steps[i, k].tolist() == [n <= last for n in range(7)]
        assert commits.snapshots[i, k].tolist() == [n <= last for n in schema.snapshots]
        alone = Commits.of(group, schema, (i, k))
        assert alone.steps.tolist() == [[commits.steps[i, k].tolist()]]
        assert alone.snapshots.tolist() == [[commits.snapshots[i, k].tolist()]]
    assert commits.last_step.tolist() == [[6, -1, 3, -1], [-1, 4, -1, 0]]
    assert commits.complete.tolist() == [[True, False, False, False], [False] * 4]
    assert [slab.recorded for slab in store["e"].slabs()] == [7, 0, 4, 0, 0, 5, 0, 1]
