"""Eight processes record into one experiment at once, while a ninth reads: nobody meets an error or a half-truth."""

from __future__ import annotations

import os
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore as ts
from tests.tools.torture import (
    NAME,
    NET,
    REFERENCE,
    TINY,
    Truth,
    Variant,
    files,
    in_child,
    record,
    recorded,
    side_by_side,
    start,
    wrong,
)
from tests.tools.waiting import HANGS, until
from trajstore.errors import BusyError, NotFoundError
from trajstore.reading.handles import check_place
from trajstore.reading.verify import verify
from trajstore.storage.writing.slab_writer import Ledger

SEEDS = [5, 0, 7, 2, 1, 6, 3, 4]
EXTENDING = {**REFERENCE, "extend": True}
GROWING = Variant({**NET, "orders": ["forward", "backward"], "steps": 6}, EXTENDING, commit_steps=3)


def of_seed(seed: int) -> Variant:
    return replace(GROWING, table={**GROWING.table, "seeds": [seed]})


def record_at(variant: Variant, place: Path, moment: float, seen: Path) -> None:
    """Record; begin with others, and after the first commit wait until a reader has seen a slab half recorded."""
    original = Ledger.adopt

    def adopt(self: Ledger, *args: Any) -> None:
        original(self, *args)
        while not seen.exists() and time.time() < moment + HANGS / 2:
            time.sleep(0.01)

    Ledger.adopt = adopt
    time.sleep(max(0, moment - time.time()))
    record(variant, place)


def read_until(place: Path, truth: Truth, seen: Path, over: Path) -> tuple[int, list[str]]:
    """Read again and again; return how often, and what was wrong."""
    reads, problems, last = 0, [], False
    while not last and len(problems) < 10:
        last = over.exists()
        try:
            stored = ts.open(place)[NAME]
            ds, slabs = stored.dataset().load(), stored.slabs()
            problems += compared(ds, truth) + wrong(place, truth)
        except NotFoundError:
            continue
        except Exception as error:
            problems.append(f"a reader met {error!r}")
            continue
        reads += 1
        if any(0 < slab.recorded < stored.schema.steps + 1 for slab in slabs):
            seen.touch()
        problems += [f"{slab} is not complete" for slab in slabs if last and not slab.complete]
    return reads, problems


def compared(ds, truth: Truth) -> list[str]:
    """Return what a dataset shows that is not the truth: committed values that differ, others that are there."""
    problems = []
    for order in ds["order"].values:
        for seed in ds["seed"].values:
            slab = ds.sel(order=order, seed=seed)
            for name, (dim, expected) in truth.slabs[str(order), int(seed)].items():
                axis = 0 if dim == "step" else 1
                mask = slab["recorded" if dim == "step" else "stored"].values
                shown = slab[name].transpose(*(["step", ...] if axis == 0 else [..., "snapshot"])).values
                at, rest = np.flatnonzero(mask), shown.take(np.flatnonzero(~mask), axis)
                nothing = {"leg": -1, "counters": -1, "measured": 0}.get(name, np.nan)
                if shown.take(at, axis).tobytes() != expected.take(at, axis).tobytes():
                    problems.append(f"{order}, {seed}: {name} is shown otherwise than it was committed")
                if not np.array_equal(rest, np.full_like(rest, nothing), equal_nan=rest.dtype.kind == "f"):
                    problems.append(f"{order}, {seed}: {name} is shown before it is committed")
    return problems


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[int, tuple[Path, Truth]]:
    """Every seed recorded into a store of its own."""
    folder, found = tmp_path_factory.mktemp("alone"), {}

    def one(seed: int, _: int) -> None:
        place = folder / str(seed) / "s.zarr"
        found[seed] = place, in_child(recorded, of_seed(seed), place)[0]

    side_by_side(one, SEEDS)
    return found


def test_eight_processes_record_eight_seeds_while_a_ninth_reads(tmp_path, alone):
    place, seen, over = tmp_path / "s.zarr", tmp_path / "seen", tmp_path / "over"
    _, truth = alone[SEEDS[0]]
    for _, other in alone.values():
        truth.slabs |= other.slabs
        truth.records |= other.records
    reader, reading = start(read_until, place, truth, seen, over)
    moment = time.time() + 1
    writers = [(seed, *start(record_at, replace(of_seed(seed), fsync=True), place, moment, seen)) for seed in SEEDS]
    problems = []
    for seed, process, connection in writers:
        with closing(connection):
            connection.recv()
            fine, told = connection.recv() if connection.poll(HANGS) else (False, "hangs")
            process.join()
            problems += [] if fine else [f"the writer of seed {seed}: {told}"]
    over.touch()
    with closing(reading):
        reading.recv()
        fine, told = reading.recv() if reading.poll(HANGS) else (False, "hangs")
        reader.join()
    assert not problems, "\n".join(problems)
    assert fine, told
    reads, wrongs = told
    assert not wrongs, "\n".join(wrongs)
    assert reads > 1
    assert seen.exists()
    assert [str(finding) for finding in verify(ts.Store(place))] == []
    seeds = ts.open(place)[NAME].schema.seeds
    assert sorted(seeds) == sorted(SEEDS)
    whole = files(place)
    for position, seed in enumerate(seeds):
        assert of_position(whole, position) == of_position(files(alone[seed][0]), 0), seed


@pytest.mark.parametrize("what", ["begins", "grows"])
def test_at_every_moment_of_a_declaration_others_find_something_whole(tmp_path, what):
    """The same with nothing left to chance: others look before each rename."""
    bigger = Variant({**TINY, "steps": 4, "seeds": [3, 1], "orders": ["backward", "forward"]}, EXTENDING, segment=3)
    smaller = Variant({**TINY, "steps": 2, "seeds": [3], "orders": ["backward"]}, EXTENDING, segment=3)
    begun = [smaller] if what == "grows" else []
    for variant in [*begun, bigger]:
        truth, _ = in_child(recorded, variant, tmp_path / "whole" / "s.zarr")
    place = tmp_path / "s.zarr"
    for variant in begun:
        in_child(record, variant, place)
    looks, problems = in_child(looked_at_before_every_rename, bigger, place, truth)
    assert looks > 30
    assert not problems, "\n".join([f"{len(problems)} problems, the first of them:", *problems[:20]])


def looked_at_before_every_rename(variant: Variant, place: Path, truth: Truth) -> tuple[int, list[str]]:
    """Record; before each file of the declaration takes its name look at the store, to read it and to write to it."""
    earlier = [ts.open(place)[NAME]] if place.exists() else []
    rename, problems, looks, over = os.replace, [], 0, False

    def look(where: str) -> None:
        try:
            check_place(ts.Store(place))  # what a recording begins with
        except Exception as error:
            problems.append(f"{where}: another writer met {error!r}")
        try:
            problems.extend(f"{where}: {finding}" for finding in verify(ts.Store(place)) if not finding.harmless)
        except NotFoundError:
            problems.extend([f"{where}: verify did not find the store"] if earlier else [])
        except Exception as error:
            problems.append(f"{where}: verify met {error!r}")
        try:
            stored = earlier[0] if earlier and looks % 2 else ts.open(place)[NAME]
            found = [*compared(stored.dataset().load(), truth), *wrong(place, truth)]
            stored.slabs()
            problems.extend(f"{where}: {problem}" for problem in found)
        except NotFoundError:
            problems.extend([f"{where}: a reader did not find the experiment"] if earlier else [])
        except Exception as error:
            problems.append(f"{where}: a reader met {error!r}")

    def replace(source: Path, target: Path) -> None:
        nonlocal looks, over
        over = over or "/params/c/" in str(target)
        if not over and Path(target).is_relative_to(place):
            looks += 1
            look(f"before {Path(target).relative_to(place)}")
        rename(source, target)

    os.replace = replace
    record(variant, place)
    return looks, problems


def of_position(whole: dict[str, bytes], position: int) -> dict[str, bytes]:
    """Return the chunks of one seed, with the position left out of their names."""
    found = {}
    for path, content in whole.items():
        parts = path.split("/")  # experiment, array, "c", and the chunk's place
        axis = 3 if "batch_index" in parts else 4
        if len(parts) > 5 and parts[axis] == str(position):
            found[*parts[:axis], *parts[axis + 1 :]] = content
    return found


def hold(table: dict, place: Path, begun: Path, release: Path) -> None:
    """Record, and stop in the middle until there is a file."""

    def tell(done: int, where: str) -> None:
        begun.touch()
        until(release.exists, "the other writer was refused")

    ts.run(ts.Experiment.of(table), place, progress=tell, **REFERENCE)


def test_a_second_writer_of_a_slab_is_told_who_holds_it(tmp_path):
    table, place = {**GROWING.table, "seeds": [3]}, tmp_path / "s.zarr"
    holder, connection = start(hold, table, place, tmp_path / "begun", tmp_path / "release")
    with closing(connection):
        connection.recv()
        until((tmp_path / "begun").exists, "recording begins")
        message = rf"order 'forward', seed 3 is being written by process {holder.pid} on .* since"
        with pytest.raises(BusyError, match=message):
            ts.run(ts.Experiment.of(table), place, resume=True, **REFERENCE)
        ts.run(ts.Experiment.of({**table, "seeds": [4]}), place, extend=True, **REFERENCE)  # nobody holds these
        (tmp_path / "release").touch()
        assert connection.recv() == (True, None)
        holder.join()
    assert all(slab.complete for slab in ts.open(place)[NAME].slabs())
