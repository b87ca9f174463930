"""Packing: the small files of an experiment into a few, and out of them again when it is to be written.

Either way what is new is durable before anything refers to it, and what is old goes last, so that at each moment every
chunk is in a file of its own, in its shard, or the same in both. Nobody writes meanwhile: whoever packs holds the locks
of all slabs, and whoever is about to write has everything laid out as files first, under the declaration's lock.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import google_crc32c
import numpy as np
import zarr
from zarr.buffer.cpu import Buffer

from trajstore.errors import DamageError, WriteError
from trajstore.storage.format.schema import Schema
from trajstore.storage.places.durable import DurableStore
from trajstore.storage.places.packed import (
    ARCHIVE,
    MEMBER,
    NOWHERE,
    containers,
    grid_of,
    packed,
    parts,
    plain,
    shard_name,
)
from trajstore.storage.places.place import DOCUMENT, PARTIAL, TAKEN_OUT
from trajstore.storage.places.regular import below, contents, entries, inside
from trajstore.storage.places.removing import delete, make_durable, take_away
from trajstore.storage.writing.resume_slots import GROUP

__all__ = ["doubled", "is_packed", "lay_out", "open_to_write", "pack_files", "unreadable"]

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
    for container in doubled(store, name):
        _lay_out(store, container)
    for spec in schema.arrays():
        if spec.dims[0] in ("order", "seed"):
            _pack_array(store, f"{name}/{spec.name}", len(spec.dims))
    _pack_resume_states(store, name)


def lay_out(store: Any, name: str, give_up: Callable[[str], None] | None = None) -> None:  # noqa: ANN401
    """Have everything of an experiment lie in files of its own. Hold the declaration's lock.

    What cannot be read is damage, unless it may be given up: `give_up` takes away what has a key.
    """
    for container in _containers(store, name):
        _lay_out(store, container, give_up)


def _containers(store: Any, name: str) -> list[str]:  # noqa: ANN401
    return containers(store.root, name) if isinstance(store, DurableStore) else []  # objects are not packed


def _lay_out(store: DurableStore, container: str, give_up: Callable[[str], None] | None = None) -> None:
    try:
        there = parts(store.root, container)
    except ValueError as error:
        if give_up is None:
            name, how = container.partition("/")[0], "`trajstore verify --repair` takes it out"
            raise DamageError(f"experiment {name!r} is packed, and {error}; {how}") from None
        there = {}
    for key, part in there.items():
        if not inside(store.root, key).exists():
            _put(store, key, part.read())
    if not container.endswith(ARCHIVE):
        document = f"{container.rpartition('/')[0]}/{DOCUMENT}"
        said = contents(inside(store.root, document))
        if said is not None and (told := plain(said)) != said:
            _put(store, document, told)
    store.flush()
    path = inside(store.root, container)
    if there or give_up is None:
        path.unlink()
    else:
        give_up(container)
    make_durable(path.parent)  # or it could be there again one day, beside what is written from now on


def is_packed(store: Any, name: str) -> bool:  # noqa: ANN401
    """Tell whether something of an experiment, in the Zarr store of a place, is packed."""
    return bool(_containers(store, name))


def unreadable(store: Any, name: str) -> dict[str, str]:  # noqa: ANN401
    """Return in which files of a packed experiment nothing can be found → why."""
    found = {}
    for container in _containers(store, name):
        try:
            parts(store.root, container)
        except ValueError as error:
            found[container] = str(error)
    return found


def doubled(store: Any, name: str) -> list[str]:  # noqa: ANN401
    """Return in what an experiment is packed that lies in files as well: packing, or laying out, was stopped."""
    return [key for key in _containers(store, name) if any(_in_files(store.root, key.rpartition("/")[0]))]


def _in_files(root: Path, folder: str) -> Iterator[Path]:
    """Yield what lies in files of what could be packed: chunks of an array, or resume states."""
    top = inside(root, folder)
    for one in entries(top):
        if one.is_dir(follow_symlinks=False) and one.name != TAKEN_OUT:
            yield from (path for path in below(Path(one.path)) if path.is_file() and not path.name.endswith(PARTIAL))


def _pack_array(store: DurableStore, array: str, dimensions: int) -> None:
    shard, folder = f"{array}/{shard_name(dimensions)}", inside(store.root, f"{array}/c")
    if inside(store.root, shard).exists():
        if folder.is_dir():  # of records: the folders that locks were on
            delete(take_away(store.root, folder))
        return
    files, document = _small_files(store, array), contents(inside(store.root, f"{array}/{DOCUMENT}"))
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
    _put(store, shard, b"".join([*(content for _, content in sorted(chunks.items())), index, checksum]))
    _refuse_unlike(store, shard, files)
    _put(store, f"{array}/{DOCUMENT}", json.dumps(packed(json.loads(document or b"")), indent=2).encode())
    store.flush()
    delete(take_away(store.root, folder))


def _within(place: tuple[str, ...], grid: tuple[int, ...]) -> bool:
    """Tell whether a chunk is one of an array; else somebody's file lies among them, or growing died."""
    return len(place) == len(grid) and all(k.isdecimal() and int(k) < n for k, n in zip(place, grid, strict=True))


def _pack_resume_states(store: DurableStore, name: str) -> None:
    folder = f"{name}/{GROUP}"
    files = _small_files(store, folder)
    if not files or not all(MEMBER.fullmatch(key.removeprefix(f"{folder}/")) for key in files):
        return
    content = io.BytesIO()
    with ZipFile(content, "w", ZIP_STORED) as archive:
        for key, state in sorted(files.items()):
            archive.writestr(ZipInfo(key.removeprefix(f"{folder}/")), state)
    _put(store, f"{name}/{ARCHIVE}", content.getvalue())
    _refuse_unlike(store, f"{name}/{ARCHIVE}", files)
    for slot in sorted({key.removeprefix(f"{folder}/").partition("/")[0] for key in files}):
        delete(take_away(store.root, inside(store.root, f"{folder}/{slot}")))


def _small_files(store: DurableStore, folder: str) -> dict[str, bytes]:
    """Return what lies in files in the folder of an array, or of resume states, by key, if these are small."""
    paths = [*_in_files(store.root, folder)]
    sizes = [path.lstat().st_size for path in paths]
    if not paths or sum(sizes) > min(_MOST, _SMALL * len(sizes)):
        return {}
    keys = [path.relative_to(store.root).as_posix() for path in paths]
    return {key: inside(store.root, key).read_bytes() for key in keys}


def _refuse_unlike(store: DurableStore, container: str, files: dict[str, bytes]) -> None:
    """Make durable what was written, and read it, before it stands for the files."""
    store.flush()
    if {key: part.read() for key, part in parts(store.root, container).items()} != files:
        raise WriteError(f"{store.root}/{container} does not read as it was written; nothing was taken away")


def _put(store: DurableStore, key: str, content: bytes) -> None:
    store.set_sync(key, Buffer.from_bytes(content))
