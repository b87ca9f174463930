"""Requests to an object store. An object is there whole or not at all, and can be put on condition of what is there.

obstore could wait for answers without a thread, but its own threads still need the interpreter for a moment after they
have answered, and a process that ends in this moment is aborted, with everything done and written. So each request is
made by a thread that waits, and one of the main thread by another, so that Ctrl-C is heard.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial, wraps
from threading import Thread, current_thread, main_thread
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import MemoryStore, from_url
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest

from trajstore.errors import ConfigurationError

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta, UpdateVersion

__all__ = [
    "below",
    "create",
    "delete",
    "elsewhere",
    "first_line",
    "get",
    "head",
    "in_a_thread",
    "level",
    "opened",
    "put",
    "replace",
    "version",
    "waited",
    "why",
]

P = ParamSpec("P")
T = TypeVar("T")


def in_a_thread(request: Callable[..., T], *arguments: Any) -> Future[T]:  # noqa: ANN401
    """Make a request in a thread for which the end of the process does not wait."""

    def make(answer: Future[T]) -> None:
        try:
            answer.set_result(request(*arguments))
        except BaseException as error:
            answer.set_exception(error)
        finally:
            del answer  # the error holds this frame, and would hold itself, and what was to be put

    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # who waits may give up; the request goes on
    Thread(target=make, args=(future,), name="bucket", daemon=True).start()
    return future


async def elsewhere(request: Callable[..., T], *arguments: Any) -> T:  # noqa: ANN401
    """Make a request in a thread, while others go on in this one."""
    return await asyncio.wrap_future(in_a_thread(request, *arguments))


def waited(request: Callable[..., T], *arguments: Any, patience: float | None = None) -> T:  # noqa: ANN401
    """Let the main thread hear Ctrl-C while it waits for an answer, for so many seconds."""
    # While Python ends no thread can be started.
    if sys.is_finalizing() or current_thread() is not main_thread():
        return request(*arguments)
    return in_a_thread(request, *arguments).result(patience)


def _heard(request: Callable[P, T]) -> Callable[P, T]:
    @wraps(request)
    def made(*arguments: P.args, **named: P.kwargs) -> T:
        return waited(partial(request, *arguments, **named))

    return made


def opened(url: str) -> Any:  # noqa: ANN401
    """Return what requests for a prefix go to."""
    if url.startswith("memory://"):
        return MemoryStore()
    try:
        return from_url(url)
    except (BaseError, ValueError) as error:
        raise ConfigurationError(f"{url}: {first_line(error)}") from None


@_heard
def get(objects: Any, key: str, part: ByteRequest | None = None) -> tuple[bytes, UpdateVersion] | None:  # noqa: ANN401
    """Return an object, or a part of it, and which it is; None where there is none."""
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
def head(objects: Any, key: str) -> ObjectMeta | None:  # noqa: ANN401
    """Return what there is to say of an object, None where there is none."""
    try:
        return obstore.head(objects, key)
    except FileNotFoundError:
        return None


def version(objects: Any, key: str) -> UpdateVersion | None:  # noqa: ANN401
    """Return which object is there, None where there is none."""
    found = head(objects, key)
    return None if found is None else _condition(found)


@_heard
def create(objects: Any, key: str, content: Any) -> UpdateVersion | None:  # noqa: ANN401
    """Put an object where there is none; return None where there is one."""
    try:
        return _condition(obstore.put(objects, key, content, mode="create"))
    except AlreadyExistsError:
        return None


@_heard
def replace(objects: Any, key: str, content: Any, version: UpdateVersion) -> UpdateVersion | None:  # noqa: ANN401
    """Put an object in the place of a version; return None where that is not there any more."""
    try:
        return _condition(obstore.put(objects, key, content, mode=version))
    except (PreconditionError, FileNotFoundError):
        return None


def put(objects: Any, key: str, content: Any, version: UpdateVersion | None) -> UpdateVersion | None:  # noqa: ANN401
    """Put an object in the place of a version, or of none; return None where something else is there."""
    return create(objects, key, content) if version is None else replace(objects, key, content, version)


def delete(objects: Any, keys: str | list[str]) -> None:  # noqa: ANN401
    """Take out what is there. It knows no conditions, so none may be under way any more when a lock is freed."""
    with suppress(FileNotFoundError):
        obstore.delete(objects, keys)


@_heard
def below(objects: Any, prefix: str) -> list[ObjectMeta]:  # noqa: ANN401
    """Return what there is to say of all objects below a prefix."""
    return [meta for page in obstore.list(objects, prefix or None) for meta in page]


@_heard
def level(objects: Any, prefix: str) -> tuple[list[str], list[str]]:  # noqa: ANN401
    """Return what goes on below a prefix, and what lies there itself."""
    found = obstore.list_with_delimiter(objects, prefix or None)
    return sorted(found["common_prefixes"]), sorted(meta["path"] for meta in found["objects"])


def _condition(meta: Any) -> UpdateVersion:  # noqa: ANN401
    return {name: meta[name] for name in ("e_tag", "version") if meta.get(name) is not None}  # type: ignore[return-value]


def first_line(error: Exception) -> str:
    """Return what an error says, without what obstore adds for its developers."""
    return str(error).strip().splitlines()[0].strip() if str(error).strip() else type(error).__name__


def why(error: Exception, url: str) -> str:
    """Return what an error says, and what to do about the two that come first: no bucket, and no encryption."""
    text, line = str(error), first_line(error)
    if "NoSuchBucket" in text or ("list request" in line and "404" in line):
        bucket = url.partition("://")[2].partition("/")[0]
        return (
            f"there is no bucket {bucket!r} (404 Not Found); make it first, or check its name, and the region and "
            "endpoint in the environment"
        )
    if "builder error" in text and " http://" in text:
        return "its endpoint is http://, which is not encrypted; set AWS_ALLOW_HTTP=true if that is meant"
    return line
