"""Whatever is done to a slab in whatever order, it holds what a plain dictionary says."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.tools.hostile import config_of
from trajstore.errors import BusyError, ConflictError
from trajstore.reading.handles import open_root
from trajstore.reading.verify import verify
from trajstore.storage.format.commits import Commits
from trajstore.storage.format.layout import Entry, Layout
from trajstore.storage.format.schema import Schema
from trajstore.storage.writing.declaring import declare, grow
from trajstore.storage.writing.pipeline import Pipeline
from trajstore.storage.writing.segment import Observation, array_of
from trajstore.storage.writing.slab_writer import Ledger, SlabWriter
from trajstore.store import Store

LAYOUT = Layout.of([Entry("w", "parameter", (3,), "float32"), Entry("position", "position", (), "int64")], {})
EVERY = 3


def schema_with(steps: int, seeds: int) -> Schema:
    return Schema(
        orders=("forward",), seeds=tuple(range(seeds)), init_seeds=tuple(range(seeds)), data_seeds=tuple(range(seeds)),
        steps=steps, snapshots=tuple(n for n in range(steps + 1) if n % EVERY == 0), layout=LAYOUT,
        metrics={"a": None, "b": None}, components=2, parameters=3, batch_size=0, codec="pcodec",
        snapshots_per_segment=3,
    )  # fmt: skip


def content(step: int):
    rng = np.random.default_rng(step)
    metrics = {"a": float(rng.standard_normal())} | ({"b": float(step)} if step % 2 else {})
    state = (rng.standard_normal(3).astype(np.float32), np.array([step])) if step % EVERY == 0 else None
    return metrics, rng.standard_normal(2), state


class Slabs(RuleBasedStateMachine):
    """One experiment; at most one slab is being written at a time."""

    @initialize()
    def begin(self):
        self.folder = Path(tempfile.mkdtemp())
        self.store = Store(self.folder / "s.zarr")
        self.schema = schema_with(20, 1)
        self.root = open_root(self.store.place, "none")
        declare(self.root, "e", self.schema, config_of(self.schema), [])
        self.committed: dict[int, list[int]] = {0: []}
        """The model: seed → steps that count."""
        self.writing: int | None = None
        self.pending: list[int] = []
        self.held = ExitStack()

    @property
    def group(self) -> zarr.Group:
        group = zarr.open_group(self.root.store, path="e", mode="r+", zarr_format=3)
        assert isinstance(group, zarr.Group)
        return group

    def lock_of(self, seed: int):
        return self.store["e"].locked("forward", seed)

    @precondition(lambda self: self.writing is None)
    @rule(pick=st.integers(0, 5))
    def open_a_slab(self, pick):
        self.writing = pick % len(self.committed)
        self.held.enter_context(self.lock_of(self.writing))
        self.pipeline = Pipeline()
        self.slab = SlabWriter(Ledger(self.group, self.schema, 0, self.writing), self.pipeline)
        self.pending = []

    @precondition(lambda self: self.writing is not None)
    @rule(gap=st.integers(1, 5), count=st.integers(1, 8))
    def record(self, gap, count):
        step = self.slab.last + gap
        for n in range(step, min(step + count, self.schema.steps + 1)):
            self.slab.append(Observation(n, 0, *content(n)))
            self.pending.append(n)
        self._what_full_segments_committed()

    def _what_full_segments_committed(self):
        """A segment that was left is committed without being asked."""
        if self.pending:
            self.pipeline.drain()
            present = self.schema.segment_of(self.pending[-1])
            done = [n for n in self.pending if self.schema.segment_of(n) < present]
            self._commit(done)

    def _commit(self, steps):
        self.committed[self.writing] += steps
        self.pending = [n for n in self.pending if n not in steps]

    @precondition(lambda self: self.writing is not None)
    @rule()
    def flush(self):
        self.slab.commit()
        self.pipeline.drain()
        self._commit(list(self.pending))

    @precondition(lambda self: self.writing is not None)
    @rule()
    def close(self):
        self.flush()
        self._end()

    @precondition(lambda self: self.writing is not None)
    @rule(chunks=st.booleans(), series=st.booleans())
    def crash(self, chunks, series):
        """Whatever was not committed is lost; some of it may be on the disk."""
        segment = self.slab._segment
        if segment is not None and self.pending:
            cut = segment.cut()
            if chunks:
                for block in cut.blocks():
                    block()
            if series:
                for name, values in (written := cut.written()).series.items():
                    self.slab.ledger._series[name].put(written.steps, values)
        self._end()

    def _end(self):
        self.pipeline.close()
        self.held.close()
        self.writing, self.pending = None, []

    @precondition(lambda self: self.writing is not None)
    @rule()
    def a_second_writer_is_refused(self):
        with pytest.raises(BusyError), self.lock_of(self.writing):
            pass

    @precondition(lambda self: self.writing is not None and self.committed[self.writing])
    @rule(pick=st.integers(0, 50), other=st.booleans())
    def write_again(self, pick, other):
        steps = self.committed[self.writing]
        step = steps[pick % len(steps)]
        metrics, sketch, state = content(step)
        if other:
            with pytest.raises(ConflictError):
                self.slab.append(Observation(step, 0, {**metrics, "a": 0.5}, sketch, state))
        else:
            self.slab.append(Observation(step, 0, metrics, sketch, state))
        self._commit(list(self.pending))  # comparing reads what is stored, so everything is committed first

    @precondition(lambda self: self.writing is None and self.schema.steps < 60)
    @rule(steps=st.integers(0, 10), seeds=st.integers(0, 1))
    def extend(self, steps, seeds):
        self.schema = schema_with(self.schema.steps + steps, len(self.committed) + seeds)
        grow(self.group, self.schema, config_of(self.schema), [])
        self.committed |= {k: [] for k in range(len(self.committed), len(self.committed) + seeds)}

    @precondition(lambda self: self.writing is None)
    @rule(pick=st.integers(0, 1000), array=st.sampled_from(["params", "a", "counters", "leg", "sketch"]))
    def damage_and_repair(self, pick, array):
        files = sorted((self.store.place.path / "e" / array / "c").rglob("0/*/**/*"))
        files = [f for f in files if f.is_file()]
        if not files:
            return
        file = files[pick % len(files)]
        broken = bytearray(file.read_bytes())
        broken[pick % len(broken)] ^= 1
        file.write_bytes(broken)
        assert list(verify(self.store))
        list(verify(self.store, repair=True))
        seed, *rest = map(int, file.relative_to(self.store.place.path / "e" / array / "c" / "0").parts)
        # A chunk of states is one segment's, a chunk of a series holds all segments here.
        gone = {rest[-1]} if array in ("params", "counters") else set(range(self.schema.segments))
        self.committed[seed] = [n for n in self.committed[seed] if self.schema.segment_of(n) not in gone]

    @rule()
    def look(self):
        assert [f for f in verify(self.store) if not f.harmless] == []

    @invariant()
    def it_holds_what_the_model_says(self):
        if not hasattr(self, "folder"):
            return
        commits = Commits.of(self.group, self.schema)
        for seed, steps in self.committed.items():
            assert np.flatnonzero(commits.steps[0, seed]).tolist() == sorted(steps)
        a, params = array_of(self.group, "a"), array_of(self.group, "params")
        for seed, steps in self.committed.items():
            for n in steps[-7:]:
                metrics, _, state = content(n)
                assert a[0, seed, n] == metrics["a"]
                if state:
                    assert np.array_equal(params[0, seed, :, n // EVERY], state[0])

    def teardown(self):
        if hasattr(self, "folder"):
            if self.writing is not None:
                self._end()
            shutil.rmtree(self.folder)


Slabs.TestCase.settings = settings(
    max_examples=12, stateful_step_count=25, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
TestSlabs = Slabs.TestCase
