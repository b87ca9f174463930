"""Ruins: every kind of file of a store, made into every kind of something else, and all that can be done to the store.

`python -m tests.ruins` damages a store in some hundred ways and tries every command and function on each. What is
examined is damaged; two other experiments are not. Whatever is done ends soon, in little memory, with the answer that
the whole store gives or with one line that names the damaged experiment; the others are read as ever, and nothing
outside the store is touched. A sample is in `make test`, all of it in `make slow`.
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
import socket
import stat
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trajstore.cli.main import main as program

import trajstore as ts
import trajstore.storage.fills as fills
from tests.conftest import SMALL_NET
from tests.hostile import Document, put, rewrite
from trajstore import analysis
from trajstore.errors import TrajstoreError
from trajstore.printable import printable
from trajstore.storage.digest import config_digest

__all__ = ["DAMAGES", "DOINGS", "Damage", "Doing", "Site", "all_of", "drawn", "examine", "part"]

HANGS = 100
"""Seconds after which something hangs that takes one at most."""
GROWS = 500 * 2**20
"""Bytes of memory, beyond which something takes all that there is."""
NET, LOOP, CKPT, SOUND = "net", "loop", "ckpt", "sound"
TINY = {
    **SMALL_NET, "problem": {"family": "regression", "width": 3, "depth": 1, "points": 5}, "steps": 9, "seeds": [0],
    "record": {"sketch": 4},
}  # fmt: skip
HOW = {"engine": "reference", "durability": "none"}


# What is there before.


@dataclass(frozen=True)
class Site:
    """A folder with a store, and what nothing may touch."""

    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / "runs.zarr"

    @property
    def pristine(self) -> Path:
        return self.folder / "pristine"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def other(self) -> Path:
        """Another store with the same experiments."""
        return self.folder / "other.zarr"

    @property
    def victim(self) -> Path:
        """Outside of everything."""
        return self.folder / "victim"

    def build(self) -> None:
        """Record a store with an experiment of each kind, and copies of it."""
        self.victim.mkdir(parents=True)
        (self.victim / "important").write_text("important")
        ts.run(ts.Experiment.of(TINY), self.store, **HOW)
        ts.run(ts.Experiment.of({**TINY, "name": SOUND}), self.store, **HOW)
        analysis.compute(ts.open(self.store)[NET], "gradient_norm")
        most, fills._MOST = fills._MOST, 2
        for seed in range(3):
            loop(self.store, LOOP, seed)
        fills._MOST = most
        for step in (0, 5):
            at = self.folder / "ckpts" / "seed0" / f"step{step}.pt"
            at.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"w": torch.full((3, 2), 1.0 + step)}, at)
        ts.import_checkpoints(self.store, CKPT, [*self.checkpoints], "seed{seed}/step{step}.pt", durability="none")
        (self.folder / "net.toml").write_text(_toml(TINY))
        (self.folder / "fresh.toml").write_text(_toml({**TINY, "name": "fresh"}))
        (self.folder / "longer.toml").write_text(_toml({**TINY, "steps": 11}))
        ts.open(self.store).sql("SELECT * FROM runs").fetchall()
        with ts.open(self.store)[NET].locked("forward", 0):
            pass
        for name in ("runs.zarr", "runs.zarr.traj"):
            shutil.copytree(self.folder / name, self.pristine / name)
        shutil.copytree(self.store, self.other)

    @property
    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "ckpts").rglob("*.pt"))

    def restore(self) -> None:
        """Have everything as it was."""
        for name in ("runs.zarr", "runs.zarr.traj", "out"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            if (self.folder / name).is_symlink() or (self.folder / name).exists():
                (self.folder / name).unlink()
            if (self.pristine / name).is_dir():
                shutil.copytree(self.pristine / name, self.folder / name)
        self.out.mkdir()
        for file in self.victim.iterdir():
            if file.name != "important":
                file.unlink() if not file.is_dir() else shutil.rmtree(file)

    def outside(self) -> dict[str, object]:
        """Return what nothing may touch: everything but the stores and what is written on purpose."""
        own = ("runs.zarr", "runs.zarr.traj", "other.zarr", "other.zarr.traj", "out", "cache", "pristine")
        return {at: one for at, one in seen(self.folder).items() if Path(at).parts[0] not in own}

    def of(self, experiment: str) -> dict[str, object]:
        """Return the files of an experiment."""
        return {at: one for at, one in seen(self.store / experiment).items() if not at.endswith(".partial")}


def seen(folder: Path) -> dict[str, object]:
    """Return everything below a folder, as it would look if it were changed."""
    found: dict[str, object] = {}
    for at, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(at) / name
            status = path.lstat()
            plain = stat.S_ISREG(status.st_mode)
            of = (status.st_size, status.st_mtime_ns, status.st_ino) if plain else ()
            found[str(path.relative_to(folder))] = (stat.S_IFMT(status.st_mode), of)
    return found


def loop(store: Path, name: str, seed: int, **how: Any) -> None:
    """Record a training loop of three steps."""
    torch.manual_seed(seed)
    with ts.record(store, name, torch.nn.Linear(2, 2), seed=seed, sketch=4, durability="none", **how) as rec:
        for k in range(rec.last or 0, 3):
            rec.step(loss=1.0 / (k + 1))


def _toml(table: Mapping[str, Any]) -> str:
    flat = {k: v for k, v in table.items() if not isinstance(v, Mapping)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in flat.items()]
    for name, inner in table.items():
        if isinstance(inner, Mapping):
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in inner.items())]
    return "\n".join(lines)


# What is done to it.


@dataclass(frozen=True)
class Damage:
    """Something that befalls a store."""

    name: str
    victim: str | None
    """The experiment that is damaged; None: the store, or what lies beside it."""
    do: Callable[[Site], None]
    says: bool = False
    """Something else is declared than there was: what is said of the experiment may be, too."""


def _instead(make: Callable[[Site, Path], None], file: str) -> Callable[[Site], None]:
    def do(site: Site) -> None:
        path = site.folder / file
        moved = site.victim / "moved"
        if path.is_dir():
            shutil.copytree(path, moved)
            shutil.rmtree(path)
        else:
            shutil.copy2(path, moved)
            path.unlink()
        make(site, path)

    return do


def _socket(site: Site, path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


def _device(site: Site, path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:  # for administrators only
        path.symlink_to("/dev/zero")


def _sparse(site: Site, path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**41)


INSTEAD: dict[str, Callable[[Site, Path], None]] = {
    "nothing": lambda site, path: None,
    "an empty file": lambda site, path: path.touch(),
    "a few bytes": lambda site, path: path.write_bytes(b"\x00{\xff") and None,
    "the first half": lambda site, path: _half(site, path),
    "two terabytes": _sparse,
    "a folder": lambda site, path: path.mkdir(),
    "a folder with something": lambda site, path: (path / "x").mkdir(parents=True),
    "a pipe": lambda site, path: os.mkfifo(path),
    "a socket": _socket,
    "a device": _device,
    "a link to a device": lambda site, path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda site, path: path.symlink_to(site.victim / "nothing"),
    "a link to itself": lambda site, path: path.symlink_to(path.name),
    "a link": lambda site, path: path.symlink_to(site.victim / "moved"),
    "a link to a folder": lambda site, path: path.symlink_to(site.victim),
}
"""What lies where a file lay."""


def _half(site: Site, path: Path) -> None:
    if (site.victim / "moved").is_dir():
        path.mkdir()
        return
    whole = (site.victim / "moved").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def _text(change: Callable[[bytes], bytes]) -> Callable[[Site, Path], None]:
    return lambda site, path: path.write_bytes(change((site.victim / "moved").read_bytes())) and None


def _with(**more: object) -> Callable[[bytes], bytes]:
    return lambda text: json.dumps(json.loads(text) | more).encode()


TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "null": lambda text: b"null",
    "a list": lambda text: b"[]",
    "an empty table": lambda text: b"{}",
    "a number": lambda text: b"3",
    "text": lambda text: b'"text"',
    "NaN": lambda text: b"NaN",
    "all in a list": lambda text: b"[" + text + b"]",
    "deep lists": lambda text: b"[" * 200_000 + b"]" * 200_000,
    "deep tables": lambda text: b'{"attributes":' * 100_000 + b"1" + b"}" * 100_000,
    "a number of 10,000 digits": lambda text: b'{"zarr_format": ' + b"9" * 10_000 + b"}",
    "duplicate keys": lambda text: text.rstrip()[:-1] + b', "attributes": 3}',
    "half a character": lambda text: text.replace(b'"zarr_format"', b'"\\ud800": 1, "zarr_format"'),
    "a strange byte": lambda text: text.replace(b"zarr_format", b"zarr_form\xff"),
    "a mark of order": lambda text: b"\xef\xbb\xbf" + text,
    "UTF-16": lambda text: text.decode().encode("utf-16"),
    "100 MB of space": lambda text: text + b" " * 100_000_000,
    "100 MB of zeros": lambda text: b"[" + b"0," * 50_000_000 + b"0]",
    "600 MB": lambda text: text + b" " * 600_000_000,
    "no attributes": lambda text: _without(text, "attributes"),
    "attributes of text": _with(attributes="x"),
    "attributes of a list": _with(attributes=[1]),
    "trajstore of nothing": _with(attributes={"trajstore": None}),
    "trajstore of a list": _with(attributes={"trajstore": []}),
    "another format of Zarr": _with(zarr_format=2),
    "a format of Zarr of text": _with(zarr_format="3"),
    "another node": _with(node_type="array"),
    "a node of a list": _with(node_type=[]),
    "a consolidated group": _with(consolidated_metadata={"kind": "inline", "must_understand": False, "metadata": {}}),
    "a strange consolidation": _with(consolidated_metadata=[3]),
    "an extension": _with(extension={"must_understand": True}),
}
"""What a document says instead."""


def _without(text: bytes, key: str) -> bytes:
    return json.dumps({k: v for k, v in json.loads(text).items() if k != key}).encode()


DOCUMENTS = {
    "runs.zarr/zarr.json": None,
    **{
        f"runs.zarr/{NET}/{array}zarr.json": NET
        for array in (
            "", "params/", "leg/", "committed/", "measured/", "test_loss/", "sketch/", "order/", "step/",
            "batch_index/", "gradient_norm/", "gradient_norm_committed/", "resume/", "resume/forward.0.1/",
        )
    },
    f"runs.zarr/{LOOP}/zarr.json": LOOP,
    f"runs.zarr/{LOOP}/noted-fills/zarr.json": LOOP,
    f"runs.zarr/{LOOP}/noted-fills/0/zarr.json": LOOP,
    f"runs.zarr/{LOOP}/noted-fills/1/zarr.json": LOOP,
    f"runs.zarr/{LOOP}/resume/forward.0.0/zarr.json": LOOP,
    f"runs.zarr/{CKPT}/zarr.json": CKPT,
}  # fmt: skip
CHUNKS = {
    **{
        f"runs.zarr/{NET}/{chunk}": NET
        for chunk in (
            "params/c/0/0/0/0", "counters/c/0/0/0/0", "leg/c/0/0/0", "committed/c/0/0/0/0", "measured/c/0/0/0",
            "test_loss/c/0/0/0", "sketch/c/0/0/0/0", "order/c/0", "step/c/0", "batch_index/c/0/0/0",
            "gradient_norm/c/0/0/0", "gradient_norm_committed/c/0/0/0/0", "resume/forward.0.1/c/0",
            # folders
            "params", "params/c", "committed", "committed/c/0/0", "gradient_norm_committed", "resume",
            "resume/forward.0.1",
        )
    },
    f"runs.zarr/{NET}": NET,
    f"runs.zarr/{LOOP}": LOOP,
    f"runs.zarr/{LOOP}/committed/c/0/0/0/0": LOOP,
    f"runs.zarr/{LOOP}/loss/c/0/0/0": LOOP,
    f"runs.zarr/{LOOP}/noted-fills": LOOP,
    f"runs.zarr/{LOOP}/noted-fills/0": LOOP,
    f"runs.zarr/{LOOP}/resume/forward.0.0/c/0": LOOP,
    f"runs.zarr/{CKPT}/params/c/0/0/0/0": CKPT,
    "runs.zarr.traj/index/catalog.json": None,
    "runs.zarr.traj/index/metrics": None,
    "runs.zarr.traj/index": None,
    "runs.zarr.traj/locks/declare.lock": None,
    f"runs.zarr.traj/locks/{NET}/forward.0.lock": NET,
    f"runs.zarr.traj/locks/{NET}": NET,
    "runs.zarr.traj/locks": None,
    "runs.zarr.traj": None,
}  # fmt: skip


def _said(experiment: str, path: Sequence[Any], value: object) -> Callable[[Site], None]:
    """Have an experiment's document say something else, with digests that say that it is sound."""

    def change(attributes: Document) -> None:
        put(attributes, path, value)

    return lambda site: rewrite(site.store, experiment, change)


def _steps(steps: int) -> Callable[[Site], None]:
    """Declare so many steps, in all places alike."""

    def change(attributes: Document) -> None:
        for table in ("config", "schema"):
            attributes[table]["steps"] = steps

    return lambda site: rewrite(site.store, NET, change)


def _block(path: Sequence[Any], value: object) -> Callable[[Site], None]:
    """Have a block of fills say something else, with a digest that says that it is sound."""

    def do(site: Site) -> None:
        file = site.store / LOOP / "noted-fills" / "1" / "zarr.json"
        document = json.loads(file.read_text())
        put(document["attributes"]["trajstore"], path, value)
        file.write_text(json.dumps(sealed(document)))

    return do


def sealed(document: Document) -> Document:
    """Return a document with digests that say that it is sound, as far as it has any."""
    attributes = document.get("attributes")
    own = attributes.get("trajstore") if isinstance(attributes, dict) else None
    if isinstance(own, dict) and "digest" in own:
        if "config" in own:
            own["config_digest"] = config_digest(own["config"])
        rest = {key: value for key, value in own.items() if key != "digest"}
        own["digest"] = config_digest(rest)
    return document


def _array(array: str, path: Sequence[Any], value: object) -> Callable[[Site], None]:
    """Have the document of an array say something else."""

    def do(site: Site) -> None:
        file = site.store / NET / array / "zarr.json"
        document = json.loads(file.read_text())
        put(document, path, value)
        file.write_text(json.dumps(document))

    return do


ODD = [None, True, -1, 0, 2**31, 2**62, 10**30, 1.5, float("nan"), "", "x", "../../victim", [], [[]], {}, {"x": 1}]
"""What no field is to be."""
_CHUNKS = ("chunk_grid", "configuration", "chunk_shape")
_FIELDS: list[tuple[Any, ...]] = [
    ("schema", name)
    for name in (
        "orders", "seeds", "init_seeds", "data_seeds", "steps", "snapshots", "snapshots_per_segment", "metrics", "late",
        "components", "parameters", "batch_size", "codec", "sketch_seed", "layout",
    )
] + [
    ("schema", "layout", "entries"), ("schema", "layout", "tied"),
    *(("schema", "layout", "entries", 0, name) for name in ("name", "role", "shape", "dtype", "array", "offset")),
    ("config",), ("config", "name"), ("config", "problem"), ("config", "operator"), ("config", "record"),
    ("config", "stops"), ("config", "init_seed"), ("config", "variant_of"), ("config", "orders"), ("config", "seeds"),
    ("config", "problem", "family"), ("config", "problem", "width"), ("config", "operator", "family"),
    ("config", "operator", "lr"), ("config", "record", "every"), ("config", "record", "steps"), ("schema",),
    ("batch_digests",), ("fills",), ("fills", 0, "id"), ("fills", 0, "slabs"), ("fills", 0, "began"),
    ("fills", 0, "ended"), ("fills", 0, "versions"), ("fills", 0, "seconds"), ("fills", 0, "plan"),
    ("fills", 0, "environment"), ("fills", 0, "git_commit"), ("fills", 0, "platform"), ("fills", 0, "data"),
    ("id",), ("format",),
]  # fmt: skip
_LOOP_FIELDS: list[tuple[Any, ...]] = [
    ("config", "declared_steps"), ("config", "problem"), ("config", "problem", "family"), ("config", "steps"),
    ("config", "operator"), ("config", "record"), ("schema", "steps"), ("fills",), ("format",),
]  # fmt: skip
_OF_AN_ARRAY: list[tuple[Any, ...]] = [
    ("shape",), ("shape", 0), ("shape", 2), _CHUNKS, (*_CHUNKS, 0), (*_CHUNKS, 2), ("data_type",), ("fill_value",),
    ("codecs",), ("codecs", 0), ("codecs", 0, "name"), ("codecs", 0, "configuration"), ("chunk_key_encoding",),
    ("chunk_key_encoding", "configuration"), ("chunk_grid",), ("chunk_grid", "name"), ("dimension_names",),
    ("dimension_names", 0), ("attributes",), ("storage_transformers",), ("node_type",), ("zarr_format",),
]  # fmt: skip


def _large() -> Iterator[Damage]:
    """Sizes beyond all memory."""
    for steps in (10**9, 2**40, 2**62):
        yield Damage(f"{NET}: {steps} steps", NET, _steps(steps))
    for array in ("params", "leg", "test_loss", "committed", "gradient_norm", "order", "batch_index", "sketch"):
        shape = _CHUNKS
        for size in (10**9, 2**62):
            at = 0 if array == "order" else 2
            yield Damage(f"{NET}/{array}: chunks of {size}", NET, _array(array, (*shape, at), size))
    for array, codecs in {
        "params": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "leg": [{"name": "numcodecs.pcodec", "configuration": {}}, {"name": "crc32c"}],
        "test_loss": [{"name": "gzip", "configuration": {"level": 1}}],
        "committed": [{"name": "sharding_indexed", "configuration": {}}],
        "order": [{"name": "bytes"}],
        "measured": [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "zstd"}, {"name": "crc32c"}],
        "counters": [{"name": "numcodecs.pickle", "configuration": {}}],
    }.items():
        yield Damage(f"{NET}/{array}: codecs {codecs[0]['name']}", NET, _array(array, ("codecs",), codecs))


def damages() -> Iterator[Damage]:
    """Yield everything that befalls a store."""
    for file, victim in (DOCUMENTS | CHUNKS).items():
        for name, make in INSTEAD.items():
            yield Damage(f"{file}: {name}", victim, _instead(make, file))
    for file, victim in DOCUMENTS.items():
        for name, change in TEXTS.items():
            yield Damage(f"{file}: {name}", victim, _instead(_text(change), file))
    yield from _large()
    for path in _FIELDS:
        for value in ODD:
            yield Damage(f"{NET} {_at(path)} = {value!r}", NET, _said(NET, path, value), says=True)
    for path in _LOOP_FIELDS:
        for value in ODD:
            yield Damage(f"{LOOP} {_at(path)} = {value!r}", LOOP, _said(LOOP, path, value), says=True)
    for array in ("params", "leg", "committed", "order", "gradient_norm_committed"):
        for path in _OF_AN_ARRAY:
            for value in ODD if array != "order" or path[-1] != 2 else ():
                yield Damage(f"{NET}/{array} {_at(path)} = {value!r}", NET, _array(array, path, value))
    for path in [("fills",), ("fills", 0), *(("fills", 0, name) for name in ("id", "slabs", "ended", "versions"))]:
        for value in ODD:
            yield Damage(f"{LOOP} block {_at(path)} = {value!r}", LOOP, _block(path, value), says=True)


def _at(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))


DAMAGES = {damage.name: damage for damage in damages()}


# What is tried then.


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
        ):  # fmt: skip
            yield Doing(f"{name} {exp}", exp, _command(*arguments), writes=True)
    quick = ["--store", "{S}", "--engine", "reference", "--durability", "none"]
    pattern = ["--pattern", "seed{{seed}}/step{{step}}.pt"]
    for name, exp, *arguments in (
        ["merge all from", None, "merge", "{S}", "{OUT}/new.zarr"],
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


OF_SOUND = ("info", "verify", "analyze variance", "rm", "merge from", "merge into", "dataset", "states", "compute")
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
    return doing.of is not None and not doing.writes and not doing.changing


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
    from tests import ruins

    sys.exit(ruins.main())
