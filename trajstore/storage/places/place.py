"""Where a store lies: a folder, or a prefix of an object store. Everything that is no array goes through here."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable
from urllib.parse import quote

import zarr
from zarr.abc.buffer import Buffer
from zarr.abc.store import Store as ZarrStore

from trajstore.errors import BusyError
from trajstore.storage.places.expected import Expected
from trajstore.storage.places.identity import DOCUMENT

__all__ = [
    "DECLARING",
    "DOCUMENT",
    "PARTIAL",
    "REMOVED",
    "TAKEN_OUT",
    "Durability",
    "Keeper",
    "Place",
    "ReplacedError",
    "Stray",
    "array_path",
    "aside",
    "below",
    "check_writable",
    "keeper_of",
    "slab_folder",
    "slab_lock",
]

Durability = Literal["segment", "none"]
"""Whether what is committed is made to survive a power cut first."""
PARTIAL = ".partial"
"""How the names of files end that are being written."""
REMOVED = ".removed-"
"""How the names of folders begin that are being removed."""
Stray = Literal["file", "link to a file", "link to nothing", "device"]
"""What else can lie where experiments do; the last are pipes and sockets as well."""
TAKEN_OUT = "taken-out"
"""Where in an array's folder lies what a repair took out."""
DECLARING = "declare.lock"
"""The lock of whoever changes shapes or attributes."""


class ReplacedError(BusyError):
    """Records are not any more what was read of them."""


@runtime_checkable
class Keeper(Protocol):
    """What a Zarr store can do here beyond Zarr's own."""

    @property
    def place(self) -> Place:
        """Where it lies."""

    def flush(self) -> None:
        """Make durable whatever was set before."""

    def guard(self, lock: str, prefixes: Sequence[str], records: Sequence[str]) -> int:
        """Let writes below these keys through only while a lock is held.

        Returns its fence: a number that is larger for every holder that took the lock over from one that may still
        run. The `records`, which are written last and make the rest count, have to carry it; they are replaced only
        as they were read or written here before, and else it is a ReplacedError.
        """

    def lend(self, held: Sequence[object]) -> None:
        """Write under locks that another process holds: `held` is what its `Place.held` returned there."""

    @property
    def expected(self) -> Expected:
        """What is known of its files; reading one that is otherwise is an error."""

    def check(self, records: str = "") -> None:
        """Raise where what is written is moved or removed: an experiment, what some records belong to, or anything."""

    def set_sync(self, key: str, value: Buffer) -> None:
        """Set a key at once."""

    def remove(self, prefix: str) -> None:
        """Take out all keys below a prefix: at once where that is possible, its document last where it is not."""


class Place(Protocol):
    """Where a store lies. Keys are paths below it, with slashes."""

    @property
    def address(self) -> str:
        """How another process finds it."""

    @property
    def beside(self) -> Path | None:
        """The folder for what may be lost, if it lies in a file system."""

    @property
    def asks(self) -> bool:
        """Whether looking at something is a request to another machine."""

    @property
    def only_here(self) -> bool:
        """Whether no other process sees it."""

    def read(self, key: str, most: int | None = None) -> bytes | None:
        """Return what is there, None where there is nothing; refuse more bytes than can be, if that is known."""

    def exists(self, key: str) -> bool:
        """Tell whether there is something."""

    def version(self, key: str) -> object | None:
        """Return what changes whenever something else is put there, None where there is nothing."""

    def files(self, prefix: str) -> list[tuple[str, int]]:
        """Return the keys below a prefix, in order, and their sizes."""

    def taken(self, prefix: str) -> int:
        """Return how many bytes of the disk what lies at and below a prefix takes: whole blocks, and folders too."""

    def links(self, prefix: str) -> list[str]:
        """Return the keys at and below a prefix where there is neither file nor folder: links, pipes, devices."""

    def folders(self) -> list[str]:
        """Return the first parts of all keys that have several, in order."""

    def strays(self) -> list[tuple[str, Stray]]:
        """Return what lies in the store itself and is neither a folder nor the store's document, in order."""

    def delete(self, key: str) -> None:
        """Take out what is there, if anything is."""

    def set_aside(self, key: str, mark: str, *, keep: bool = False) -> None:
        """Move what is there to where nothing reads it, below `TAKEN_OUT`, or copy it there to `keep` it as it is."""

    def remove(self, prefix: str) -> None:
        """Take out all keys below a prefix: at once where that is possible, its document last where it is not."""

    def leftovers(self) -> list[str]:
        """Return the folders of what was removed and not deleted to the end; nothing reads them."""

    def sweep(self) -> None:
        """Delete these, as far as that is possible."""

    def lock(self, name: str, what: str, patience: float = 0.0) -> AbstractContextManager[Callable[[str], None]]:
        """Hold a lock, waiting up to `patience` seconds; a BusyError names the holder.

        Gives what locks a folder of the guarded as well, by its key, so that no other path leads round the lock. Where
        there are no folders it does nothing.
        """

    def held(self, names: Sequence[str]) -> list[object]:
        """Return what another process needs to write under locks that this one holds."""

    def unlock(self) -> list[str]:
        """Take locks away from holders that died without a word; return who held them."""

    def keeper(self, *, read_only: bool, durability: Durability = "segment") -> ZarrStore:
        """Return the Zarr store, which is a Keeper."""

    def check(self) -> None:
        """Refuse a place that something else than a store occupies."""

    def make(self) -> None:
        """Get ready for writing; refuse where nothing can be written."""

    def is_empty(self) -> bool:
        """Tell whether nothing is there, or nothing but what a process that died had begun to write."""


def keeper_of(group: zarr.Group) -> Keeper:
    """Return the store of a group that can be written."""
    store = group.store
    assert isinstance(store, Keeper)
    return store


def array_path(key: str) -> str:
    """Return the path of the array that a chunk belongs to."""
    return "/".join(key.split("/")[:2])


def aside(key: str, mark: str) -> str:
    """Return where a file of an array goes that is taken out; `mark` tells one repair from another."""
    experiment, array, rest = key.split("/", 2)
    return f"{experiment}/{array}/{TAKEN_OUT}/{mark}/{rest}"


def below(key: str, prefixes: Container[str]) -> str | None:
    """Return which of some prefixes a key lies below."""
    while (at := key.rfind("/")) >= 0:
        key = key[:at]
        if key in prefixes:
            return key
    return None


def slab_folder(experiment: str, corner: tuple[int, int]) -> str:
    """Return the folder of a slab's commit records, by the positions of its order and seed."""
    return f"{experiment}/committed/c/{corner[0]}/{corner[1]}"


def check_writable(store: ZarrStore) -> None:
    """Raise a ValueError, as Zarr's own stores do, where a Zarr store was opened to be read only."""
    if store.read_only:
        raise ValueError(f"{store} was opened to be read, and cannot be written")


def slab_lock(experiment: str, order: str, seed: int) -> str:
    """Return the name of a slab's lock."""
    return f"{experiment}/{quote(order, safe='')}.{seed}.lock"
