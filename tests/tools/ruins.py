"""Ruins: every kind of file of a store, made into every kind of something else, and all that can be done to the store.

`python -m tests.tools.ruins` damages a store in some thousand ways, and tries some of all commands and functions on
each, chosen by chance. One experiment is damaged, others are not. Whatever is done ends soon, in little memory, with
the answer that the whole store gives, or with one line that names the damaged experiment; the others are read as ever,
and nothing outside the store is touched. A sample is in `make test`, a larger one in `make slow`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trajstore.cli.main import main as program

import trajstore as ts
from tests.tools.damages import CKPT, DAMAGES, HOW, LOOP, NET, SOUND, TINY, Damage, Site, loop
from trajstore import analysis
from trajstore.errors import TrajstoreError, printable

__all__ = ["DAMAGES", "DOINGS", "Damage", "Doing", "Site", "all_of", "drawn", "examine", "part"]

HANGS = 100
"""Seconds after which something hangs that takes one at most."""
GROWS = 500 * 2**20
"""Bytes of memory, beyond which something takes all that there is."""


@dataclass(frozen=True)
class Outcome:
    """What came of something: like a command, also where it is a function."""

    code: object
    out: str = ""
    err: str = ""
    wrong: str = ""
    """A traceback."""
    seconds: float = 0.0
    grew: int = 0


@dataclass(frozen=True)
class Doing:
    """A command, or a function."""

    name: str
    of: str | None
    """The experiment that it asks for; None: the whole store."""
    do: Callable[[Site], str]
    writes: bool = False
    changing: bool = False
    """What it says is of the machine or the moment: that it says something is all that can be known."""


def _command(*arguments: str) -> Callable[[Site], str]:
    def do(site: Site) -> str:
        files = map(str, site.checkpoints)
        given = [part for one in arguments for part in (files if one == "CHECKPOINTS" else [one])]
        return run([one.format(S=site.store, W=site.folder, OUT=site.out, OTHER=site.other) for one in given])

    return do


class Ended(Exception):  # noqa: N818
    """A command ended with an exit code."""


def run(arguments: list[str]) -> str:
    """Run a command in this process; return what it says."""
    sys.argv = ["trajstore", *arguments]
    try:
        program()
    except SystemExit as ended:
        if ended.code:
            raise Ended(ended.code) from None
    return ""


def commands() -> Iterator[Doing]:
    """Yield the commands, each as somebody would give it."""
    for name, *arguments in (
        ["ls", "ls", "{S}", "--json"], ["ls as a table", "ls", "{S}"], ["info of a store", "info", "{S}"],
        *(
            [f"sql {table}", "sql", "{S}", f"SELECT * FROM {table} ORDER BY ALL", "--json"]
            for table in ("runs", "metrics", "segments", "experiments")
        ),
        ["verify", "verify", "{S}"], ["claims", "claims", "{S}", "--claim", "converges"],
        ["unlock", "unlock", "{S}"],
    ):  # fmt: skip
        yield Doing(name, None, _command(*arguments), changing=name in ("sql experiments", "ls as a table"))
    for exp in (NET, LOOP, CKPT, SOUND):
        order = ["--order", "forward", "--seed", "0", "--step", "0"]
        for name, *arguments in (
            ["info", "info", "{S}", exp, "--json"], ["info as a table", "info", "{S}", exp],
            ["verify", "verify", "{S}", exp],
            ["export a state", "export", "{S}", exp, "-o", "{OUT}/s.safetensors", *order],
            ["export metrics", "export", "{S}", exp, "-o", "{OUT}/m.parquet"],
            ["export arrays", "export", "{S}", exp, "-o", "{OUT}/arrays", "--numpy"],
            ["analyze variance", "analyze", "{S}", exp, "variance", "--json"],
            ["analyze convergence", "analyze", "{S}", exp, "convergence", "--json"],
        ):  # fmt: skip
            yield Doing(f"{name} {exp}", exp, _command(*arguments))
        if exp in (NET, SOUND):
            for name, *arguments in (
                ["verify --replay", "verify", "{S}", exp, "--replay"],
                ["analyze law", "analyze", "{S}", exp, "law", "--json"],
                ["analyze resets", "analyze", "{S}", exp, "resets", "--json"],
                ["analyze contraction", "analyze", "{S}", exp, "contraction", "--json", "--pairs", "3"],
                ["plot learning-curves", "plot", "{S}", exp, "learning-curves", "-o", "{OUT}/l.svg"],
                ["claims", "claims", "{S}", exp, "--json", "--claim", "converges"],
            ):  # fmt: skip
                yield Doing(f"{name} {exp}", exp, _command(*arguments))
        for name, *arguments in (
            ["rm", "rm", "{S}", exp, "--yes"], ["verify --repair", "verify", "{S}", exp, "--repair"],
            ["merge from", "merge", "{S}", "{OUT}/new.zarr", exp], ["merge into", "merge", "{OTHER}", "{S}", exp],
            ["copy from", "copy", "{S}", "{OUT}/copied.zarr", exp],
            ["pack", "pack", "{S}", exp], ["pack --undo", "pack", "{S}", exp, "--undo"],
        ):  # fmt: skip
            yield Doing(f"{name} {exp}", exp, _command(*arguments), writes=True)
    quick = ["--store", "{S}", "--engine", "reference", "--durability", "none"]
    pattern = ["--pattern", "seed{{seed}}/step{{step}}.pt"]
    for name, exp, *arguments in (
        ["merge all from", None, "merge", "{S}", "{OUT}/new.zarr"],
        ["copy all from", None, "copy", "{S}", "{OUT}/copied.zarr"],
        ["compute", NET, "compute", "gradient_norm", "{S}", NET],
        ["compute", SOUND, "compute", "gradient_norm", "{S}", SOUND],
        ["record", "fresh", "record", "{W}/fresh.toml", *quick],
        ["record --resume", NET, "record", "{W}/net.toml", *quick, "--resume"],
        ["record --extend", NET, "record", "{W}/longer.toml", *quick, "--extend"],
        ["import", "fresh", "import", "{S}", "fresh", "CHECKPOINTS", *pattern],
        ["import", CKPT, "import", "{S}", CKPT, "CHECKPOINTS", *pattern],
    ):  # fmt: skip
        yield Doing(f"{name} {exp or ''}".rstrip(), exp, _command(*arguments), writes=True)


def functions() -> Iterator[Doing]:
    """Yield what a program would call."""
    whole: dict[str, Callable[[Site], object]] = {
        "repr": lambda site: repr(ts.open(site.store)),
        "html": lambda site: ts.open(site.store)._repr_html_(),
        "names": lambda site: list(ts.open(site.store)),
        "families": lambda site: ts.open(site.store).families(),
        "datatree": lambda site: ts.open(site.store).datatree().load() and "",
        "ts.sql": lambda site: ts.open(site.store).sql("SELECT * FROM metrics ORDER BY ALL").fetchall(),
    }
    for name, do in whole.items():
        yield Doing(name, None, partial(_shown, do), changing=name in ("repr", "html"))
    for exp in (NET, LOOP, CKPT, SOUND):
        of: dict[str, Callable[[Site, str], object]] = {
            "open": lambda site, exp: repr(ts.open(site.store)[exp]),
            "html of": lambda site, exp: ts.open(site.store)[exp]._repr_html_(),
            "slabs": lambda site, exp: ts.open(site.store)[exp].slabs(),
            "attributes": lambda site, exp: ts.open(site.store)[exp].attributes,
            "late": lambda site, exp: [(n, v.tobytes()) for n, v in _late(ts.open(site.store)[exp])],
            "dataset": lambda site, exp: _bytes(ts.open(site.store)[exp].dataset().load()),
            "states": lambda site, exp: _states(ts.open(site.store)[exp]),
            "stream": lambda site, exp: analysis.stream(ts.open(site.store)[exp].dataset(), [analysis.Norm()]).load(),
        }
        for name, doing in of.items():
            told = partial(doing, exp=exp)
            yield Doing(f"{name} {exp}", exp, partial(_shown, told), changing=name in ("open", "html of"))
    loops: dict[str, tuple[str, Callable[[Site], object]]] = {
        "ts.record anew": ("fresh", lambda site: loop(site.store, "fresh", 0)),
        "ts.record another seed": (LOOP, lambda site: loop(site.store, LOOP, 9)),
        "ts.record resumed": (LOOP, lambda site: loop(site.store, LOOP, 1, resume=True)),
        "ts.run resumed": (NET, lambda site: ts.run(ts.Experiment.of(TINY), site.store, resume=True, **HOW)),
    }
    for name, (exp, do) in loops.items():
        yield Doing(name, exp, partial(_shown, lambda site, do=do: do(site) and ""), writes=True)


def _late(stored: ts.StoredExperiment) -> Iterator[tuple[str, Any]]:
    for name, (known, values) in stored.late().items():
        yield name, known
        yield name, values


def _bytes(ds: Any) -> object:
    return {
        str(name): hashlib.sha256(repr(np.asarray(v).tolist()).encode()).hexdigest() for name, v in ds.variables.items()
    }


def _states(stored: ts.StoredExperiment) -> object:
    found, schema, there = {}, stored.schema, stored.commits().snapshots
    for i, k, at in zip(*there.nonzero(), strict=True):
        slab = {"order": schema.orders[i], "seed": schema.seeds[k], "step": schema.snapshots[at]}
        content = b"".join(array.tobytes() for array in stored.arrays(**slab).values())
        found[str(slab)] = hashlib.sha256(content).hexdigest()
    return found


def _shown(do: Callable[[Site], object], site: Site) -> str:
    sys.stdout.write(str(do(site)))
    return ""


OF_SOUND = (
    "info", "verify", "analyze variance", "rm", "merge from", "merge into", "copy from", "dataset", "states", "compute",
)  # fmt: skip
DOINGS = {
    doing.name: doing
    for doing in (*commands(), *functions())
    if doing.of != SOUND or doing.name.removesuffix(f" {SOUND}") in OF_SOUND
}


def attempt(doing: Doing, site: Site) -> Outcome:
    """Do something, and see how it ends."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    shown, argv = warnings.showwarning, sys.argv
    before, began, code, wrong = _held("VmHWM"), time.process_time(), 0, ""
    here = Path.cwd()
    os.chdir(site.out)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            try:
                doing.do(site)
            except Ended as ended:
                (code,) = ended.args
            except TrajstoreError as error:
                code = error.exit_code
                err.write(f"{error}\n")
            except Exception:
                code, wrong = 99, traceback.format_exc(limit=-6)
    finally:
        warnings.showwarning, sys.argv = shown, argv
        os.chdir(here)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(errors="replace"))  # type: ignore[attr-defined]
    return Outcome(code, *texts, wrong, time.process_time() - began, _held("VmHWM") - before)


def _held(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


def faults(damage: Damage, doing: Doing, sound: Outcome, found: Outcome) -> Iterator[str]:
    """Yield what is wrong with how something ended, by how it ends where nothing is damaged."""
    if found.wrong:
        yield f"a traceback: {found.wrong}"
        return
    if "Traceback" in found.err or found.code not in (0, 1, 2):
        yield f"ended with {found.code}: {found.err[-500:]}"
    if "out of memory" in found.err or found.grew > GROWS:
        yield f"took {found.grew / 2**20:,.0f} MB: {found.err[-200:]}"
    if found.seconds > HANGS:
        yield f"took {found.seconds:.0f} s"
    if any(printable(c) != c for c in (found.out + found.err).replace("\n", "").replace("\t", "")):
        yield "shows a command of a terminal"
    same = (found.code, plain(found.out)) == (sound.code, plain(sound.out))
    beside = damage.victim is not None and doing.of not in (damage.victim, None)
    if beside and not same and not (doing.changing and found.code == sound.code):
        yield f"says something else of what is sound: {found.code}, {found.err[-300:]}{found.out[-200:]}"
    elif found.code == sound.code == 0 and not same and _tells(doing) and not damage.says:
        yield f"gives another answer: {_difference(plain(sound.out), plain(found.out))}"
    elif found.code and not found.err.strip() and "verify" not in doing.name:
        yield "says nothing"
    elif found.code and found.code != sound.code:
        told = (found.err + found.out if "verify" in doing.name else found.err).strip()
        lines = found.err.strip().splitlines()
        if len(lines) > 1:
            yield f"says {len(lines)} lines: {found.err[:400]}"
        if damage.victim is not None and f"{damage.victim!r}" not in told and f"/{damage.victim}" not in told:
            yield f"does not say what is damaged: {told[:300]}"


def _tells(doing: Doing) -> bool:
    """Tell whether what is said is what the experiment holds, and nothing of the moment or of others."""
    return doing.of is not None and not (doing.writes or doing.changing or "verify" in doing.name)


def plain(text: str) -> str:
    """Leave out what a damage may change: sizes on the disk."""
    try:
        return json.dumps(_unsized(json.loads(text)))
    except ValueError:
        return "\n".join(line for line in text.splitlines() if not line.startswith("size "))


def _unsized(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _unsized(v) for k, v in value.items() if k not in ("bytes", "disk_bytes")}
    return [_unsized(item) for item in value] if isinstance(value, list) else value


def _difference(one: str, other: str) -> str:
    at = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"…{one[max(0, at - 60) : at + 60]}… / …{other[max(0, at - 60) : at + 60]}…"


@dataclass(frozen=True)
class Examined:
    """How something ended, and what is wrong with that."""

    outcome: Outcome
    problems: list[str]


def examine(damage: Damage, doing: Doing, site: Site, sound: Outcome) -> Examined:
    """Try something on a store that was just damaged; `sound` is what comes of it where nothing is."""
    outside = site.outside()
    others = [one for one in (NET, LOOP, CKPT, SOUND) if one not in (damage.victim, doing.of)]
    files = {one: site.of(one) for one in others} if damage.victim is not None else {}
    own = site.of(damage.victim) if damage.victim is not None else {}
    found = attempt(doing, site)
    problems = [*faults(damage, doing, sound, found)]
    if site.outside() != outside:
        problems.append(f"touched something outside: {sorted(site.outside().items() ^ outside.items(), key=str)}")
    for one, before in files.items():
        if site.of(one) != before:
            problems.append(f"touched {one}: {sorted(map(str, site.of(one).items() ^ before.items()))[:3]}")
    if not doing.writes and damage.victim is not None and site.of(damage.victim) != own:
        changed = sorted(map(str, site.of(damage.victim).items() ^ own.items()))
        problems.append(f"wrote while it read: {changed[:3]}")
    return Examined(found, problems)


# Each damage in a process of its own, which may hang.


Todo = list[tuple[str, list[str]]]
"""Damages, and what is tried on each."""


def _child(connection: Connection, todo: Todo, site: Site, sound: Mapping[str, Outcome]) -> None:
    held = _held("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (held + 6 * 2**30, held + 6 * 2**30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for damage, doings in todo:
        fresh = False
        for name in doings:
            doing = DOINGS[name]
            if not fresh or doing.writes:
                site.restore()
                DAMAGES[damage].do(site)
            fresh = not doing.writes
            connection.send((damage, name, None))
            Path("/proc/self/clear_refs").write_text("5")  # what was taken before says nothing any more
            connection.send((damage, name, examine(DAMAGES[damage], doing, site, sound[name]).problems))
    connection.close()


def _sound(connection: Connection, site: Site, names: Iterable[str]) -> None:
    """Send what comes of everything where nothing is damaged."""
    connection.send(all_of(site, names))


def all_of(site: Site, names: Iterable[str]) -> dict[str, Outcome]:
    """Return what comes of some doings where nothing is damaged."""
    found, fresh = {}, False
    for name in sorted(names, key=lambda name: DOINGS[name].writes):
        if not fresh or DOINGS[name].writes:
            site.restore()
        fresh = not DOINGS[name].writes
        found[name] = attempt(DOINGS[name], site)
    return found


@dataclass
class Report:
    """What came out."""

    tried: int = 0
    problems: list[tuple[str, str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.tried} tried, {len(self.problems)} problems"


_context = multiprocessing.get_context("fork")
_USED = (
    "cli.analyze", "cli.claims", "cli.compute", "cli.exchange", "cli.inspection", "cli.maintenance", "cli.plotting",
    "analysis.examining", "analysis.figures", "computing", "dataset", "dumping", "exporting", "importing", "merging",
    "recording", "recorder", "replaying", "sql", "storage.folder", "verifying", "telling_apart",
)  # fmt: skip
"""Modules that are loaded once, before processes are forked; zarr begins a thread at its first use only."""


def _fork(function: Callable[..., None], *args: Any) -> tuple[Any, Connection]:
    ours, theirs = _context.Pipe(duplex=False)
    process = _context.Process(target=function, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def drawn(damages: Iterable[Damage], each: int, seed: int, only: str = "") -> Todo:
    """Choose what is tried on each of some damages, what reads before what writes."""
    todo: Todo = []
    for damage in damages:
        victims = (None, damage.victim or NET, SOUND, "fresh")
        doings = [name for name, doing in DOINGS.items() if only in name and doing.of in victims]
        some = random.Random(f"{damage.name} {seed}").sample(doings, min(each, len(doings)))
        todo.append((damage.name, sorted(some, key=lambda name: DOINGS[name].writes)))
    return todo


def part(folder: Path, todo: Todo, tell: Callable[[str], None] = lambda text: None) -> Report:
    """Try things on a store that is damaged in some ways, each in turn."""
    torch.set_num_threads(1)
    for module in _USED:
        importlib.import_module(f"trajstore.{module}")
    os.environ.update(XDG_CACHE_HOME=str(folder / "cache"), OMP_WAIT_POLICY="PASSIVE")
    site, report = Site(folder / "site"), Report()
    process, _ = _fork(lambda connection: site.build())
    process.join()
    assert process.exitcode == 0
    names = {name for _, doings in todo for name in doings}
    process, connection = _fork(_sound, site, names)
    sound: dict[str, Outcome] = connection.recv()
    process.join()
    for name, outcome in sound.items():
        if outcome.wrong or outcome.code not in (0, 2) or (outcome.code == 2 and not outcome.err):
            report.problems.append(("nothing", name, f"{outcome.code} {outcome.err} {outcome.wrong}"))
    while todo:
        todo = _tried(todo, site, sound, report, tell)
    return report


def _tried(todo: Todo, site: Site, sound: Mapping[str, Outcome], report: Report, tell: Callable[[str], None]) -> Todo:
    """Try what is to be done, until something hangs; return what is still to be done."""
    process, connection = _fork(_child, todo, site, sound)
    at, problem = todo[0][0], "hangs"
    name = todo[0][1][0]
    try:
        while connection.poll(HANGS):
            at, name, found = connection.recv()
            if found is None:
                continue
            report.tried += 1
            if report.tried % 100 == 0:
                tell(f"# {report}")
            for one in found:
                report.problems.append((at, name, one))
                tell(f"{at} | {name} | {one}")
        process.kill()
    except EOFError:
        process.join(10)
        problem = "the process died"
        if process.exitcode == 0:
            return []
    process.kill()
    process.join()
    report.problems.append((at, name, problem))
    tell(f"{at} | {name} | {problem}")
    k = [damage for damage, _ in todo].index(at)
    rest = todo[k][1][todo[k][1].index(name) + 1 :]
    return [*([(at, rest)] if rest else []), *todo[k + 1 :]]


def main() -> int:
    """Try everything, or a part of it, and return 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--match", default="", help="only damages with this in their names")
    parser.add_argument("--only", default="", help="only what is done under such a name")
    parser.add_argument("--most", type=int, help="at most so many damages, chosen at random; all are about 4,400")
    parser.add_argument("--each", type=int, default=4, help="so many things, chosen at random, are tried on each")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chosen = [damage for name, damage in DAMAGES.items() if given.match in name]
    if given.most is not None:
        chosen = random.Random(given.seed).sample(chosen, min(given.most, len(chosen)))
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="ruins-"))
    report = part(folder, drawn(chosen, given.each, given.seed, given.only), partial(print, flush=True))
    print(f"{len(chosen)} damages: {report}; {time.monotonic() - began:.0f} s")  # noqa: T201
    for doing, count in Counter(doing for _, doing, _ in report.problems).most_common():
        print(f"  {count} {doing}")  # noqa: T201
    if not report.problems:
        shutil.rmtree(folder)
    return min(1, len(report.problems))


if __name__ == "__main__":
    from tests.tools import ruins

    sys.exit(ruins.main())
