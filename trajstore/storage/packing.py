"""Packing: the small files of an experiment into a few, and out of them again when it is to be written.

Either way what is new is durable before anything refers to it, and what is old goes last, so that at each moment every
chunk is in a file of its own, in its shard, or the same in both. Nobody writes meanwhile: whoever packs holds the locks
of all slabs, and whoever is about to write has everything laid out as files first, under the declaration's lock.
"""

from __future__ import annotations

import io
import json
import math
from typing import Any
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import google_crc32c
import numpy as np
import zarr
from zarr.buffer.cpu import Buffer

from trajstore.errors import WriteError
from trajstore.storage.local import DurableStore
from trajstore.storage.packed import ARCHIVE, NOWHERE, containers, grid_of, packed, parts, plain, shard_name
from trajstore.storage.place import DOCUMENT, PARTIAL
from trajstore.storage.regular import below, contents, inside
from trajstore.storage.removing import delete, make_durable, take_away
from trajstore.storage.resume import GROUP
from trajstore.storage.schema import Schema

__all__ = ["lay_out", "open_to_write", "pack_files"]

_SMALL = 2**15
"""Bytes of a file, on average, below which blocks of the disk are worth saving."""
_MOST = 2**28
"""Bytes of a shard: it is written at once."""


def open_to_write(store: Any, name: str) -> zarr.Group:  # noqa: ANN401
    """Open an experiment, in the Zarr store of a place, to write arrays: as files. Hold the declaration's lock."""
    lay_out(store, name)
    return zarr.open_group(store, path=name, mode="r+", zarr_format=3)


def pack_files(store: DurableStore, schema: Schema, name: str) -> None:
    """Pack what is in small files. Hold the declaration's lock, and those of all slabs."""
    lay_out(store, name)
    for spec in schema.arrays():
        if spec.dims[0] in ("order", "seed"):
            _pack_array(store, f"{name}/{spec.name}", len(spec.dims))
    _pack_resume_states(store, name)


def lay_out(store: Any, name: str) -> None:  # noqa: ANN401
    """Have everything of an experiment lie in files of its own. Hold the declaration's lock."""
    if not isinstance(store, DurableStore):
        return  # objects are not packed
    for container in containers(store.root, name):
        for key, part in parts(store.root, container).items():
            if not inside(store.root, key).exists():
                _put(store, key, part.read())
        if not container.endswith(ARCHIVE):
            document = f"{container.rpartition('/')[0]}/{DOCUMENT}"
            said = contents(inside(store.root, document))
            if said is not None and (told := plain(said)) != said:
                _put(store, document, told)
        store.flush()
        path = inside(store.root, container)
        path.unlink()
        make_durable(path.parent)  # or it could be there again one day, beside what is written from now on


def _pack_array(store: DurableStore, array: str, dimensions: int) -> None:
    files, document = _small_files(store, f"{array}/c"), contents(inside(store.root, f"{array}/{DOCUMENT}"))
    grid = grid_of(document, array)
    places = {tuple(key.removeprefix(f"{array}/c/").split("/")): content for key, content in files.items()}
    if not files or not all(_within(place, grid) for place in places):
        return
    spans, at = np.full((math.prod(grid), 2), NOWHERE, dtype="<u8"), 0
    chunks = {int(np.ravel_multi_index(tuple(map(int, place)), grid)): content for place, content in places.items()}
    for number, content in sorted(chunks.items()):
        spans[number] = at, len(content)
        at += len(content)
    index = spans.tobytes()
    checksum = google_crc32c.value(index).to_bytes(4, "little")
    shard = f"{array}/{shard_name(dimensions)}"
    _put(store, shard, b"".join([*(content for _, content in sorted(chunks.items())), index, checksum]))
    _refuse_unlike(store, shard, files)
    _put(store, f"{array}/{DOCUMENT}", json.dumps(packed(json.loads(document or b"")), indent=2).encode())
    store.flush()
    delete(take_away(store.root, inside(store.root, f"{array}/c")))


def _within(place: tuple[str, ...], grid: tuple[int, ...]) -> bool:
    """Tell whether a chunk is one of an array; else somebody's file lies among them, or growing died."""
    return len(place) == len(grid) and all(k.isdecimal() and int(k) < n for k, n in zip(place, grid, strict=True))


def _pack_resume_states(store: DurableStore, name: str) -> None:
    folder = f"{name}/{GROUP}"
    files = _small_files(store, folder)
    files.pop(f"{folder}/{DOCUMENT}", None)
    if not files:
        return
    content = io.BytesIO()
    with ZipFile(content, "w", ZIP_STORED) as archive:
        for key, state in sorted(files.items()):
            archive.writestr(ZipInfo(key.removeprefix(f"{folder}/")), state)
    _put(store, f"{name}/{ARCHIVE}", content.getvalue())
    _refuse_unlike(store, f"{name}/{ARCHIVE}", files)
    for slot in sorted({key.removeprefix(f"{folder}/").partition("/")[0] for key in files}):
        delete(take_away(store.root, inside(store.root, f"{folder}/{slot}")))


def _small_files(store: DurableStore, prefix: str) -> dict[str, bytes]:
    """Return what is below a prefix, by key, if it is in small files; what is being written is not there."""
    top, root = inside(store.root, prefix), store.root
    paths = [path for path in below(top) if path.is_file() and not path.name.endswith(PARTIAL)]
    sizes = [path.lstat().st_size for path in paths]
    if not paths or sum(sizes) > min(_MOST, _SMALL * len(sizes)):
        return {}
    keys = [path.relative_to(root).as_posix() for path in paths]
    return {key: inside(root, key).read_bytes() for key in keys}


def _refuse_unlike(store: DurableStore, container: str, files: dict[str, bytes]) -> None:
    """Make durable what was written, and read it, before it stands for the files."""
    store.flush()
    if {key: part.read() for key, part in parts(store.root, container).items()} != files:
        raise WriteError(f"{store.root}/{container} does not read as it was written; nothing was taken away")


def _put(store: DurableStore, key: str, content: bytes) -> None:
    store.set_sync(key, Buffer.from_bytes(content))
