"""The holder of a slab in a folder: who writes it, and lets others write for it.

The kernel frees the lock of a process that dies, and ends nothing that others do for it: a worker may go on when the
slab has another holder. So everything of a slab takes its name by a rename out of a folder of its holder's own, which
lies in the folder that the lock is on; and whoever takes the lock takes the folders of others away first. A rename
comes before that, or it fails. It asks for nothing more than a file system that renames atomically.
"""

from __future__ import annotations

import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from trajstore.errors import BusyError
from trajstore.storage.places.place import PARTIAL

__all__ = ["Holder", "Lent", "held_here", "holding"]


class Lent(NamedTuple):
    """What another process needs to write for a holder."""

    lock: str
    folder: str
    """Where it lies, below the store."""

    def within(self, root: Path) -> Path:
        """Return the folder to write through. Whoever was lent it never makes it."""
        return root / self.folder


class Holder:
    """A lock of a slab that this process holds."""

    def __init__(self, slab: str, lock: str) -> None:
        self.lock, self._slab = lock, slab
        self._lent = Lent(lock, f"{slab}/{uuid.uuid4().hex}{PARTIAL}")
        self._made, self._making = False, threading.Lock()

    def within(self, root: Path) -> Path:
        """Return the folder to write through, which is made when it is needed: on a full disk there is no room."""
        folder = self._lent.within(root)
        with self._making:
            if not self._made:
                folder.mkdir()
                self._made = True
                if len(_folders(root / self._slab)) > 1:  # of somebody whom this file system's locks did not keep out
                    self.release(root)
                    raise BusyError(f"{root}: another process holds the lock {self.lock!r} too; nothing is written")
        return folder

    def lend(self, root: Path) -> Lent:
        """Return what lets another process write, until the lock is freed or taken over."""
        self.within(root)
        return self._lent

    def release(self, root: Path) -> None:
        """Have nothing be written any more. Where that cannot be done the next holder does it, or takes nothing."""
        if self._made:
            with suppress(OSError):
                _take_away(self._lent.within(root))


_held: dict[tuple[str, str], Holder] = {}
"""Store and lock → who holds it, in this process."""


@contextmanager
def holding(root: Path, slab: str, lock: str) -> Iterator[None]:
    """Be the holder of a slab, by the key of the folder that its lock is on. Hold that."""
    for folder in _folders(root / slab):
        _take_away(folder)
    holder = _held[str(root), lock] = Holder(slab, lock)
    try:
        yield
    finally:
        if _held.get((str(root), lock)) is holder:
            del _held[str(root), lock]
        holder.release(root)


def held_here(root: Path, lock: str) -> Holder | None:
    """Return the holder of a lock, if it is this process."""
    return _held.get((str(root), lock))


def _folders(slab: Path) -> list[Path]:
    """Return the folders of the holders of a slab, and what is left of those of former ones."""
    with os.scandir(slab) as entries:
        return [Path(e.path) for e in entries if e.name.endswith(PARTIAL) and e.is_dir(follow_symlinks=False)]


def _take_away(folder: Path) -> None:
    """Take a folder away, so that nothing is renamed out of it any more: in one moment, where it can be renamed."""
    try:
        gone = folder.rename(folder.with_name(f"{uuid.uuid4().hex}{PARTIAL}"))
    except FileNotFoundError:
        return
    except OSError:  # some file systems rename no folders that they have from below
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)
        return
    shutil.rmtree(gone, ignore_errors=True)
