"""The catalog of an index: which slab lies in which file, and by which bytes a file is known.

An index can have come with a store, from somebody who says what they like in it; and a disk can change what is in one.
So a catalog bears a seal that only this user can make, with a key that is kept in the user's cache, and the digest of
every file. What is not as it says is not read, but written anew.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from trajstore._common.cache import user_cache
from trajstore._common.system import opening, refuse_too_many
from trajstore.reading.sql.files import is_own, write_text
from trajstore.storage.places.regular import contents

__all__ = ["CATALOG", "VERSION", "Catalog", "Key", "SlabEntry", "is_damaged", "is_of_another"]

VERSION = 3
CATALOG = "catalog.json"
_KEY_BYTES = 32
_MOST_BYTES = 2**28
"""More than any catalog is: a slab takes some hundred."""

Key = tuple[str, str, int]
"""Experiment, order, seed."""
_State = tuple[int, int, int, int]


@dataclass(frozen=True)
class SlabEntry:
    """What the catalog holds of a slab."""

    experiment: str
    order: str
    seed: int
    stamp: str
    """Of what it was made from."""
    file: str
    """Its rows lie in metrics/FILE and segments/FILE."""
    rows: int
    last_step: int
    unbroken: bool

    @property
    def key(self) -> Key:
        """What names the slab."""
        return self.experiment, self.order, self.seed


@dataclass
class Catalog:
    """Which slab lies in which file."""

    folder: Path
    slabs: dict[Key, SlabEntry] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    """experiments and runs → file."""
    digests: dict[str, str] = field(default_factory=dict)
    """TABLE/FILE → SHA-256 of the file as it was written."""

    @classmethod
    def of(cls, folder: Path) -> Catalog:
        """Read the catalog; where there is none that this user sealed and can understand, begin a new one."""
        stored = _stored(folder)
        try:
            told = stored["catalog"]
            if not hmac.compare_digest(str(stored["seal"]), _seal(told)) or told["version"] != VERSION:
                return cls(folder)
            slabs = [SlabEntry(*fields) for fields in told["slabs"]]
            return cls(folder, {slab.key: slab for slab in slabs}, dict(told["tables"]), dict(told["digests"]))
        except (ValueError, KeyError, TypeError):
            return cls(folder)

    def save(self) -> None:
        """Write the catalog, as a whole."""
        slabs = [list(vars(slab).values()) for slab in self.slabs.values()]
        named = {f"{path.parent.name}/{path.name}" for path in self.paths()}
        digests = {name: digest for name, digest in self.digests.items() if name in named}
        told = {"version": VERSION, "tables": self.tables, "digests": digests, "slabs": slabs}
        write_text(self.folder / CATALOG, json.dumps({"of": _maker(), "seal": _seal(told), "catalog": told}))

    def add(self, file: Path) -> None:
        """Take up a file that was just written."""
        self.digests[f"{file.parent.name}/{file.name}"] = _digest(file)

    def files(self) -> list[str]:
        """Return the files of slabs, each once."""
        return list(dict.fromkeys(slab.file for slab in self.slabs.values()))

    def paths(self) -> set[Path]:
        """Return all files that are told of."""
        slabs = {self.folder / table / file for table in ("metrics", "segments") for file in self.files()}
        return slabs | {self.folder / table / file for table, file in self.tables.items()}

    def sound(self, paths: Iterable[Path]) -> set[Path]:
        """Return those of some files that are there as they were written."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            told = list(paths)
            return {path for path, sound in zip(told, pool.map(self._is_sound, told), strict=True) if sound}

    def _is_sound(self, path: Path) -> bool:
        expected = self.digests.get(f"{path.parent.name}/{path.name}")
        try:
            return is_own(path) and expected is not None and _digest_seen(path) == expected
        except OSError as error:
            refuse_too_many(error, path)
            return False  # it cannot be read: another is written


def is_of_another(folder: Path) -> bool:
    """Tell whether the index in a folder was made by another user, or on another machine."""
    maker = _stored(folder).get("of")
    return isinstance(maker, str) and maker != _maker()


def _stored(folder: Path) -> dict[str, Any]:
    try:
        content = contents(folder / CATALOG, _MOST_BYTES) if is_own(folder / CATALOG) else None
        stored = json.loads(content or b"{}")
    except (OSError, ValueError, RecursionError):
        stored = {}
    return stored if isinstance(stored, dict) else {}


def _digest(path: Path) -> str:
    with opening(lambda: path.open("rb"), path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_seen: dict[Path, tuple[_State, str]] = {}
"""What this process read of a file, and how the file stood then: it need not be read again for every query."""


def _digest_seen(path: Path) -> str:
    status = path.stat()
    state = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    before, digest = _seen.get(path, (None, ""))
    if before != state:
        digest = _digest(path)
        _seen[path] = state, digest
    return digest


def is_damaged(folder: Path) -> bool:
    """Tell whether an index has files that are not as they were written, by reading all of them again."""
    for path in [path for path in _seen if path.is_relative_to(folder)]:
        del _seen[path]
    catalog = Catalog.of(folder)
    return catalog.sound(catalog.paths()) != catalog.paths()


def _seal(told: object) -> str:
    return hmac.new(_key(), json.dumps(told).encode(), "sha256").hexdigest()


def _maker() -> str:
    """Return what tells one user's indexes from another's, and nothing of the key."""
    return hmac.new(_key(), b"whose index this is", "sha256").hexdigest()[:16]


_alone = secrets.token_bytes(_KEY_BYTES)
"""The key of a user who has nowhere to keep one: this process believes its own index, and no other."""


def _key() -> bytes:
    try:
        file = user_cache() / "index.key"
        with suppress(FileNotFoundError):
            if len(key := file.read_bytes()) == _KEY_BYTES:
                return key
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = file.with_name(f".{uuid4().hex}.partial")
        partial.touch(0o600)
        partial.write_bytes(secrets.token_bytes(_KEY_BYTES))
        partial.replace(file)
        return file.read_bytes()
    except OSError:
        return _alone
