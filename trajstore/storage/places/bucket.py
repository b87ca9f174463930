"""A store in an object store: S3, Google's, or this process's memory.

An object is there whole or not at all, and once put it stays, so nothing needs to be flushed. What has to be taken care
of is who writes: every object is put on condition that nobody else has replaced it since this process saw it, and what
fails that condition is tried again only after a look at the lock.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import obstore
from obstore.exceptions import BaseError
from zarr.abc.store import Store as ZarrStore

from trajstore.errors import BusyError, ConfigurationError, UnreachableError
from trajstore.storage.places import requests
from trajstore.storage.places.guarded import Guarded
from trajstore.storage.places.leases import Lease, died, free, holder_of, is_own, taken
from trajstore.storage.places.place import DECLARING, DOCUMENT, Durability, Stray, aside

__all__ = ["Bucket"]

_LOCKS = "locks"
_AT_ONCE = 1_000
"""Objects that are deleted by one request, where the server knows how."""
_PATIENCE = 5.0
"""Seconds that a failure waits for its lock to be freed; where that was in vain, `trajstore unlock` frees it."""
_living: set[str] = set()
"""Tokens of the leases that this process holds, or is about to."""


@cache
def bucket_at(url: str) -> Bucket:
    """Return one and the same for a URL: what is in memory is nowhere else, and locks are held by the process."""
    return Bucket(url)


class Bucket:
    """A prefix of an object store. Beside it, at another prefix, are its locks."""

    beside: Path | None = None

    def __init__(self, url: str) -> None:
        self.address, self.only_here = url, url.startswith("memory://")
        self.asks = not self.only_here
        self.objects, self._locks = requests.opened(url), requests.opened(f"{url}.traj")
        self._leases: dict[str, Lease] = {}
        self.given_up: set[str] = set()
        """Tokens of leases under which something may still be under way."""
        self._proven, self._process = False, os.getpid()

    def __str__(self) -> str:
        return self.address

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return bucket_at, (self.address,)  # another process has connections and locks of its own

    @contextmanager
    def told(self) -> Iterator[None]:
        """Say in one line what an object store does not do."""
        if os.getpid() != self._process and not self.only_here:
            raise UnreachableError(
                f"{self.address} was opened before this process was forked, and its connections do not survive that; "
                "start processes with 'spawn'"
            )
        try:
            yield
        except (BaseError, FileNotFoundError, PermissionError) as error:
            raise UnreachableError(f"{self.address}: {requests.why(error, self.address)}") from None

    def read(self, key: str, most: int | None = None) -> bytes | None:
        """Return what is there, None where there is nothing."""
        with self.told():
            found = requests.get(self.objects, key)
        return None if found is None else found[0]

    def exists(self, key: str) -> bool:
        """Tell whether there is something."""
        with self.told():
            return requests.head(self.objects, key) is not None

    def version(self, key: str) -> object | None:
        """Return what changes whenever something else is put there, None where there is nothing."""
        if self.only_here:
            return self._own_version(key)
        with self.told():
            return requests.version(self.objects, key)

    def _own_version(self, key: str) -> object | None:
        """Look into the memory of this process, which is no request."""
        try:
            return obstore.head(self.objects, key)["e_tag"]
        except FileNotFoundError:
            return None

    def files(self, prefix: str) -> list[tuple[str, int]]:
        """Return the keys below a prefix, in order, and their sizes."""
        with self.told():
            found = requests.below(self.objects, prefix)
        return sorted((meta["path"], meta["size"]) for meta in found)

    def taken(self, prefix: str) -> int:
        """Return how many bytes what lies below a prefix takes: what the objects hold."""
        return sum(size for _, size in self.files(prefix))

    def links(self, prefix: str) -> list[str]:
        """Return none: here everything is an object."""
        return []

    def folders(self) -> list[str]:
        """Return the first parts of all keys that have several, in order."""
        with self.told():
            return requests.level(self.objects, "")[0]

    def strays(self) -> list[tuple[str, Stray]]:
        """Return what lies in the store itself and is neither a folder nor the store's document, in order."""
        with self.told():
            files = requests.level(self.objects, "")[1]
        return sorted((path, "file") for path in files if path != DOCUMENT)

    def names(self, prefix: str) -> list[str]:
        """Return the first parts of all keys below a prefix, in order."""
        with self.told():
            folders, files = requests.level(self.objects, prefix)
        return sorted(PurePosixPath(path).name for path in (*folders, *files))

    def delete(self, key: str) -> None:
        """Take out what is there, if anything is."""
        self._delete([key])

    def set_aside(self, key: str, mark: str, *, keep: bool = False) -> None:
        """Copy what is there to where nothing reads it; then take it out, unless it is to be kept as it is."""
        content = self.read(key)
        if content is not None:
            with self.told():
                requests.put(self.objects, aside(key, mark), content, None)
            if not keep:
                self.delete(key)

    def leftovers(self) -> list[str]:
        """Return nothing: without renaming, what is being removed stays where it was."""
        return []

    def sweep(self) -> None:
        """Do nothing."""

    def remove(self, prefix: str) -> None:
        """Take out all keys below a prefix, the document at its top last."""
        top = f"{prefix}/{DOCUMENT}"
        keys = [key for key, _ in self.files(prefix)]
        below = [key for key in keys if key != top]
        for begin in range(0, len(below), _AT_ONCE):
            self._delete(below[begin : begin + _AT_ONCE])
        if top in keys:
            self._delete([top])

    def _delete(self, keys: list[str]) -> None:
        """Take out keys. Deleting knows no conditions: the lock is looked at just before."""
        self.check_held(self._leases.get(DECLARING), keys[0])
        try:
            requests.delete(self.objects, keys)
        except BaseError as error:
            raise UnreachableError(f"{self}: {requests.why(error, self.address)}") from None

    @contextmanager
    def lock(self, name: str, what: str, patience: float = 0.0) -> Iterator[Callable[[str], None]]:
        """Hold a lock, waiting up to `patience` seconds; a BusyError names the holder."""
        self._prove()
        lease = self._leases[name] = self._take(f"{_LOCKS}/{name}", what, patience)
        try:
            yield lambda folder: None  # a key is the same for everybody
        except BaseException:
            self._give_up(lease)
            raise
        self._release(lease, clean=True)

    def held(self, names: Sequence[str]) -> list[object]:
        """Return what another process needs to write under locks that this one holds."""
        return [(name, self._leases[name]) for name in names if name in self._leases]

    def unlock(self) -> list[str]:
        """Take all locks away from their holders, which can write no more; return who held them."""
        with self.told():
            keys = sorted(meta["path"] for meta in requests.below(self._locks, _LOCKS))
            freed = [(key, self._free(key)) for key in keys]
        return [f"{key.removeprefix(f'{_LOCKS}/')}: {_named(holder)}" for key, holder in freed if holder is not None]

    def _free(self, key: str) -> dict[str, Any] | None:
        """Take a lock away from its holder, if it has one."""
        while True:
            found = requests.get(self._locks, key)
            holder = None if found is None else holder_of(found[0])
            if found is None or holder is None:
                return holder
            if requests.replace(self._locks, key, free(found[0], clean=False), found[1]):
                return holder

    def lease(self, name: str) -> Lease | None:
        """Return a lock as this process holds it."""
        return self._leases.get(name)

    def check_held(self, lease: Lease | None, key: str) -> None:
        """Refuse to write without a lock, or under one that was taken away."""
        if lease is None:
            raise BusyError(f"{self.address}: {key} may be written only under a lock, and none is held")
        with self.told():
            found = requests.get(self._locks, lease.key)
        holder = None if found is None else holder_of(found[0])
        if holder is None or holder["token"] != lease.token:
            now = "was taken away" if holder is None else f"was taken over by {_named(holder)}"
            name = lease.key.removeprefix(f"{_LOCKS}/")
            raise BusyError(f"{self.address}: the lock {name!r} {now}; nothing more is written; --resume continues")

    def keeper(self, *, read_only: bool, durability: Durability = "segment") -> ZarrStore:
        """Return the Zarr store; an object that was put is durable, whatever is asked for."""
        return Guarded(self, read_only=read_only)

    def check(self) -> None:
        """Accept any prefix: what lies there is looked at by whoever reads it."""

    def make(self) -> None:
        """Refuse an object store that cannot tell two writers apart."""
        self._prove()

    def is_empty(self) -> bool:
        """Tell whether nothing is there."""
        with self.told():
            return not any(requests.level(self.objects, ""))

    def _prove(self) -> None:
        """Try whether conditions are honoured: some servers accept them and do not look."""
        if self._proven:
            return
        key = f"probe/{uuid.uuid4().hex}"
        with self.told():
            first = requests.create(self._locks, key, b"1") or requests.version(self._locks, key) or {}
            try:
                created_twice = requests.create(self._locks, key, b"2")
                second = requests.replace(self._locks, key, b"2", first)
                replaced_twice = requests.replace(self._locks, key, b"3", first)
            finally:
                requests.delete(self._locks, key)
        if created_twice or second is None or replaced_twice:
            raise ConfigurationError(
                f"{self.address} does not honour conditional puts, so two writers could not be told apart; "
                "record into a folder, and copy it there when it is done"
            )
        self._proven = True

    def _take(self, key: str, what: str, patience: float) -> Lease:
        deadline, asked = time.monotonic() + patience, None
        try:
            while True:
                with self.told():
                    found = requests.get(self._locks, key)
                    content, version = found or (None, None)
                    holder = None if content is None else holder_of(content)
                    if asked is not None:
                        if holder is not None and holder["token"] == asked.token:
                            return asked  # it was put after all: what came back was the answer to a second try
                        _living.discard(asked.token)
                        asked = None
                    forgotten = holder is not None and is_own(holder) and holder["token"] not in _living
                    if holder is None or forgotten or died(holder):
                        asked, document = taken(key, content)
                        _living.add(asked.token)  # another thread may read it before its answer is here
                        if requests.put(self._locks, key, document, version):
                            return asked
                        continue  # somebody came between: look again
                if time.monotonic() >= deadline:
                    raise BusyError(
                        f"{what} is being written by {_named(holder)}; wait for it or stop it, "
                        f"or, if it has died, `trajstore unlock {self.address}`"
                    )
                time.sleep(0.2)
        except BaseException:
            if asked is not None:
                self._give_up(asked)
            raise

    def _give_up(self, lease: Lease) -> None:
        """Free a lock under which something may still be under way, if that can be done soon."""
        self.given_up.add(lease.token)
        with suppress(UnreachableError, TimeoutError):
            requests.waited(lambda: self._release(lease, clean=False), patience=_PATIENCE)

    def _release(self, lease: Lease, *, clean: bool) -> None:
        _living.discard(lease.token)
        for name in [name for name, held in self._leases.items() if held is lease]:
            del self._leases[name]
        if lease.process != os.getpid():
            return
        with self.told():
            found = requests.get(self._locks, lease.key)
            holder = None if found is None else holder_of(found[0])
            if found is not None and holder is not None and holder["token"] == lease.token:
                requests.replace(self._locks, lease.key, free(found[0], clean=clean), found[1])


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder['process']} on {holder['host']} since {holder['since']}"
