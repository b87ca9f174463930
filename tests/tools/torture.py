"""Torture: whatever is killed at any moment, disks that fail at any read or write, stores with any byte or file lost.

`python -m tests.tools.torture` takes some thousand such moments and exits with 1 if anything that was committed was
ever lost or wrong, if a flipped byte went unnoticed, or if a recording could not go on. A smaller sample is in
`make test`.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

import trajstore as ts
import trajstore.recording.schema
import trajstore.storage.writing.slab_writer
from tests.conftest import SMALL_NET
from tests.tools.waiting import HANGS
from trajstore.errors import TrajstoreError
from trajstore.reading.handles import standing
from trajstore.reading.verify import verify
from trajstore.storage.format.schema import Schema
from trajstore.storage.places.folder import Folder
from trajstore.storage.writing.fills import FOLDER
from trajstore.storage.writing.slab_writer import Ledger

NAME = SMALL_NET["name"]
TINY = {
    **SMALL_NET, "problem": {"family": "regression", "width": 3, "depth": 1, "points": 5}, "record": {"sketch": 4},
}  # fmt: skip

# Processes are forked from one that has everything imported and no threads: zarr starts a thread at its first use.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["trajstore.recording.running", "trajstore.reading.verify", "trajstore.reading.dataset", "tests.conftest"]
)


def start(function: Callable[..., Any], *args: Any) -> tuple[Any, Connection]:
    """Begin a function in a process of its own; the connection first tells None, then what came out."""
    ours, theirs = _context.Pipe()
    process = _context.Process(target=_answer, args=(theirs, function, args), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _answer(connection: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    faulthandler.dump_traceback_later(HANGS - 10, file=sys.stderr)
    connection.send(None)
    try:
        answer = True, function(*args)
    except BaseException:
        answer = False, traceback.format_exc()
    faulthandler.cancel_dump_traceback_later()
    connection.send(answer)


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """Return what a function returns in a process of its own; an AssertionError tells what went wrong."""
    process, connection = start(function, *args)
    with closing(connection):
        try:
            for _ in "begun", "done":
                if not connection.poll(HANGS):
                    raise AssertionError(f"{function.__name__} hangs")
                answer = connection.recv()
            process.join(HANGS)
            if process.is_alive():
                raise AssertionError(f"{function.__name__} is done, and its process does not end")
        except EOFError:
            process.join()
            raise AssertionError(f"{function.__name__} died with {process.exitcode}") from None
        finally:
            process.kill()
            process.join()
    fine, value = answer
    if not fine:
        raise AssertionError(f"{function.__name__}: {value}")
    return value


@dataclass(frozen=True)
class Variant:
    """An experiment, and how it is recorded."""

    table: dict[str, Any]
    how: dict[str, Any]
    segment: int = 4
    """Snapshots in a segment."""
    commit_steps: int = 4_096
    """Steps after which a segment that is not full is committed."""
    fsync: bool = False
    """A process that is killed loses nothing that it handed to the kernel, so most trials do without."""


NET = {**SMALL_NET, "orders": ["forward", "backward", "backward/4", "forward+backward@5"]}
REFERENCE, WAVE = {"engine": "reference"}, {"engine": "wavefront", "lanes": 3}
SPARSE = {**NET, "steps": 11, "seeds": [0], "record": {"snapshot_every": 2}}
VARIANTS = {
    "reference": Variant(NET, REFERENCE),
    "wave": Variant({**NET, "steps": 8}, WAVE),
    "partial segments": Variant(NET, REFERENCE, segment=8, commit_steps=2),
    "partial segments of a wave, sparse states": Variant(SPARSE, WAVE, commit_steps=3),
    "fsynced": Variant({**NET, "seeds": [0]}, REFERENCE, commit_steps=2, fsync=True),
}


def record(variant: Variant, place: Path, announced: Path | None = None) -> float:
    """Record, going on with what is there, in a process of its own; return the seconds that took."""
    began = time.monotonic()
    os.environ["XDG_CACHE_HOME"] = str(place.parent / "cache")
    trajstore.recording.schema.segment_length = lambda layout: variant.segment
    trajstore.storage.writing.slab_writer.COMMIT_STEPS = variant.commit_steps
    if not variant.fsync:
        os.fsync = lambda descriptor: None
    if announced is not None:
        _announce(announced)
    ts.run(ts.Experiment.of(variant.table), place, resume=True, **variant.how)
    return time.monotonic() - began


def _announce(log: Path) -> None:
    """Have every commit written down once it is made, outside the store."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    original = Ledger.adopt

    def adopt(self: Ledger, written: Any, *more: Any) -> None:
        original(self, written, *more)
        order, seed = self.corner
        told = self.schema.orders[order], self.schema.seeds[seed], written.segment, written.record[0]
        os.write(descriptor, (json.dumps(told) + "\n").encode())

    Ledger.adopt = adopt


def files(place: Path) -> dict[str, bytes]:
    """Return every file but resume states, what killed writers left, and the documents with the dates of the fills."""
    found = {file.relative_to(place): file for file in sorted(place.rglob("*")) if file.is_file()}
    return {
        str(path): file.read_bytes()
        for path, file in found.items()
        if file.suffix != ".partial" and path.parts[1:2] not in [("resume",), (FOLDER,)]
        if path != Path(NAME, "zarr.json")
    }


class Truth:
    """A recording that nothing happened to: all values but late ones, and the record of every prefix of a segment."""

    def __init__(self, place: Path) -> None:
        stored = ts.open(place)[NAME]
        schema, self.files = stored.schema, files(place)
        self.slabs = {
            (order, seed): {
                spec.name: (spec.dims[-1 if spec.name in ("params", "counters") else 2], stored.group[spec.name][i, k])
                for spec in replace(schema, late=()).arrays()
                if {"order", "seed"} <= set(spec.dims) and spec.name != "committed"
            }
            for i, order in enumerate(schema.orders)
            for k, seed in enumerate(schema.seeds)
        }
        self.records = {
            (*slab, segment): [[0, 0, *_words(hashlib.sha256())], *self._records(schema, segment, values)]
            for slab, values in self.slabs.items()
            for segment in range(schema.segments)
        }

    @staticmethod
    def _records(schema: Any, segment: int, slab: dict[str, tuple[str, np.ndarray]]) -> Iterator[list[int]]:
        """Yield the commit record of one step, of two, and so on, as the format's page has them."""
        values = {name: array for name, (_, array) in slab.items()}
        digest, steps, snapshots = hashlib.sha256(), 0, 0
        for n in range(*schema.steps_of(segment)):
            if values["leg"][n] < 0:
                continue
            digest.update(struct.pack("<3q", n, values["leg"][n], values["measured"][n]))
            for bit, name in enumerate(schema.metrics):
                if values["measured"][n] >> bit & 1:
                    digest.update(struct.pack("<d", values[name][n]))
            digest.update(values["sketch"][n].astype("<f8").tobytes())
            if n in schema.snapshots:
                at = schema.snapshots.index(n)
                digest.update(values["params"][:, at].tobytes() + values["counters"][:, at].astype("<i8").tobytes())
                snapshots += 1
            steps += 1
            yield [steps, snapshots, *_words(digest)]


def _words(digest: Any) -> tuple[int, ...]:
    return struct.unpack("<4q", digest.digest())


def corners(schema: Schema) -> dict[tuple[str, int], tuple[int, int]]:
    """Return where the slabs of an experiment lie."""
    return {(order, seed): (i, k) for i, order in enumerate(schema.orders) for k, seed in enumerate(schema.seeds)}


def lost(place: Path, announced: Iterable[tuple[str, int, int, int]]) -> list[str]:
    """Return what was committed and is no more."""
    stored = ts.open(place)[NAME]
    records, there = stored.commits().records, corners(stored.schema)
    return [
        f"{order}, {seed}, segment {segment}: {steps} steps were committed and are no more"
        for order, seed, segment, steps in announced
        if records[(*there[order, seed], segment)][0] < steps
    ]


def wrong(place: Path, truth: Truth, announced: Iterable[tuple[str, int, int, int]] = ()) -> list[str]:
    """Return what is committed and not the truth, and what was committed and is no more."""
    if standing(Folder(place), NAME) != "experiment":
        return [f"{commit} was committed and is no more" for commit in announced]
    stored = ts.open(place)[NAME]
    schema, commits, problems = stored.schema, stored.commits(), lost(place, announced)
    for slab, corner in corners(schema).items():
        records = commits.records[corner].tolist()
        for segment, found in enumerate(records):
            if found[0] >= 0 and found not in truth.records[*slab, segment]:
                problems.append(f"{slab}, segment {segment}: the record {found} is not true")
        if commits.steps[corner].sum() != sum(max(0, found[0]) for found in records):
            problems.append(f"{slab}: other steps count than are recorded")
        masks = {"step": commits.steps[corner], "snapshot": commits.snapshots[corner]}
        for name, (dim, expected) in truth.slabs[slab].items():
            axis = 0 if dim == "step" else 1
            at = np.flatnonzero(masks[dim])
            values = np.asarray(stored.group[name][corner])
            if values.take(at, axis).tobytes() != expected.take(at, axis).tobytes():
                problems.append(f"{slab}: {name} is not what was computed")
    return problems


def examine(place: Path, truth: Truth, announced: Path | None = None, complete: bool = False) -> list[str]:
    """Return everything that is wrong with a store: in what is committed, by `verify`, and in files once complete."""
    told = announced.read_text().splitlines() if announced is not None and announced.exists() else []
    try:
        problems = wrong(place, truth, [tuple(json.loads(line)) for line in told])
    except Exception as error:
        problems = [f"reading raised {error!r}"]
    try:
        problems += [f"verify: {finding}" for finding in verify(ts.Store(place)) if not finding.harmless]
    except Exception as error:
        if not isinstance(error, TrajstoreError) or standing(Folder(place), NAME) == "experiment":
            problems.append(f"verify raised {error!r}")
    if complete:
        now = files(place)
        problems += [f"{f} differs" for f in sorted({*now, *truth.files}) if now.get(f) != truth.files.get(f)]
    return problems


def recorded(variant: Variant, place: Path) -> tuple[Truth, float]:
    """Record to the end, in a process of its own; return what came out, and the seconds that took."""
    seconds = record(variant, place)
    return Truth(place), seconds


@dataclass
class Report:
    """What came out so far."""

    what: str
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def add(self, where: str, problems: Sequence[str], **counts: int) -> None:
        """Add the outcome of a trial."""
        if problems:
            more = f" (and {len(problems) - 2} more)" if len(problems) > 2 else ""
            self.problems.append(f"{where}: {'; '.join(problems[:2])}{more}")
        self.counts.update(counts)
        if sys.stdout.isatty():
            print(f"\r\x1b[K{self}", end="", flush=True)  # noqa: T201

    def __str__(self) -> str:
        counts = ", ".join(f"{number:,} {name}" for name, number in self.counts.items())
        return f"{self.what}: {counts}, {len(self.problems)} trials with problems"


def side_by_side(work: Callable[[int, int], None], numbers: Iterable[int]) -> None:
    """Call `work(number, which)` for all numbers, by two threads."""
    waiting, taking = iter(numbers), threading.Lock()

    def take(which: int) -> None:
        while True:
            with taking:
                number = next(waiting, None)
            if number is None:
                return
            work(number, which)

    with ThreadPoolExecutor(2) as both:
        for done in [both.submit(take, which) for which in (0, 1)]:
            done.result()


def kill(variants: dict[str, Variant], kills: int, seed: int, folder: Path) -> Report:
    """Kill recordings at random moments, look at what is left, let them go on, and kill some of them again."""
    report = Report("SIGKILL", Counter(killed=0))
    whole: dict[str, tuple[Truth, float]] = {}

    def undisturbed(number: int, which: int) -> None:
        name = list(variants)[number]
        whole[name] = in_child(recorded, variants[name], folder / f"truth-{number}" / "s.zarr")

    def trial(number: int, which: int) -> None:
        rng = random.Random(f"{seed}/{number}")
        name = list(variants)[number % len(variants)]
        (truth, seconds), place = whole[name], folder / f"trial-{number}" / "s.zarr"
        place.parent.mkdir()
        problems, counts = _killed(variants[name], truth, seconds, place, rng)
        report.add(f"seed {seed}, {place}, {name!r}", problems, **counts)
        if not problems:
            shutil.rmtree(place.parent)

    def numbers() -> Iterator[int]:
        for number in count():
            if report.counts["killed"] >= kills:
                return
            yield number

    side_by_side(undisturbed, range(len(variants)))
    side_by_side(trial, numbers())
    return report


def _killed(
    variant: Variant, truth: Truth, seconds: float, place: Path, rng: random.Random
) -> tuple[list[str], Counter[str]]:
    announced, problems, counts = place.with_name("announced"), [], Counter(recordings=1)
    again = 1.0
    while not problems and rng.random() < again:
        process, connection = start(record, variant, place, announced)
        with closing(connection):
            connection.recv()
            moment = rng.uniform(0, seconds * again)
            time.sleep(moment)
            process.kill()
            process.join()
            when = f"killed after {moment:.3f} s, {counts['killed']} times before"
            if process.exitcode == 0 and not (answer := connection.recv())[0]:
                problems.append(f"{when}: {answer[1]}")
        counts["killed"] += process.exitcode != 0
        try:
            problems += [f"{when}: {problem}" for problem in in_child(examine, place, truth, announced)]
        except AssertionError as error:
            problems.append(f"{when}: {error}")
        counts["killed before a commit"] += not announced.exists() or not announced.stat().st_size
        again = 0.4
    try:
        in_child(record, variant, place, announced)
        problems += in_child(examine, place, truth, announced, True)
    except AssertionError as error:
        problems.append(f"{when}, then going on: {error}")
    return problems, counts


def flip(most: int, seed: int, folder: Path) -> Report:
    """Flip a bit of every byte of a store, one at a time: `verify` has to find it, unless the file means the same."""
    table = {**TINY, "orders": ["backward"], "steps": 5, "seeds": [0]}
    report = Report("flipped bytes", Counter(flipped=0, found=0))
    stores = [folder / "flips-0" / "s.zarr", folder / "flips-1" / "s.zarr"]
    in_child(record, Variant(table, REFERENCE), stores[0])
    shutil.copytree(stores[0], stores[1])
    names = [f.relative_to(stores[0]) for f in sorted(stores[0].rglob("*")) if f.is_file()]
    places = [(name, at) for name in names for at in range((stores[0] / name).stat().st_size)]
    if most < len(places):
        places = sorted(random.Random(seed).sample(places, most))
    batches = [places[begin : begin + 100] for begin in range(0, len(places), 100)]

    def batch(number: int, which: int) -> None:
        problems, counts = in_child(_flipped, stores[which], batches[number], f"{seed}/{number}")
        report.add("", [], **counts)
        for problem in problems:
            report.add(f"seed {seed}", [problem])

    report.add("untouched", in_child(_found, stores[0]))
    side_by_side(batch, range(len(batches)))
    return report


def _found(store: Path) -> list[str]:
    return [str(finding) for finding in verify(ts.Store(store))]


def _flipped(store: Path, places: list[tuple[Path, int]], seed: str) -> tuple[list[str], Counter[str]]:
    rng, problems, counts = random.Random(seed), [], Counter[str]()
    for name, at in places:
        file, mask = store / name, 1 << rng.randrange(8)
        whole = file.read_bytes()
        broken = bytes(byte ^ mask if k == at else byte for k, byte in enumerate(whole))
        file.write_bytes(broken)
        try:
            if _found(store):
                counts["found"] += 1
            elif same_document(whole, broken):
                counts["harmless"] += 1
            else:
                problems.append(f"{name}, byte {at}, bits {mask:#x}: not found")
        except Exception:
            problems.append(f"{name}, byte {at}, bits {mask:#x}: {traceback.format_exc(limit=-1)}")
        finally:
            file.write_bytes(whole)
        counts["flipped"] += 1
    return problems, counts


def same_document(whole: bytes, broken: bytes) -> bool:
    """Tell whether two files are JSON and mean the same: another whitespace between words."""
    try:
        return bool(json.loads(whole) == json.loads(broken))
    except ValueError:
        return False


def main() -> int:
    """Run everything, print what came out, and return 1 if anything is wrong."""
    from tests.storage.test_bucket import duels
    from tests.storage.test_disturbing import kills, reads
    from tests.storage.test_faults import cuts, errors
    from tests.storage.test_missing_files import damages

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--errors", type=int, default=2_000, help="at most so many; all are about 1,400")
    parser.add_argument("--cuts", type=int, default=400, help="at most so many; all are about 1,000")
    parser.add_argument("--duels", type=int, default=1_000, help="at most so many; all are about 2,600")
    parser.add_argument("--bytes", type=int, default=1_000_000, help="at most so many; all are about 27,000")
    parser.add_argument("--reads", type=int, default=1_000, help="at most so many; all are about 30,000")
    parser.add_argument("--commands", type=int, default=300, help="at most so many; all are about 1,800")
    parser.add_argument("--files", type=int, default=400, help="at most so many; all are about 400")
    parts: dict[str, Callable[[], Report]] = {
        "kill": lambda: kill(VARIANTS, given.kills, given.seed, folder / "kill"),
        "errors": lambda: errors(given.errors, given.seed, folder / "errors"),
        "cuts": lambda: cuts(given.cuts, given.seed, folder / "cuts"),
        "duels": lambda: duels(given.duels, given.seed),
        "flip": lambda: flip(given.bytes, given.seed, folder / "flip"),
        "reads": lambda: reads(given.reads, given.seed, folder / "reads"),
        "commands": lambda: kills(given.commands, given.seed, folder / "commands"),
        "files": lambda: damages(given.files, given.seed, folder / "files"),
    }
    parser.add_argument("--only", choices=list(parts))
    given, problems = parser.parse_args(), 0
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    print(f"seed {given.seed}, in {folder}", flush=True)  # noqa: T201
    for name, part in parts.items():
        if given.only in (None, name):
            (folder / name).mkdir(exist_ok=True)
            began = time.monotonic()
            report = part()
            end = "\r\x1b[K" if sys.stdout.isatty() else ""
            print(f"{end}{report}; {time.monotonic() - began:.0f} s", flush=True)  # noqa: T201
            for problem in report.problems[:50]:
                print(f"  {problem}", flush=True)  # noqa: T201
            problems += len(report.problems)
    if not problems:
        shutil.rmtree(folder)
    return min(problems, 1)


if __name__ == "__main__":
    from tests.tools import torture

    sys.exit(torture.main())  # so that functions have the names by which other processes find them
