"""A store in a folder of a file system."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path

from trajstore._common.system import is_file, way_clear
from trajstore.errors import ConfigurationError
from trajstore.storage.places.durable import DurableStore
from trajstore.storage.places.holders import held_here, holding
from trajstore.storage.places.locks import lock
from trajstore.storage.places.packed import as_files, find, listed
from trajstore.storage.places.place import DECLARING, DOCUMENT, PARTIAL, Durability, Stray, aside
from trajstore.storage.places.regular import below, contents, entries, inside
from trajstore.storage.places.removing import delete, leftovers

__all__ = ["Folder"]

_BLOCK = 512
"""What the system counts blocks in, whatever the file system's own are."""


class Folder:
    """A folder. Beside it lies another with locks and the index; losing that loses nothing."""

    def __init__(self, path: Path) -> None:
        try:  # once and for all: a link that is changed later changes nothing for whoever has come through it
            whole = path.resolve()
        except (OSError, RuntimeError):
            raise ConfigurationError(f"{path}: its symbolic links lead nowhere") from None
        self._given, self.path, self.address = path, whole, str(whole)
        self.beside = _beside(whole)
        self.only_here = self.asks = False

    def __str__(self) -> str:
        return str(self._given)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)

    def read(self, key: str, most: int | None = None) -> bytes | None:
        """Return what is there, None where there is nothing; refuse more bytes than can be, if that is known."""
        return as_files(self.path, key, contents(inside(self.path, key), most), most)

    def exists(self, key: str) -> bool:
        """Tell whether there is something."""
        return is_file(inside(self.path, key)) or find(self.path, key) is not None

    def version(self, key: str) -> object | None:
        """Return what changes whenever something else is put there, None where there is nothing."""
        try:
            status = os.lstat(f"{self.path}/{key}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def files(self, prefix: str) -> list[tuple[str, int]]:
        """Return the keys below a prefix, in order, and their sizes."""
        top = inside(self.path, prefix)
        found = []
        for file in [top] if top.is_file() else below(top):
            with suppress(FileNotFoundError):  # renamed since it was listed
                status = file.lstat()
                if stat.S_ISREG(status.st_mode):
                    found.append((file.relative_to(self.path).as_posix(), status.st_size))
        return listed(self.path, prefix, found)

    def taken(self, prefix: str) -> int:
        """Return how many bytes of the disk what lies at and below a prefix takes: whole blocks, and folders too."""
        top, blocks = inside(self.path, prefix), 0
        for path in (top, *below(top)):
            with suppress(FileNotFoundError):  # renamed since it was listed
                blocks += path.lstat().st_blocks
        return _BLOCK * blocks

    def links(self, prefix: str) -> list[str]:
        """Return the keys at and below a prefix where there is neither file nor folder: links, pipes, devices."""
        top = self.path / prefix
        found = []
        for path in (top, *(below(top) if not top.is_symlink() else ())):
            with suppress(FileNotFoundError):  # renamed since it was listed
                mode = path.lstat().st_mode
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    found.append(path.relative_to(self.path).as_posix())
        return sorted(found)

    def folders(self) -> list[str]:
        """Return the first parts of all keys that have several, in order."""
        return sorted(f.name for f in entries(self.path) if f.is_dir())  # a link too: whoever opens it is told

    def strays(self) -> list[tuple[str, Stray]]:
        """Return what lies in the store itself and is neither a folder nor the store's document, in order."""
        return sorted(
            (f.name, _stray(Path(f.path))) for f in entries(self.path) if not f.is_dir() and f.name != DOCUMENT
        )

    def delete(self, key: str) -> None:
        """Take out what is there, if anything is."""
        inside(self.path, key).unlink(missing_ok=True)

    def set_aside(self, key: str, mark: str, *, keep: bool = False) -> None:
        """Move what is there to where nothing reads it, or copy it there to keep it as it is."""
        there, to = inside(self.path, key), inside(self.path, aside(key, mark))
        if there.is_file():
            to.parent.mkdir(parents=True, exist_ok=True)
            if not keep:
                there.rename(to)
                return
            try:  # what is written over it is another file, of the same name
                os.link(there, to)
            except OSError:  # some file systems have no second names
                shutil.copy2(there, to)

    def remove(self, prefix: str) -> None:
        """Take out all keys below a prefix."""
        FolderStore(self.path).remove(prefix)

    def leftovers(self) -> list[str]:
        """Return the folders of what was removed and not deleted to the end."""
        return [str(folder) for folder in leftovers(self.path, self.beside)]

    def sweep(self) -> None:
        """Delete what was removed and not deleted to the end, as far as that is possible."""
        for folder in leftovers(self.path, self.beside):
            with suppress(OSError):
                delete(folder)

    @contextmanager
    def lock(self, name: str, what: str, patience: float = 0.0) -> Iterator[Callable[[str], None]]:
        """Hold a lock, which ends with the process, however it ends."""
        with ExitStack() as held:
            # Releases that resolved no links lock beside the path that they were given.
            if (other := _beside(self._given.absolute())) != self.beside and other.is_dir():
                held.enter_context(lock(_lock_file(other, name), what, patience))
            also = held.enter_context(lock(_lock_file(self.beside, name), what, patience))

            def within(folder: str) -> None:
                path = inside(self.path, folder)
                with way_clear(f"{what} cannot be locked"):
                    path.mkdir(parents=True, exist_ok=True)
                also(path)
                if folder:
                    held.enter_context(holding(self.path, folder, name))

            if name == DECLARING and self.path.is_dir():
                within("")
            yield within

    def held(self, names: Sequence[str]) -> list[object]:
        """Return what another process needs to write under locks that this one holds."""
        return [holder.lend(self.path) for name in names if (holder := held_here(self.path, name)) is not None]

    def unlock(self) -> list[str]:
        """Do nothing: the kernel frees the locks of processes that die."""
        return []

    def keeper(self, *, read_only: bool, durability: Durability = "segment") -> FolderStore:
        """Return the Zarr store."""
        return FolderStore(self.path, read_only=read_only, durable=durability == "segment")

    def check(self) -> None:
        """Refuse a path at which something else is, or that leads through a file."""
        there = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not there.is_dir():
            raise ConfigurationError(f"{there} is a file; a store is a folder")

    def make(self) -> None:
        """Make the folder, and refuse where nothing can be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            above = self.path.parent
            refused = next((f for f in (self.path, above) if not os.access(f, os.W_OK | os.X_OK)), None)
        except OSError as error:
            raise ConfigurationError(f"cannot write to {self}: {error.strerror}") from None
        if refused is not None:  # beside the store lie its locks and its index
            raise ConfigurationError(f"cannot write to {self}: you may not write in {refused}")

    def is_empty(self) -> bool:
        """Tell whether nothing is there, or nothing but what a process that died had begun to write."""
        if not self.path.is_dir():
            return not self.path.exists()
        return all(f.name.endswith(PARTIAL) for f in entries(self.path))


def _beside(path: Path) -> Path:
    return path.parent / f"{path.name}.traj"


def _lock_file(beside: Path, name: str) -> Path:
    # What lies beside a store may have come with it, and be a link to something that is to be overwritten.
    return inside(beside.parent, f"{beside.name}/locks/{name}")


def _stray(path: Path) -> Stray:
    if path.is_symlink():
        return "link to a file" if path.exists() else "link to nothing"
    return "file" if path.is_file() else "device"


class FolderStore(DurableStore):
    """The Zarr store of a folder."""

    @cached_property
    def place(self) -> Folder:
        """Where it lies."""
        return Folder(self.root)
