"""What is done with stores, to be disturbed at any moment; and whether, after that, everything is as it should be."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import trajstore as ts
from tests.conftest import stop_after
from tests.storage.test_missing_files import Answer, asked, dataset, merged, parquet, plain, states
from tests.tools.torture import NAME, REFERENCE, TINY, Truth, files, lost, wrong
from trajstore.errors import ResumedWarning, TrajstoreError
from trajstore.exchange.export import export_state
from trajstore.exchange.merge import merge, remove
from trajstore.reading.handles import open_root, standing
from trajstore.reading.verify import verify
from trajstore.recording.fills import noted
from trajstore.storage.places.folder import Folder
from trajstore.storage.places.place import DOCUMENT, TAKEN_OUT
from trajstore.storage.writing.late_metrics import LateSeries
from trajstore.store import StoredExperiment

SHORT = {**TINY, "steps": 5, "seeds": [0]}
LONG = {**SHORT, "steps": 7}
JUDGED = {**SHORT, "steps": 48}
"""Of enough steps for a verdict."""
HOW = {**REFERENCE, "durability": "none"}
KEPT = "params", "committed"
"""Arrays of whose files a repair keeps what it takes out."""
NOTED = 32
"""Fills in a document, so that the next one moves them out of it."""


# What is done -----------------------------------------------------------------------------------------------------


class Doing(NamedTuple):
    """Something that is done in a folder with stores."""

    do: Callable[[Path], object]
    writes: str = ""
    """Which of the stores it changes."""
    ends: str = ""
    """The store that has everything that this one is to have in the end; where there is none, nothing."""
    reads: str = ""
    """Which of them it only reads."""
    damage: str = ""
    """The chunk that is damaged in the store that it changes: what is committed in that one may be taken out."""

    @property
    def stores(self) -> list[str]:
        """Those that it needs."""
        return [name for name in (self.writes, self.reads) if name]


def reading(do: Callable[[Path], object], store: str = "whole.zarr") -> Doing:
    """Return what only reads."""
    return Doing(do, reads=store)


def program(*arguments: str) -> Callable[[Path], Answer]:
    """Return what runs the program, and what it answers."""

    def run(folder: Path) -> Answer:
        from trajstore.cli.main import main

        told, said, before = io.StringIO(), io.StringIO(), sys.argv
        sys.argv = ["trajstore", *(argument.replace("{}", str(folder)) for argument in arguments)]
        try:
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(said):
                main()
        except SystemExit as ended:
            if ended.code:
                lines = said.getvalue().splitlines()
                if lines:
                    raise ProgramError("\n".join(lines)) from None
                raise ProgramError(told.getvalue().strip()) from None
        finally:
            sys.argv = before
        return {"told": told.getvalue().encode()}

    return run


class ProgramError(TrajstoreError):
    """What the program said when it ended with another code than 0."""


def state_in_a_file(folder: Path) -> Answer:
    """Not below the folder whose reads fail."""
    with tempfile.TemporaryDirectory() as elsewhere:
        to = Path(elsewhere) / "state.safetensors"
        asked = ["--order", "backward", "--seed", "0", "--step", "4"]
        program("export", "{}/whole.zarr", NAME, "-o", str(to), *asked)(folder)
        return {"state": to.read_bytes()}


def drawn(folder: Path) -> Answer:
    """Not below the folder either."""
    with tempfile.TemporaryDirectory() as elsewhere:
        to = Path(elsewhere) / "figure.png"
        program("plot", "{}/judged.zarr", NAME, "distance-matrix", "-o", str(to))(folder)
        return {"figure": to.read_bytes()}


def imported(folder: Path) -> None:
    """States that another experiment has, from checkpoints."""
    files = [str(file) for file in sorted(folder.glob("plain.zarr-files/*"))]
    program("import", "{}/plain.zarr", "imported", *files, "--pattern", "step{step}.safetensors", "--seed", "0")(folder)


def asked_again(folder: Path) -> Answer:
    """By an index that is there."""
    return asked(folder / "indexed.zarr")


def repaired(folder: Path) -> None:
    """Nothing is to be repaired, so that nothing is taken out."""
    found = list(verify(ts.Store(folder / "whole.zarr"), repair=True))
    if taken := [str(one) for one in found if one.repaired and not one.harmless]:
        raise AssertionError(f"taken out: {'; '.join(taken)}")
    if found:
        raise ProgramError(str(found[0]))


def mended(folder: Path) -> None:
    """Take out what is damaged, and record it again."""
    list(verify(ts.Store(folder / "damaged.zarr"), repair=True))
    for found in verify(ts.Store(folder / "damaged.zarr")):
        if not found.harmless:
            raise ProgramError(str(found))
    recorded(SHORT, "damaged.zarr", folder, resume=True)


def taken_over(folder: Path) -> None:
    merge(ts.open(folder / "whole.zarr"), ts.open(folder / "begun.zarr"))


def measured(folder: Path) -> None:
    from trajstore import analysis

    analysis.compute(ts.open(folder / "plain.zarr")[NAME], "gradient_norm")


def recorded(table: dict[str, Any], place: str, folder: Path, **how: Any) -> None:
    ts.run(ts.Experiment.of(table), folder / place, **HOW, **how)


def looped(place: str, seed: int, folder: Path) -> None:
    """A loop of one's own, in a store of which another experiment is all there is, or another slab."""
    import torch

    torch.manual_seed(seed)
    how: dict[str, Any] = {"seed": seed, "sketch": 4, "durability": "none", "resume": True}
    with (
        warnings.catch_warnings(action="ignore", category=ResumedWarning),
        ts.record(folder / place, "loop", torch.nn.Linear(2, 2), **how) as rec,
    ):
        for n in range(rec.last, 3):
            rec.step(n + 1, loss=1.0)


DOING = {
    "ls": reading(program("ls", "{}/whole.zarr", "--json")),
    "info": reading(program("info", "{}/whole.zarr", NAME, "--json")),
    "sql": reading(program("sql", "{}/whole.zarr", "SELECT * FROM metrics ORDER BY ALL", "--csv")),
    "sql again": reading(asked_again, "indexed.zarr"),
    "verify": reading(program("verify", "{}/whole.zarr")),
    "export a state": reading(state_in_a_file),
    "export metrics": reading(lambda folder: parquet(folder / "whole.zarr")),
    "export arrays": reading(lambda folder: plain(folder / "whole.zarr")),
    "dataset": reading(lambda folder: dataset(folder / "whole.zarr")),
    "state_dict": reading(lambda folder: states(folder / "whole.zarr")),
    "merge to elsewhere": reading(lambda folder: merged(folder / "whole.zarr")),
    "analyze": reading(program("analyze", "{}/judged.zarr", NAME, "convergence", "--json"), "judged.zarr"),
    "claims": reading(program("claims", "{}/judged.zarr", NAME, "--json"), "judged.zarr"),
    "plot": reading(drawn, "judged.zarr"),
    "verify --repair": Doing(repaired, "whole.zarr", "whole.zarr"),
    "verify --repair, and --resume": Doing(mended, "damaged.zarr", "whole.zarr", damage="params/c/1/0/0/0"),
    "merge": Doing(taken_over, "begun.zarr", "whole.zarr", "whole.zarr"),
    "record --resume": Doing(partial(recorded, SHORT, "begun.zarr", resume=True), "begun.zarr", "plain.zarr"),
    "record --extend": Doing(partial(recorded, LONG, "plain.zarr", extend=True), "plain.zarr", "long.zarr"),
    "compute": Doing(measured, "plain.zarr", "whole.zarr"),
    "record a loop": Doing(partial(looped, "plain.zarr", 0), "plain.zarr", "looped.zarr"),
    "record a loop, and move its fills": Doing(partial(looped, "noted.zarr", 1), "noted.zarr", "moved.zarr"),
    "import": Doing(imported, "plain.zarr", "imported.zarr"),
    "rm": Doing(lambda folder: remove(ts.open(folder / "whole.zarr"), NAME), "whole.zarr"),
}


def prepared(folder: Path) -> None:
    """Record what everything is done with, and what comes out where nothing is disturbed."""
    alone(folder)

    def kept(name: str, made_from: str, do: Callable[[Path], object]) -> None:
        """Keep by a name what becomes of a store."""
        shutil.copytree(folder / made_from, folder / "kept")
        do(folder)
        (folder / made_from).rename(folder / name)
        (folder / "kept").rename(folder / made_from)

    recorded(SHORT, "plain.zarr", folder)
    recorded(JUDGED, "judged.zarr", folder)
    for step in range(4):
        to = folder / "plain.zarr-files" / f"step{step}.safetensors"
        to.parent.mkdir(exist_ok=True)
        export_state(ts.open(folder / "plain.zarr")[NAME], to, order="forward", seed=0, step=step)
    with contextlib.suppress(KeyboardInterrupt):
        recorded(SHORT, "begun.zarr", folder, progress=stop_after(8))
    for name in ("record --extend", "compute", "record a loop", "import"):
        kept(DOING[name].ends, DOING[name].writes, DOING[name].do)
    shutil.copytree(folder / "looped.zarr", folder / "noted.zarr")
    stored = StoredExperiment(ts.Store(folder / "noted.zarr"), open_root(folder / "noted.zarr", "none")["loop"])
    for _ in range(NOTED - len(stored.fills)):
        with noted(stored, [("forward", 0)], {"versions": {}, "device": "cpu", "threads": 1}):
            pass
    moving = DOING["record a loop, and move its fills"]
    kept(moving.ends, moving.writes, moving.do)
    for beside in folder.glob("*.traj"):
        shutil.rmtree(beside)
    shutil.copytree(folder / "whole.zarr", folder / "damaged.zarr")
    chunk = folder / "damaged.zarr" / NAME / DOING["verify --repair, and --resume"].damage
    chunk.write_bytes(chunk.read_bytes()[:-3])
    shutil.copytree(folder / "whole.zarr", folder / "indexed.zarr")
    asked_again(folder)


def alone(folder: Path) -> None:
    """Have this process keep its cache in a folder, wait for no disk, and cut states into several chunks."""
    import trajstore.recording.schema

    trajstore.recording.schema.segment_length = lambda layout: 3
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    os.fsync = lambda descriptor: None


class Stores:
    """Copies of prepared stores, in which something is disturbed, by this process or by another."""

    def __init__(self, origin: Path, folder: Path) -> None:
        self._origin, self.folder = origin, folder / "there"
        self._truth = cache(lambda name: Truth(origin / name))

    def lay_out(self, doing: Doing) -> None:
        """Have those that something needs be as they were, and nothing else be there."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for there in (there for name in (*doing.stores, "cache") for there in self._origin.glob(f"{name}*")):
            shutil.copytree(there, self.folder / there.name)

    def wrong(self, doing: Doing) -> list[str]:
        """Return what is not as it should be after something was disturbed, and after it is done again."""
        problems = list[str]()
        if doing.reads and _contents(self.folder / doing.reads) != _contents(self._origin / doing.reads):
            problems.append("what was only to be read is changed")
        if not doing.writes:
            return problems
        place, origin = self.folder / doing.writes, self._origin / doing.writes
        if doing.damage:
            problems += self._wrong_beside(place, origin, doing.damage)
        elif list(place.rglob(TAKEN_OUT)):
            problems.append("something was taken out")
        elif doing.ends:
            problems += wrong(place, self._truth(doing.ends), _committed(origin))
        if doing.ends:
            problems += _wrong_late(place, self._origin / doing.ends, origin)
            still = dict(_fills(place))
            problems += [f"fills of {name!r} are lost" for name, ids in _fills(origin) if not ids <= still[name]]
        if not doing.damage:
            problems += [f"verify: {found}" for found in verify(ts.Store(place)) if not found.harmless]
        there = standing(Folder(place), NAME)
        if there not in ("experiment", *(() if doing.ends else ("nothing",))):
            problems.append(f"it is {there}")
        if there == "experiment":
            try:
                doing.do(self.folder)
            except Exception:
                problems.append(f"again: {traceback.format_exc(limit=-2)}")
        with ts.Store(place).declaring():
            pass  # as the next writer does, which deletes what a killed one left of what it removed
        now, expected = files(place), files(self._origin / doing.ends) if doing.ends else {}
        problems += [f"verify in the end: {found}" for found in verify(ts.Store(place)) if not found.harmless]
        return problems + [
            f"in the end {file} differs"
            for file in sorted({*now, *expected})
            if now.get(file) != expected.get(file)
            if Path(file).name != DOCUMENT and TAKEN_OUT not in file  # documents have dates
        ]

    def _wrong_beside(self, place: Path, origin: Path, damage: str) -> list[str]:
        """Return what was taken out or lost beside the damaged chunk of a first segment, and its records."""
        order, seed, segment = (int(damage.split("/")[at]) for at in (2, 3, 5))
        schema = ts.open(place)[NAME].schema
        slab = schema.orders[order], schema.seeds[seed]
        taken_out = [file.split("/", 4) for file in _contents(place) if TAKEN_OUT in file]
        expected = damage.partition("/")[2], f"c/{order}/{seed}/0/0"  # the chunk, and a copy of the records
        return [
            *lost(place, (one for one in _committed(origin) if one[:3] != (*slab, segment))),
            *(
                f"{parts} was taken out"
                for parts in taken_out
                if (parts[1], parts[4]) not in zip(KEPT, expected, strict=True)
            ),
            *(str(found) for found in verify(ts.Store(place)) if not found.harmless and damage not in str(found)),
        ]


def _contents(place: Path) -> dict[str, bytes]:
    return {str(f.relative_to(place)): f.read_bytes() for f in sorted(place.rglob("*")) if f.is_file()}


def _wrong_late(place: Path, whole: Path, before: Path) -> list[str]:
    """Return which late metrics have other values than in a whole store, or fewer than they had before."""
    now, right, had = (_late(one) for one in (place, whole, before))
    nothing = np.zeros(0, dtype=bool), np.zeros(0)
    problems = [f"{at} is lost" for at, (known, _) in had.items() if (known > now.get(at, nothing)[0]).any()]
    for at, (known, values) in now.items():
        if known.any() and values[known].tobytes() != right[at][1][: len(known)][known].tobytes():
            problems.append(f"{at} has other values")
    return problems


def _late(place: Path) -> dict[tuple[str, int, int], tuple[NDArray[np.bool_], NDArray[np.float64]]]:
    stored = ts.open(place)[NAME]
    slabs = product(range(len(stored.schema.orders)), range(len(stored.schema.seeds)))
    return {
        (name, *slab): LateSeries(stored.group, stored.schema, slab, name).read()
        for slab, name in product(slabs, stored.schema.late)
    }


def _fills(place: Path) -> list[tuple[str, set[str]]]:
    opened = ts.open(place)
    return [(name, {fill["id"] for fill in opened[name].fills}) for name in opened]


def _committed(place: Path) -> Iterator[tuple[str, int, int, int]]:
    """Yield order, seed, segment and steps of what is committed in a store."""
    stored = ts.open(place)[NAME]
    records = stored.commits().records
    for i, order in enumerate(stored.schema.orders):
        for k, seed in enumerate(stored.schema.seeds):
            for segment, record in enumerate(records[i, k].tolist()):
                if record[0] >= 0:
                    yield order, seed, segment, record[0]
