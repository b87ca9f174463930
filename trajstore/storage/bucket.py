"""A store in an object store: S3, Google's, or this process's memory.

An object is there whole or not at all, and once put it stays, so nothing needs to be flushed. What has to be taken care
of is who writes: every object is put on condition that nobody else has replaced it since this process saw it, and what
fails that condition is tried again only after a look at the lock.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial, wraps
from pathlib import Path, PurePosixPath
from threading import Thread, current_thread, main_thread
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import MemoryStore, from_url
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.abc.store import Store as ZarrStore
from zarr.core.buffer import Buffer, BufferPrototype

from trajstore.errors import BusyError, ConfigurationError, UnreachableError
from trajstore.storage.leases import Lease, died, free, holder_of, is_own, taken
from trajstore.storage.place import DECLARING, DOCUMENT, Durability, ReplacedError

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta, UpdateVersion

__all__ = ["Bucket"]

P = ParamSpec("P")
T = TypeVar("T")

_LOCKS = "locks"
_AT_ONCE = 1_000
"""Objects that are deleted by one request, where the server knows how."""
_TRIES = 10
"""Conditional puts of one object before giving up: each fails only if somebody else's came between."""
_living: set[str] = set()
"""Tokens of the leases that this process holds."""


class Bucket:
    """A prefix of an object store. Beside it, at another prefix, are its locks."""

    beside: Path | None = None

    def __init__(self, url: str) -> None:
        self.address, self.only_here = url, url.startswith("memory://")
        self.objects, self._locks = _open(url), _open(f"{url}.traj")
        self._leases: dict[str, Lease] = {}
        self._proven, self._process = False, os.getpid()

    def __str__(self) -> str:
        return self.address

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
            raise UnreachableError(f"{self.address}: {_first_line(error)}") from None

    def read(self, key: str) -> bytes | None:
        """Return what is there, None where there is nothing."""
        with self.told():
            found = _get(self.objects, key)
        return None if found is None else found[0]

    def exists(self, key: str) -> bool:
        """Tell whether there is something."""
        with self.told():
            return _version(self.objects, key) is not None

    def files(self, prefix: str) -> list[tuple[str, int]]:
        """Return the keys below a prefix, in order, and their sizes."""
        with self.told():
            found = _below(self.objects, prefix)
        return sorted((meta["path"], meta["size"]) for meta in found)

    def folders(self) -> list[str]:
        """Return the first parts of all keys that have several, in order."""
        with self.told():
            return _level(self.objects, "")[0]

    def names(self, prefix: str) -> list[str]:
        """Return the first parts of all keys below a prefix, in order."""
        with self.told():
            folders, files = _level(self.objects, prefix)
        return sorted(PurePosixPath(path).name for path in (*folders, *files))

    def delete(self, key: str) -> None:
        """Take out what is there, if anything is."""
        self._delete([key])

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
            _delete(self.objects, keys)
        except BaseError as error:
            raise UnreachableError(f"{self}: {_first_line(error)}") from None

    @contextmanager
    def lock(self, name: str, what: str, patience: float = 0.0) -> Iterator[None]:
        """Hold a lock, waiting up to `patience` seconds; a BusyError names the holder."""
        self._prove()
        lease = self._take(f"{_LOCKS}/{name}", what, patience)
        _living.add(lease.token)
        self._leases[name] = lease
        try:
            yield
        except BaseException:
            # Something of what was begun may still be under way.
            with suppress(UnreachableError):
                self._release(name, lease, clean=False)
            raise
        self._release(name, lease, clean=True)

    def held(self, names: Sequence[str]) -> list[object]:
        """Return what another process needs to write under locks that this one holds."""
        return [(name, self._leases[name]) for name in (*names, DECLARING) if name in self._leases]

    def lend(self, held: Sequence[object]) -> None:
        """Write under locks that another process holds."""
        lent: Any = held
        self._leases |= dict(lent)

    def unlock(self) -> list[str]:
        """Take all locks away from their holders, which can write no more; return who held them."""
        with self.told():
            keys = sorted(meta["path"] for meta in _below(self._locks, _LOCKS))
            freed = [(key, self._free(key)) for key in keys]
        return [f"{key.removeprefix(f'{_LOCKS}/')}: {_named(holder)}" for key, holder in freed if holder is not None]

    def _free(self, key: str) -> dict[str, Any] | None:
        """Take a lock away from its holder, if it has one."""
        while True:
            found = _get(self._locks, key)
            holder = None if found is None else holder_of(found[0])
            if found is None or holder is None or _replace(self._locks, key, free(found[0], clean=False), found[1]):
                return holder

    def lease(self, name: str) -> Lease | None:
        """Return a lock as this process holds it."""
        return self._leases.get(name)

    def check_held(self, lease: Lease | None, key: str) -> None:
        """Refuse to write without a lock, or under one that was taken away."""
        if lease is None:
            raise BusyError(f"{self.address}: {key} may be written only under a lock, and none is held")
        with self.told():
            found = _get(self._locks, lease.key)
        holder = None if found is None else holder_of(found[0])
        if holder is None or holder["token"] != lease.token:
            now = "was taken away" if holder is None else f"was taken over by {_named(holder)}"
            name = lease.key.removeprefix(f"{_LOCKS}/")
            raise BusyError(f"{self.address}: the lock {name!r} {now}; nothing more is written, and --resume goes on")

    def keeper(self, *, read_only: bool, durability: Durability = "segment") -> ZarrStore:
        """Return the Zarr store; an object that was put is durable, whatever is asked for."""
        return _Guarded(self, read_only=read_only)

    def check(self) -> None:
        """Accept any prefix: what lies there is looked at by whoever reads it."""

    def make(self) -> None:
        """Refuse an object store that cannot tell two writers apart."""
        self._prove()

    def is_empty(self) -> bool:
        """Tell whether nothing is there."""
        with self.told():
            return not any(_level(self.objects, ""))

    def _prove(self) -> None:
        """Try whether conditions are honoured: some servers accept them and do not look."""
        if self._proven:
            return
        key = f"probe/{uuid.uuid4().hex}"
        with self.told():
            first = _create(self._locks, key, b"1") or _version(self._locks, key) or {}
            try:
                created_twice = _create(self._locks, key, b"2")
                second = _replace(self._locks, key, b"2", first)
                replaced_twice = _replace(self._locks, key, b"3", first)
            finally:
                _delete(self._locks, key)
        if created_twice or second is None or replaced_twice:
            raise ConfigurationError(
                f"{self.address} does not honour conditional puts, so two writers could not be told apart; "
                "record into a folder, and copy it there when it is done"
            )
        self._proven = True

    def _take(self, key: str, what: str, patience: float) -> Lease:
        deadline, lease = time.monotonic() + patience, None
        while True:
            with self.told():
                found = _get(self._locks, key)
                holder = None if found is None else holder_of(found[0])
                if lease is not None and holder is not None and holder["token"] == lease.token:
                    return lease  # it was put after all: what came back was the answer to a second try
                forgotten = holder is not None and is_own(holder) and holder["token"] not in _living
                if holder is None or forgotten or died(holder):
                    lease, document = taken(key, None if found is None else found[0])
                    if found is None:
                        done = _create(self._locks, key, document)
                    else:
                        done = _replace(self._locks, key, document, found[1])
                    if done:
                        return lease
                    continue  # somebody came between: look again
            if time.monotonic() >= deadline:
                raise BusyError(
                    f"{what} is being written by {_named(holder)}; wait for it or stop it, "
                    f"or, if it has died, `trajstore unlock {self.address}`"
                )
            time.sleep(0.2)

    def _release(self, name: str, lease: Lease, *, clean: bool) -> None:
        _living.discard(lease.token)
        if self._leases.get(name) is lease:
            del self._leases[name]
        if lease.process != os.getpid():
            return
        with self.told():
            found = _get(self._locks, lease.key)
            holder = None if found is None else holder_of(found[0])
            if found is not None and holder is not None and holder["token"] == lease.token:
                _replace(self._locks, lease.key, free(found[0], clean=clean), found[1])


class _Guarded(ZarrStore):
    """Zarr's view of a bucket: every put is conditional.

    Requests are made by threads that wait for their answers. obstore could do without them, but its own threads still
    need the interpreter for a moment after they have answered, and a process that ends in this moment is aborted, with
    everything done and written.
    """

    supports_writes = supports_deletes = supports_listing = True

    def __init__(self, bucket: Bucket, *, read_only: bool) -> None:
        super().__init__(read_only=read_only)
        self._bucket = bucket
        self._seen: dict[str, UpdateVersion | None] = {}
        """Key → the version that this process put there, or, of records, read there; None: that there was none."""
        self._guards: dict[str, Lease | None] = {}
        """Prefix → the lock under which to write below it."""
        self._records: set[str] = set()
        """Prefixes of records, which are replaced only as they were seen."""

    def __str__(self) -> str:
        return self._bucket.address

    def __repr__(self) -> str:
        return f"<{self}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Guarded) and (self._bucket, self.read_only) == (other._bucket, other.read_only)

    def with_read_only(self, read_only: bool = False) -> _Guarded:
        """Return the same store, read-only or not."""
        return _Guarded(self._bucket, read_only=read_only)

    def flush(self) -> None:
        """Do nothing: what was put is durable."""

    def guard(self, lock: str, prefixes: Sequence[str], records: Sequence[str]) -> int:
        """Let writes below these keys through only while a lock is held; return its fence."""
        lease = self._bucket.lease(lock)
        self._guards |= dict.fromkeys((*prefixes, *records), lease)
        self._records.update(records)
        return 0 if lease is None else lease.fence

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return what is there, or a part of it."""
        found = await _elsewhere(self._get, key, byte_range)
        return None if found is None else prototype.buffer.from_bytes(found)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return what is there, or parts of it."""
        return await asyncio.gather(*(self.get(key, prototype, byte_range) for key, byte_range in key_ranges))

    def _get(self, key: str, byte_range: ByteRequest | None) -> bytes | None:
        if byte_range is None and _prefix_of(key, self._records) is not None:
            return self._get_record(key)
        with self._bucket.told():
            found = _get(self._bucket.objects, key, byte_range)
        return None if found is None else found[0]

    def _get_record(self, key: str) -> bytes | None:
        """Read a record, and remember which it was; only then look at the lock, since who takes it over replaces it."""
        with self._bucket.told():
            found = _get(self._bucket.objects, key)
        if (lease := self._lease(key)) is not None:
            self._bucket.check_held(lease, key)
        self._seen[key] = None if found is None else found[1]
        return None if found is None else found[0]

    async def exists(self, key: str) -> bool:
        """Tell whether there is something."""
        return await _elsewhere(self._bucket.exists, key)

    def list(self) -> AsyncIterator[str]:
        """Yield all keys."""
        return self.list_prefix("")

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield the keys below a prefix."""
        for key, _ in await _elsewhere(self._bucket.files, prefix):
            yield key

    async def getsize_prefix(self, prefix: str) -> int:
        """Return the size of all that is below a prefix."""
        return sum(size for _, size in await _elsewhere(self._bucket.files, prefix))

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the first parts of the keys below a prefix."""
        for name in await _elsewhere(self._bucket.names, prefix):
            yield name

    async def delete(self, key: str) -> None:
        """Take out what is there, if the lock is still held."""
        self._check_writable()
        await _elsewhere(self._delete, key)

    async def delete_dir(self, prefix: str) -> None:
        """Take out what is below a prefix, as long as the lock is held."""
        self._check_writable()
        for key, _ in await _elsewhere(self._bucket.files, prefix.rstrip("/")):
            await _elsewhere(self._delete, key)

    def _delete(self, key: str) -> None:
        self._bucket.check_held(self._lease(key), key)
        with self._bucket.told():
            _delete(self._bucket.objects, key)
        self._seen.pop(key, None)

    def remove(self, prefix: str) -> None:
        """Take out all keys below a prefix, the document at its top last."""
        self._bucket.remove(prefix)

    def _lease(self, key: str) -> Lease | None:
        guarded = _prefix_of(key, self._guards)
        return self._bucket.lease(DECLARING) if guarded is None else self._guards[guarded]

    async def set(self, key: str, value: Buffer) -> None:
        """Put an object, unless somebody else has replaced it."""
        await _elsewhere(self.set_sync, key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        """Put an object, unless somebody else has replaced it."""
        self._check_writable()
        content: Any = value.as_buffer_like()
        lease, objects, version = self._lease(key), self._bucket.objects, self._seen.get(key)
        records = _prefix_of(key, self._records) is not None
        if records and version is None:
            self._bucket.check_held(lease, key)  # what is not there yet bears no fence
        with self._bucket.told():
            for _ in range(_TRIES):
                put = _create(objects, key, content) if version is None else _replace(objects, key, content, version)
                if put:
                    self._seen[key] = put
                    return
                # First what is there, then whose it is to replace: whoever takes the lock over in between replaces
                # what is there, and the condition fails.
                if records:
                    if self._get_record(key) == bytes(content):
                        return  # it was put after all: what came back was the answer to a second try
                    raise ReplacedError(f"{self._bucket.address}: somebody else has replaced {key}; --resume goes on")
                version = _version(objects, key)
                self._bucket.check_held(lease, key)
        raise UnreachableError(f"{self._bucket.address}: {key} is replaced by somebody else again and again")


def _in_a_thread(request: Callable[..., T], *arguments: Any) -> Future[T]:  # noqa: ANN401
    """Make a request in a thread for which the end of the process does not wait."""
    answer: Future[T] = Future()

    def make() -> None:
        try:
            answer.set_result(request(*arguments))
        except BaseException as error:
            answer.set_exception(error)

    Thread(target=make, name="bucket", daemon=True).start()
    return answer


async def _elsewhere(request: Callable[..., T], *arguments: Any) -> T:  # noqa: ANN401
    return await asyncio.wrap_future(_in_a_thread(request, *arguments))


def _heard(request: Callable[P, T]) -> Callable[P, T]:
    """Let the main thread hear Ctrl-C while it waits for an answer."""

    @wraps(request)
    def made(*arguments: P.args, **named: P.kwargs) -> T:
        if current_thread() is not main_thread():
            return request(*arguments, **named)
        return _in_a_thread(partial(request, *arguments, **named)).result()

    return made


def _prefix_of(key: str, prefixes: Container[str]) -> str | None:
    """Return which of some prefixes a key lies below."""
    return next((str(parent) for parent in PurePosixPath(key).parents if str(parent) in prefixes), None)


def _open(url: str) -> Any:  # noqa: ANN401
    if url.startswith("memory://"):
        return MemoryStore()
    try:
        return from_url(url)
    except (BaseError, ValueError) as error:
        raise ConfigurationError(f"{url}: {_first_line(error)}") from None


@_heard
def _get(objects: Any, key: str, part: ByteRequest | None = None) -> tuple[bytes, UpdateVersion] | None:  # noqa: ANN401
    try:
        found = obstore.get(objects, key, options=_options(part))
    except FileNotFoundError:
        return None
    return bytes(found.bytes()), _condition(found.meta)


def _options(part: ByteRequest | None) -> GetOptions | None:
    match part:
        case RangeByteRequest(start, end):
            return {"range": (start, end)}
        case OffsetByteRequest(offset):
            return {"range": {"offset": offset}}
        case SuffixByteRequest(suffix):
            return {"range": {"suffix": suffix}}
    return None


@_heard
def _version(objects: Any, key: str) -> UpdateVersion | None:  # noqa: ANN401
    try:
        return _condition(obstore.head(objects, key))
    except FileNotFoundError:
        return None


@_heard
def _create(objects: Any, key: str, content: Any) -> UpdateVersion | None:  # noqa: ANN401
    """Put an object where there is none; return None where there is one."""
    try:
        return _condition(obstore.put(objects, key, content, mode="create"))
    except AlreadyExistsError:
        return None


@_heard
def _replace(objects: Any, key: str, content: Any, version: UpdateVersion) -> UpdateVersion | None:  # noqa: ANN401
    """Put an object in the place of a version; return None where that is not there any more."""
    try:
        return _condition(obstore.put(objects, key, content, mode=version))
    except (PreconditionError, FileNotFoundError):
        return None


@_heard
def _delete(objects: Any, keys: str | list[str]) -> None:  # noqa: ANN401
    with suppress(FileNotFoundError):
        obstore.delete(objects, keys)


@_heard
def _below(objects: Any, prefix: str) -> list[ObjectMeta]:  # noqa: ANN401
    return [meta for page in obstore.list(objects, prefix or None) for meta in page]


@_heard
def _level(objects: Any, prefix: str) -> tuple[list[str], list[str]]:  # noqa: ANN401
    """Return what goes on below a prefix, and what lies there itself."""
    found = obstore.list_with_delimiter(objects, prefix or None)
    return sorted(found["common_prefixes"]), sorted(meta["path"] for meta in found["objects"])


def _condition(meta: Any) -> UpdateVersion:  # noqa: ANN401
    return {name: meta[name] for name in ("e_tag", "version") if meta.get(name) is not None}  # type: ignore[return-value]


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder['process']} on {holder['host']} since {holder['since']}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].strip() if str(error).strip() else type(error).__name__
