"""Packed: what lay in thousands of small files lies in a few, and is seen as if it lay as before.

A file takes a block of the disk at least, and a folder another, so that a slab of a few kilobytes takes a hundred.
Packed, the chunks of an array lie one behind the other in a shard, as Zarr itself knows it, and the resume states in a
zip archive. Here they are found by the keys that they had, so that nothing above knows a difference.

Where both are there, the file of its own counts. Whoever writes has everything lie in files first: see `packing`.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest

from trajstore._common.system import is_file, opening
from trajstore.errors import DamageError
from trajstore.storage.places.place import DOCUMENT
from trajstore.storage.places.regular import contents, inside, refuse_more
from trajstore.storage.writing.resume_slots import GROUP

__all__ = [
    "ARCHIVE",
    "MEMBER",
    "NOWHERE",
    "Part",
    "as_files",
    "containers",
    "find",
    "grid_of",
    "listed",
    "packed",
    "partly",
    "parts",
    "plain",
    "shard_name",
]

ARCHIVE = f"{GROUP}/packed.zip"
"""Where in an experiment its resume states are."""
_SHARDS = ("c.0.0.0", "c.0.0.0.0")
"""The name of an array's shard, for three and for four dimensions: all of it is one, the first along each."""
MEMBER = re.compile(r"[^/\\\0]+\.[0-9]+\.[01]/(zarr\.json|c/0)")
_LENGTHS = 26
"""Where in the head of a member stand the lengths of what follows it: of its name, and of more."""
NOWHERE = 2**64 - 1
"""Where in a shard a chunk is that was never written."""
_CHECKED = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
_TRIES = 3
Version = tuple[int, int, int, int]


class Part(NamedTuple):
    """What was a file once."""

    path: Path
    """What it lies in."""
    version: Version
    offset: int
    size: int
    headed: bool = False
    """Before it lie its name and more: it is a member of an archive."""

    def read(self, most: int | None = None) -> bytes:
        """Return its bytes; a FileNotFoundError where it does not lie there any more."""
        if most is not None:
            refuse_more(self.path, self.size, most)
        with opening(lambda: self.path.open("rb"), self.path) as file:
            if _version(os.fstat(file.fileno())) != self.version:
                raise FileNotFoundError(self.path)
            file.seek(self.offset)
            if self.headed:
                file.seek(self.offset + _LENGTHS)
                file.seek(sum(int.from_bytes(file.read(2), "little") for _ in range(2)), os.SEEK_CUR)
            content = file.read(self.size)
        if len(content) < self.size:
            raise ValueError(f"{self.path} does not hold what it says that it holds")
        return content


def as_files(root: Path, key: str, content: bytes | None, most: int | None = None) -> bytes | None:
    """Return what there is at a key, as if nothing were packed, when `content` is in the file there, if there is one.

    None where there is nothing.
    """
    if content is not None:
        return plain(content) if key.endswith(DOCUMENT) else content
    for _ in range(_TRIES):
        if (part := find(root, key)) is None:
            break
        _found.add(part.path)
        with suppress(FileNotFoundError):  # it was laid out as files just now, or packed anew
            return part.read(most)
    if (container := _container(key)) is not None and root / container in _found:
        return contents(inside(root, key), most)
    return None


_found = set[Path]()
"""In what this process has found something."""


def find(root: Path, key: str) -> Part | None:
    """Return what lies packed in a store and had a key once; None where nothing does."""
    if (container := _container(key)) is None:
        return None
    try:
        return parts(root, container).get(key)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        name, how = key.partition("/")[0], "restore it from a copy, or have `trajstore verify --repair` take it out"
        raise DamageError(f"experiment {name!r} is packed, and {error}; {how}") from None


def shard_name(dimensions: int) -> str:
    """Return the name of an array's shard."""
    return f"c{'.0' * dimensions}"


def _container(key: str) -> str | None:
    """Return the key of what something would lie in if it were packed, None where it never does."""
    experiment, _, rest = key.partition("/")
    array, _, chunk = rest.partition("/")
    numbers = chunk.split("/")[1:]
    if array == GROUP:
        return f"{experiment}/{ARCHIVE}"
    shard = shard_name(len(numbers))
    return f"{experiment}/{array}/{shard}" if chunk.startswith("c/") and shard in _SHARDS else None


def parts(root: Path, container: str) -> Mapping[str, Part]:
    """Return what lies in a container, by the keys that it had; a ValueError where that cannot be told."""
    path = inside(root, container)
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is no file")
    version = _version(status)
    if container.endswith(ARCHIVE):
        return _archive(path, version, container.removesuffix(ARCHIVE))
    array = container.rpartition("/")[0]
    document = inside(root, f"{array}/{DOCUMENT}")
    return _shard(path, version, array, document, _version(document.lstat()) if is_file(document) else None)


def containers(root: Path, experiment: str) -> list[str]:
    """Return the keys of what an experiment is packed in, none where it is not."""
    folder = inside(root, experiment)
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        arrays = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    asked = [f"{experiment}/{array}/{shard}" for array in arrays for shard in _SHARDS]
    return [key for key in (*asked, f"{experiment}/{ARCHIVE}") if is_file(inside(root, key))]


def listed(root: Path, prefix: str, files: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return the keys below a prefix and their sizes, as if nothing were packed, from those of the `files` there."""
    experiment, *rest = prefix.split("/")
    asked = [f"{experiment}/{ARCHIVE}"] if rest[:1] == [GROUP] else []
    if rest[1:] and rest[0] != GROUP:
        asked = [f"{experiment}/{rest[0]}/{shard}" for shard in _SHARDS]
    found = dict(files)
    for container in [*asked, *(key for key in found if _is_container(key))]:
        try:
            there = parts(root, container)
        except (FileNotFoundError, ValueError):
            continue  # what cannot be read stays what it is, a file
        found.pop(container, None)
        for key, part in there.items():
            if key.startswith(f"{prefix}/" if prefix else "") or key == prefix:
                found.setdefault(key, part.size)
    return sorted(found.items(), key=lambda one: one[0].split("/"))


def _is_container(key: str) -> bool:
    rest = key.partition("/")[2]
    return rest == ARCHIVE or (rest.count("/") == 1 and rest.partition("/")[2] in _SHARDS)


@lru_cache(maxsize=512)
def _shard(path: Path, version: Version, array: str, document: Path, said: Version | None) -> Mapping[str, Part]:
    """Return what lies in a shard at a version; `said` is that of the array's document, of which another is read."""
    grid = grid_of(None if said is None else contents(document), array)
    if len(grid) != path.name.count("."):
        raise ValueError(f"{path} has another number of dimensions than its array")
    count = math.prod(grid)
    length = 16 * count + 4
    if length > version[2]:
        raise ValueError(f"{path} is shorter than the list of what is in it")
    with opening(lambda: path.open("rb"), path) as file:
        if _version(os.fstat(file.fileno())) != version:
            raise FileNotFoundError(path)
        file.seek(-length, os.SEEK_END)
        index = file.read(length)
    if google_crc32c.value(index[:-4]) != int.from_bytes(index[-4:], "little"):
        raise ValueError(f"{path}: the list of what is in it does not match its checksum")
    spans: NDArray[np.uint64] = np.frombuffer(index[:-4], "<u8").reshape(-1, 2)
    there = np.flatnonzero((spans != NOWHERE).all(axis=-1))
    end = version[2] - length
    if any(int(offset) + int(size) > end for offset, size in spans[there].tolist()):
        raise ValueError(f"{path}: the list of what is in it leads beyond its end")
    keys = zip(*(axis.tolist() for axis in np.unravel_index(there, grid)), strict=True)
    return {
        f"{array}/c/{'/'.join(map(str, index))}": Part(path, version, offset, size)
        for index, (offset, size) in zip(keys, spans[there].tolist(), strict=True)
    }


@lru_cache(maxsize=16)
def _archive(path: Path, version: Version, experiment: str) -> Mapping[str, Part]:
    try:
        with opening(lambda: ZipFile(path), path) as archive:
            members = archive.infolist()
    except (BadZipFile, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} is no archive, or damaged ({error})") from None
    if not all(MEMBER.fullmatch(one.filename) for one in members):
        raise ValueError(f"{path} holds something else than resume states")
    if any(one.header_offset < 0 or one.header_offset + one.file_size > version[2] for one in members):
        raise ValueError(f"{path} is shorter than what it says that it holds")
    if any(one.compress_type != ZIP_STORED or one.file_size != one.compress_size for one in members):
        raise ValueError(f"{path} is compressed, as no archive of a store is")
    return {
        f"{experiment}{GROUP}/{one.filename}": Part(path, version, one.header_offset, one.file_size, headed=True)
        for one in members
    }


def _version(status: os.stat_result) -> Version:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def grid_of(document: bytes | None, array: str) -> tuple[int, ...]:
    """Return how many chunks an array has along each dimension, by its document, whether it is packed or not."""
    try:
        said = json.loads(plain(document or b""))
        shape, chunks = said["shape"], said["chunk_grid"]["configuration"]["chunk_shape"]
        return tuple(-(-n // c) for n, c in zip(shape, chunks, strict=True))
    except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
        raise ValueError(
            f"{array}/{DOCUMENT} is damaged or missing, and what is packed cannot be read without"
        ) from None


def partly(content: bytes, part: ByteRequest | None) -> bytes:
    """Return what is asked for of some bytes."""
    match part:
        case RangeByteRequest(start, end):
            return content[start:end]
        case OffsetByteRequest(offset):
            return content[offset:]
        case SuffixByteRequest(suffix):
            return content[-suffix:] if suffix else b""
    return content


def plain(document: bytes) -> bytes:
    """Return the document of an array as it is when the array is not packed; anything else as it is."""
    if b"sharding_indexed" not in document:
        return document
    try:
        said = json.loads(document)
        inner = said["codecs"][0]["configuration"]
        told = said | {"codecs": inner["codecs"]}
        told["chunk_grid"] = {"name": "regular", "configuration": {"chunk_shape": inner["chunk_shape"]}}
        told["chunk_key_encoding"] = _encoding("/")
        if packed(told) == said:
            return json.dumps(told, indent=2).encode()
    except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
        pass
    return document  # of somebody else's: whoever opens the array refuses it


def packed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document of an array as it is when all of it is one shard."""
    inner = document["chunk_grid"]["configuration"]["chunk_shape"]
    whole = [-(-n // c) * c for n, c in zip(document["shape"], inner, strict=True)]
    shard = {"chunk_shape": inner, "codecs": document["codecs"], "index_codecs": _CHECKED, "index_location": "end"}
    return {
        **document,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": whole}},
        "chunk_key_encoding": _encoding("."),
        "codecs": [{"name": "sharding_indexed", "configuration": shard}],
    }


def _encoding(separator: str) -> dict[str, Any]:
    return {"name": "default", "configuration": {"separator": separator}}
