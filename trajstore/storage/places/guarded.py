"""Zarr's view of a bucket: every put is conditional."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest
from zarr.abc.store import Store as ZarrStore

from trajstore.errors import UnreachableError
from trajstore.storage.format.codecs import refuse_bomb
from trajstore.storage.places import requests
from trajstore.storage.places.elsewhere import refuse_only_here, refuse_second_writer
from trajstore.storage.places.expected import Expected
from trajstore.storage.places.leases import Lease
from trajstore.storage.places.place import DECLARING, Place, ReplacedError, array_path, below, check_writable
from trajstore.storage.places.requests import elsewhere

if TYPE_CHECKING:
    from obstore import ObjectMeta, UpdateVersion
    from obstore.store import ObjectStore

__all__ = ["Guarded"]

_TRIES = 10
"""Conditional puts of one object before giving up: each fails only if somebody else's came between."""


class Leased(Place, Protocol):
    """What a bucket has beyond other places: objects, and leases under which they are put."""

    objects: ObjectStore
    given_up: set[str]
    """Tokens of leases under which something may still be under way."""

    def told(self) -> AbstractContextManager[None]:
        """Say in one line what an object store does not do."""

    def names(self, prefix: str) -> list[str]:
        """Return the first parts of all keys below a prefix, in order."""

    def lease(self, lock: str) -> Lease | None:
        """Return the lease of a lock that this process holds."""

    def check_held(self, lease: Lease | None, key: str) -> None:
        """Raise where a lease is another's by now."""


class Guarded(ZarrStore):
    """The Zarr store of a bucket."""

    supports_writes = supports_deletes = supports_listing = True

    def __init__(self, bucket: Leased, *, read_only: bool) -> None:
        super().__init__(read_only=read_only)
        self._bucket = bucket
        self._seen: dict[str, UpdateVersion | None] = {}
        """Key → the version that this process put there, or, of records, read there; None: that there was none."""
        self._guards: dict[str, Lease | None] = {}
        """Prefix → the lock under which to write below it."""
        self._lent: dict[str, Lease] = {}
        """Locks that another process holds, and lets this one write under."""
        self._records: set[str] = set()
        """Prefixes of records, which are replaced only as they were seen."""
        self.expected = Expected()
        self._declaring: Lease | None = None
        """The lock of declarations, as it was held when something was last written under it."""

    @property
    def place(self) -> Leased:
        """Where it lies."""
        return self._bucket

    def __str__(self) -> str:
        return self._bucket.address

    def __repr__(self) -> str:
        return f"<{self}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Guarded) and (self._bucket, self.read_only) == (other._bucket, other.read_only)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._bucket.only_here:
            refuse_only_here(self._bucket.address)
        if not self.read_only:
            refuse_second_writer(self._bucket.address)
        return _read_elsewhere, (self._bucket, self.expected)

    def with_read_only(self, read_only: bool = False) -> Guarded:
        """Return the same store, read-only or not."""
        return Guarded(self._bucket, read_only=read_only)

    def flush(self) -> None:
        """Do nothing: what was put is durable."""

    def check(self, records: str = "") -> None:
        """Do nothing: whoever lost its lock is told when it puts something."""

    def lend(self, held: Sequence[object]) -> None:
        """Write under locks that another process holds, and under none that this one takes meanwhile."""
        lent: Any = held
        self._lent |= dict(lent)

    def guard(self, lock: str, prefixes: Sequence[str], records: Sequence[str]) -> int:
        """Let writes below these keys through only while a lock is held; return its fence."""
        lease = self._lent.get(lock) or self._bucket.lease(lock)
        self._guards |= dict.fromkeys((*prefixes, *records), lease)
        self._records.update(records)
        return 0 if lease is None else lease.fence

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return what is there, or a part of it."""
        found = await elsewhere(self._get, key, byte_range)
        if found is None:
            await elsewhere(self.expected.refuse_missing, key, self._bucket.read)
        elif (most := self.expected.most.get(array_path(key))) is not None:
            refuse_bomb(found, most)
        return None if found is None else prototype.buffer.from_bytes(found)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return what is there, or parts of it."""
        return await asyncio.gather(*(self.get(key, prototype, byte_range) for key, byte_range in key_ranges))

    def _get(self, key: str, byte_range: ByteRequest | None) -> bytes | None:
        if byte_range is None and below(key, self._records) is not None:
            return self._get_record(key)
        with self._bucket.told():
            found = requests.get(self._bucket.objects, key, byte_range)
        self.expected.refuse_another(key, self._bucket)
        return None if found is None else found[0]

    def _get_record(self, key: str) -> bytes | None:
        """Read a record, and remember which it was; only then look at the lock, since who takes it over replaces it."""
        with self._bucket.told():
            found = requests.get(self._bucket.objects, key)
        if (lease := self._lease(key)) is not None:
            self._bucket.check_held(lease, key)
        self._seen[key] = None if found is None else found[1]
        return None if found is None else found[0]

    async def exists(self, key: str) -> bool:
        """Tell whether there is something."""
        return await elsewhere(self._bucket.exists, key)

    def list(self) -> AsyncIterator[str]:
        """Yield all keys."""
        return self.list_prefix("")

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield the keys below a prefix."""
        for key, _ in await elsewhere(self._bucket.files, prefix):
            yield key

    async def getsize(self, key: str) -> int:
        """Return the size of what is there."""
        found = await elsewhere(self._head, key)
        if found is None:
            raise FileNotFoundError(key)
        return found["size"]

    def _head(self, key: str) -> ObjectMeta | None:
        with self._bucket.told():
            return requests.head(self._bucket.objects, key)

    async def getsize_prefix(self, prefix: str) -> int:
        """Return the size of all that is below a prefix."""
        return sum(size for _, size in await elsewhere(self._bucket.files, prefix))

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the first parts of the keys below a prefix."""
        for name in await elsewhere(self._bucket.names, prefix):
            yield name

    async def delete(self, key: str) -> None:
        """Take out what is there, if the lock is still held."""
        check_writable(self)
        await elsewhere(self._delete, key)

    async def delete_dir(self, prefix: str) -> None:
        """Take out what is below a prefix, as long as the lock is held."""
        check_writable(self)
        for key, _ in await elsewhere(self._bucket.files, prefix.rstrip("/")):
            await elsewhere(self._delete, key)

    def _delete(self, key: str) -> None:
        self._bucket.check_held(self._lease(key), key)
        with self._bucket.told():
            requests.delete(self._bucket.objects, key)
        self._seen.pop(key, None)

    def remove(self, prefix: str) -> None:
        """Take out all keys below a prefix, the document at its top last."""
        self._bucket.remove(prefix)

    def _lease(self, key: str) -> Lease | None:
        guarded = below(key, self._guards)
        if guarded is not None:
            return self._guards[guarded]
        # What Ctrl-C left running, as Zarr does, is not to go on under the lock of whoever comes next.
        if self._declaring is None or self._declaring.token not in self._bucket.given_up:
            self._declaring = self._bucket.lease(DECLARING)
        return self._declaring

    async def set(self, key: str, value: Buffer) -> None:
        """Put an object, unless somebody else has replaced it."""
        await elsewhere(self.set_sync, key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        """Put an object, unless somebody else has replaced it."""
        check_writable(self)
        content: Any = value.as_buffer_like()
        lease, there, version = self._lease(key), self._bucket.objects, self._seen.get(key)
        records = below(key, self._records) is not None
        if records and version is None:
            self._bucket.check_held(lease, key)  # what is not there yet bears no fence
        with self._bucket.told():
            for _ in range(_TRIES):
                if put := requests.put(there, key, content, version):
                    self._seen[key] = put
                    return
                # First what is there, then whose it is to replace: whoever takes the lock over in between replaces
                # what is there, and the condition fails.
                if records:
                    if self._get_record(key) == bytes(content):
                        return  # it was put after all: what came back was the answer to a second try
                    raise ReplacedError(
                        f"{self._bucket.address}: another process has replaced {key}; --resume continues"
                    )
                version = requests.version(there, key)
                self._bucket.check_held(lease, key)
        raise UnreachableError(f"{self._bucket.address}: {key} is replaced by another process again and again")


def _read_elsewhere(bucket: Leased, expected: Expected) -> Guarded:
    store = Guarded(bucket, read_only=True)
    store.expected = expected
    return store
