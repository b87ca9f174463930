"""A store in a folder of a file system."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from trajstore.errors import ConfigurationError
from trajstore.storage.local import DurableStore
from trajstore.storage.locks import lock
from trajstore.storage.place import PARTIAL, Durability

__all__ = ["Folder"]


class Folder:
    """A folder. Beside it lies another with locks and the index; losing that loses nothing."""

    def __init__(self, path: Path) -> None:
        whole = path.absolute()
        self.path, self.address = path, str(whole)
        self.beside = whole.parent / f"{whole.name}.traj"
        self.only_here = False

    def __str__(self) -> str:
        return str(self.path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and self.path.resolve() == other.path.resolve()

    def __hash__(self) -> int:
        return hash(self.path.resolve())

    def read(self, key: str) -> bytes | None:
        """Return what is there, None where there is nothing."""
        try:
            return (self.path / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def exists(self, key: str) -> bool:
        """Tell whether there is something."""
        return (self.path / key).is_file()

    def files(self, prefix: str) -> list[tuple[str, int]]:
        """Return the keys below a prefix, in order, and their sizes."""
        top = self.path / prefix
        found = []
        for file in [top] if top.is_file() else sorted(top.rglob("*")):
            with suppress(FileNotFoundError):  # renamed since it was listed
                status = file.stat()
                if stat.S_ISREG(status.st_mode):
                    found.append((file.relative_to(self.path).as_posix(), status.st_size))
        return found

    def folders(self) -> list[str]:
        """Return the first parts of all keys that have several, in order."""
        return sorted(f.name for f in self.path.iterdir() if f.is_dir())

    def delete(self, key: str) -> None:
        """Take out what is there, if anything is."""
        (self.path / key).unlink(missing_ok=True)

    def remove(self, prefix: str) -> None:
        """Take out all keys below a prefix."""
        DurableStore(self.path).remove(prefix)

    def lock(self, name: str, what: str, patience: float = 0.0) -> AbstractContextManager[None]:
        """Hold a lock, which ends with the process, however it ends."""
        return lock(self.beside / "locks" / name, what, patience)

    def held(self, names: Sequence[str]) -> list[object]:
        """Return nothing: the kernel knows who holds what."""
        return []

    def lend(self, held: Sequence[object]) -> None:
        """Do nothing: whoever can write here may."""

    def unlock(self) -> list[str]:
        """Do nothing: the kernel frees the locks of processes that die."""
        return []

    def keeper(self, *, read_only: bool, durability: Durability = "segment") -> DurableStore:
        """Return the Zarr store."""
        return DurableStore(self.path, read_only=read_only, durable=durability == "segment")

    def check(self) -> None:
        """Refuse a path at which something else is."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigurationError(f"{self.path} is a file; a store is a folder")

    def make(self) -> None:
        """Make the folder, and refuse where nothing can be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            above = self.path.absolute().parent
            refused = next((f for f in (self.path, above) if not os.access(f, os.W_OK | os.X_OK)), None)
        except OSError as error:
            raise ConfigurationError(f"cannot write to {self.path}: {error.strerror}") from None
        if refused is not None:  # beside the store lie its locks and its index
            raise ConfigurationError(f"cannot write to {self.path}: you may not write in {refused}")

    def is_empty(self) -> bool:
        """Tell whether nothing is there, or nothing but what a process that died had begun to write."""
        if not self.path.is_dir():
            return not self.path.exists()
        return all(f.name.endswith(PARTIAL) for f in self.path.iterdir())
