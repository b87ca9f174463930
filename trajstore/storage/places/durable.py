"""A store on a file system that keeps its promises: what was set and flushed survives a power cut.

zarr's LocalStore renames atomically but does not fsync. Here every file is fsynced before it takes its name,
and `flush` fsyncs the directories in which names changed.

Nothing is written into an experiment that was moved, removed or replaced since its writer began, nor over a commit
record that another writer has replaced.
"""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from abc import abstractmethod
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import finalize

from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest
from zarr.buffer import default_buffer_prototype
from zarr.storage import LocalStore

from trajstore._common.system import allow_more_files, is_file, opening, refuse_too_many, way_clear
from trajstore.errors import BusyError, ConfigurationError, WriteError
from trajstore.storage.format.codecs import refuse_bomb
from trajstore.storage.places.elsewhere import refuse_second_writer, refuse_unseen
from trajstore.storage.places.expected import Expected
from trajstore.storage.places.holders import Holder, Lent, held_here
from trajstore.storage.places.locks import descriptor_of
from trajstore.storage.places.packed import as_files, containers, find, partly, plain
from trajstore.storage.places.place import DOCUMENT, PARTIAL, Place, ReplacedError, array_path, below, check_writable
from trajstore.storage.places.regular import DOCUMENT_BYTES, contents, inside, refuse_large
from trajstore.storage.places.removing import delete, make_durable, take_away

__all__ = ["DurableStore"]


class _Anchor:
    """A folder that is kept open, to tell whether its path still leads to it."""

    def __init__(self, path: Path) -> None:
        self._path, self._descriptor = path, descriptor_of(path, os.O_RDONLY | os.O_DIRECTORY)
        finalize(self, os.close, self._descriptor)

    def holds(self) -> bool:
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._descriptor))
        except (FileNotFoundError, NotADirectoryError):
            return False


class DurableStore(LocalStore):
    """LocalStore with fsync. `trajstore.storage.places.folder` has the one that knows its place."""

    def __init__(self, root: Path | str, *, read_only: bool = False, durable: bool = True) -> None:
        """Without `durable` nothing is fsynced: a power cut may then take what was committed, a crash may not."""
        super().__init__(root, read_only=read_only)
        self._durable, self._lock = durable, threading.Lock()
        self._touched, self._reached = set[Path](), set[Path]()
        self.expected = Expected()
        self._anchors: dict[str, _Anchor] = {}
        """Experiment, or prefix of records → the folder in which its writer began."""
        self._lent: dict[str, Lent] = {}
        """Locks that another process holds, and lets this one write under."""
        self._holders: dict[str, Holder | Lent] = {}
        """Prefix → whose folder all that is written below it comes from."""
        self._records: set[str] = set()
        """Prefixes of records, which are replaced only as they were seen."""
        self._seen: dict[str, bytes | None] = {}
        """Key of a record → what was read or written there last; None: that there was none."""

    @property
    @abstractmethod
    def place(self) -> Place:
        """Where it lies."""

    def with_read_only(self, read_only: bool = False) -> DurableStore:
        """Return the same store, read-only or not."""
        return type(self)(self.root, read_only=read_only, durable=self._durable)

    def __reduce__(self) -> tuple[Any, ...]:
        if not self.read_only:
            refuse_second_writer(str(self.root))
        return _read_elsewhere, (type(self), str(self.root.absolute()), self._durable, self.expected)

    async def set(self, key: str, value: Buffer) -> None:
        """Write a file durably under a temporary name, then rename it."""
        await asyncio.to_thread(self.set_sync, key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write a file that is not there. Zarr asks so for the documents above one that it writes."""
        if not await self.exists(key):
            await self.set(key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        """Write a file durably under a temporary name, then rename it."""
        check_writable(self)
        with way_clear(f"{self.root}: {key} cannot be written"):
            self._put(key, value)

    def _put(self, key: str, value: Buffer) -> None:
        path = inside(self.root, key)
        self._refuse_elsewhere(key)
        record = below(key, self._records) is not None
        content = value.as_buffer_like()
        if path.name == DOCUMENT and len(value) > DOCUMENT_BYTES:  # which nobody could read
            raise ConfigurationError(
                f"{path} would have {len(value):,} bytes, and a document has at most {DOCUMENT_BYTES:,}: record fewer "
                "seeds, or import fewer files, in one experiment"
            )
        if record and key in self._seen and (found := contents(path)) not in (self._seen[key], bytes(content)):
            now = "is gone" if found is None else "was replaced by another process"
            raise ReplacedError(
                f"{self.root}: the commit record {key} {now}; nothing more is written here, what was committed is "
                "kept; --resume continues"
            )
        self._make_room(path, key)
        partial = self._through(key, path.parent) / f"{path.name}.{uuid.uuid4().hex}{PARTIAL}"
        try:
            with opening(lambda: partial.open("wb"), path) as file:
                file.write(content)
                if self._durable:
                    file.flush()
                    os.fsync(file.fileno())
            partial.replace(path)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            self._refuse_elsewhere(key)  # it may have been moved just now
            if isinstance(error, FileNotFoundError):
                self._refuse_taken(key)
            if isinstance(error, OSError) and error.errno is not None:  # a full disk does not say which file it was
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise
        if record:
            self._seen[key] = bytes(content)
        with self._lock:
            folder, above = path.parent.absolute(), self.root.absolute().parent
            self._touched.add(folder)
            # The names of folders lie in the folders above, the store's own too; whoever made them may have died
            # before they were durable, so that it does not matter whether they are new. Above one that was reached
            # before, nothing has changed.
            while folder != above and folder not in self._reached:
                self._reached.add(folder)
                folder = folder.parent
                self._touched.add(folder)

    def lend(self, held: Sequence[object]) -> None:
        """Write under locks that another process holds, and under none that this one takes meanwhile."""
        lent: Any = held
        self._lent |= {one.lock: one for one in lent}

    def guard(self, lock: str, prefixes: Sequence[str], records: Sequence[str]) -> int:
        """Write below these keys only while their experiment is where it is now, and records only as they were seen.

        What was written under a lock that another process has taken since takes no name any more, so the fence is 0.
        """
        if not self.read_only:
            self._refuse_packed(prefixes)
        if (holder := self._lent.get(lock) or held_here(self.root, lock)) is not None:
            self._holders |= dict.fromkeys((*prefixes, *records), holder)
        experiments = {prefix.partition("/")[0] for prefix in (*prefixes, *records)}
        for folder in (experiments | set(records)) - self._anchors.keys():
            with suppress(FileNotFoundError):  # there are no records yet
                self._anchors[folder] = _Anchor(inside(self.root, folder))
        self._records.update(records)
        return 0

    def _refuse_packed(self, prefixes: Sequence[str]) -> None:
        """Refuse to write beside what is packed, which then counted no more in part."""
        for name in sorted({prefix.partition("/")[0] for prefix in prefixes}):
            if containers(self.root, name):
                raise BusyError(
                    f"experiment {name!r} in {self.root} was packed just now, by another process; nothing is written; "
                    "do it again, which lays it out as files first"
                )

    def _through(self, key: str, own: Path) -> Path:
        """Return the folder in which to begin a file: the holder's of its slab, or its own."""
        at = below(key, self._holders)
        return own if at is None else self._holders[at].within(self.root)

    def _refuse_taken(self, key: str) -> None:
        """Refuse what was to be done to a slab under a lock that is another's now."""
        at = below(f"{key}/", self._holders)
        if at is not None and not self._holders[at].within(self.root).is_dir():
            raise BusyError(
                f"{self.root}: the lock {self._holders[at].lock!r} was freed, or taken over by another process; "
                "nothing more is written here, what was committed is kept; --resume continues"
            ) from None

    def check(self, records: str = "") -> None:
        """Raise where what is written is moved or removed: an experiment, what some records belong to, or anything."""
        for folder in [records] if records else self._anchors:
            self._refuse_elsewhere(f"{folder}/{DOCUMENT}")

    def _make_room(self, path: Path, key: str) -> None:
        """Make the folders of a file, but never anew that of an experiment: it may be moved at this very moment."""
        experiment = key.partition("/")[0]
        if experiment not in self._anchors:
            path.parent.mkdir(parents=True, exist_ok=True)
            return
        top = inside(self.root, experiment)
        try:
            for folder in reversed([folder for folder in path.parents if top in folder.parents]):
                folder.mkdir(exist_ok=True)
        except FileNotFoundError:
            self._refuse_elsewhere(key)
            raise

    def _refuse_elsewhere(self, key: str) -> None:
        """Refuse to write where no store is, or not the one that there was: it would be begun again at the old path."""
        experiment, slash, _ = key.partition("/")
        anchors = [self._anchors[at] for at in (experiment, below(key, self._records)) if at in self._anchors]
        if not all(anchor.holds() for anchor in anchors) or (not anchors and slash and not self.root.is_dir()):
            raise WriteError(
                f"experiment {experiment!r} is not in {self.root} any more: it was moved, removed or replaced while it "
                "was written; what was committed is kept where it is now, and --resume continues there"
            )

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return what is there, or a part of it."""
        most = self.expected.most.get(array_path(key))
        refuse_large(inside(self.root, key), most)
        found = await self._got(key, prototype, byte_range)
        buffer = (prototype or default_buffer_prototype()).buffer
        if found is None:
            content = await asyncio.to_thread(as_files, self.root, key, None, most)
            found = None if content is None else buffer.from_bytes(partly(content, byte_range))
        elif key.endswith(DOCUMENT):
            found = buffer.from_bytes(plain(found.to_bytes()))
        self.expected.refuse_another(key, self.place)
        if found is None:
            self.expected.refuse_missing(key, self.place.read)
        elif most is not None:
            refuse_bomb(found.to_bytes()[:18] if len(found) < 64 else found[:18].to_bytes(), most)
        if byte_range is None and below(key, self._records) is not None:
            self._seen[key] = None if found is None else found.to_bytes()
        return found

    async def _got(self, key: str, prototype: BufferPrototype | None, byte_range: ByteRequest | None) -> Buffer | None:
        try:
            try:
                return await super().get(key, prototype, byte_range)
            except OSError as error:
                if not allow_more_files(error):
                    raise
            return await super().get(key, prototype, byte_range)
        except OSError as error:
            refuse_too_many(error, inside(self.root, key))
            raise

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return what is there, or parts of it."""
        return await asyncio.gather(*(self.get(key, prototype, byte_range) for key, byte_range in key_ranges))

    async def exists(self, key: str) -> bool:
        """Tell whether there is something."""
        there = await asyncio.to_thread(is_file, inside(self.root, key))
        return there or await asyncio.to_thread(find, self.root, key) is not None

    async def getsize(self, key: str) -> int:
        """Return the size of what is there."""
        inside(self.root, key)
        try:
            return await super().getsize(key)
        except (FileNotFoundError, NotADirectoryError):
            if (part := await asyncio.to_thread(find, self.root, key)) is None:
                raise
            return part.size

    async def delete(self, key: str) -> None:
        """Take out what is there."""
        inside(self.root, key)
        self._refuse_taken(key)
        await super().delete(key)

    async def delete_dir(self, prefix: str) -> None:
        """Take out what is below a prefix."""
        inside(self.root, prefix)
        self._refuse_taken(prefix)
        await super().delete_dir(prefix)

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the first parts of the keys below a prefix."""
        inside(self.root, prefix)
        async for name in super().list_dir(prefix):
            yield name

    def remove(self, prefix: str) -> None:
        """Take out all keys below a prefix. They are gone at once; deleting many files may take a while."""
        folder = inside(self.root, prefix)
        if folder.exists():
            delete(take_away(self.root, folder))

    def flush(self) -> None:
        """Make every rename since the last flush durable."""
        with self._lock:
            touched, self._touched = self._touched, set[Path]()
        if not self._durable:
            return
        for folder in sorted(touched, key=lambda f: len(f.parts), reverse=True):
            try:
                make_durable(folder)
            except FileNotFoundError:
                self.check()
                raise
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(folder)) from error


def _read_elsewhere(kind: type[DurableStore], root: str, durable: bool, expected: Expected) -> DurableStore:
    """Open a folder that another process reads; where it is not seen, all would be read as missing, which is NaN."""
    refuse_unseen(root)
    store = kind(root, read_only=True, durable=durable)
    store.expected = expected
    return store
