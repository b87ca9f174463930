"""A store with an experiment of each kind, and everything that may befall it: by accident, or by somebody's will.

Every kind of file is taken away, cut short, replaced by something that is no file, or says something else.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import trajstore as ts
from tests.conftest import SMALL_NET
from tests.tools.hostile import Document, put, rewrite
from trajstore import analysis
from trajstore.storage.format.digest import config_digest
from trajstore.storage.writing import fills

__all__ = [
    "CKPT", "DAMAGES", "DOCUMENTS", "HOW", "LOOP", "NET", "SOUND", "TINY", "Damage", "Site", "loop", "sealed",
]  # fmt: skip

NET, LOOP, CKPT, SOUND = "net", "loop", "ckpt", "sound"
TINY = {
    **SMALL_NET, "problem": {"family": "regression", "width": 3, "depth": 1, "points": 5}, "steps": 9, "seeds": [0],
    "record": {"sketch": 4},
}  # fmt: skip
HOW = {"engine": "reference", "durability": "none"}


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
    f"runs.zarr/{LOOP}/noted-fills/1": LOOP,
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
