"""A store on a file system that keeps its promises: what was set and flushed survives a power cut.

zarr's LocalStore renames atomically but does not fsync. Here every file is fsynced before it takes its name,
and `flush` fsyncs the directories in which names changed.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path

from zarr.abc.buffer import Buffer
from zarr.storage import LocalStore

from trajstore.storage.place import check_writable

__all__ = ["DurableStore", "user_cache"]


class DurableStore(LocalStore):
    """LocalStore with fsync."""

    def __init__(self, root: Path | str, *, read_only: bool = False, durable: bool = True) -> None:
        """Without `durable` nothing is fsynced: a power cut may then take what was committed, a crash may not."""
        super().__init__(root, read_only=read_only)
        self._durable, self._lock = durable, threading.Lock()
        self._touched, self._reached = set[Path](), set[Path]()

    def with_read_only(self, read_only: bool = False) -> DurableStore:
        """Return the same store, read-only or not."""
        return type(self)(self.root, read_only=read_only, durable=self._durable)

    async def set(self, key: str, value: Buffer) -> None:
        """Write a file durably under a temporary name, then rename it."""
        await asyncio.to_thread(self.set_sync, key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        """Write a file durably under a temporary name, then rename it."""
        check_writable(self)
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with partial.open("wb") as file:
                file.write(value.as_buffer_like())
                if self._durable:
                    file.flush()
                    os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        with self._lock:
            self._touched.add(path.parent)
            if path.parent not in self._reached:
                # The names of folders lie in the folders above, the store's own too; whoever made them may have died
                # before they were durable, so that it does not matter whether they are new.
                self._reached.add(path.parent)
                above = self.root.absolute().parent
                self._touched.update(f for f in path.parent.absolute().parents if f.is_relative_to(above))

    def guard(self, lock: str, prefixes: Sequence[str], records: Sequence[str]) -> int:
        """Do nothing: no writer outlives the kernel's lock on a file."""
        return 0

    def remove(self, prefix: str) -> None:
        """Take out all keys below a prefix. They are gone at once; deleting many files may take a while."""
        folder = self.root / prefix
        if folder.exists():
            root = self.root.absolute()
            grave = root.parent / f"{root.name}.traj" / "removed" / uuid.uuid4().hex
            grave.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(grave)
            shutil.rmtree(grave)

    def flush(self) -> None:
        """Make every rename since the last flush durable."""
        with self._lock:
            touched, self._touched = self._touched, set[Path]()
        if not self._durable:
            return
        for folder in sorted(touched, key=lambda f: len(f.parts), reverse=True):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def user_cache() -> Path:
    """Return trajstore's folder in the user's cache, for what can be lost."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trajstore"
