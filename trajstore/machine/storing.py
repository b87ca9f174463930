"""Does the file system keep its promises where stores are to lie, and do codecs give back what they were given?"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore

from trajstore._common.units import human_bytes
from trajstore.errors import BusyError, WriteError
from trajstore.machine import State, check
from trajstore.storage.format.codecs import CODECS, Codec, chunk_codecs, write_block
from trajstore.storage.places.opening import place_of
from trajstore.storage.places.place import slab_folder, slab_lock
from trajstore.storage.states import States

__all__ = ["locked_as_for_recording"]

_SLOW_FSYNC = 0.05
"""Seconds from which making a file durable slows recordings down."""
_NETWORK = (
    "nfs",
    "cifs",
    "smb",
    "9p",
    "fuse.sshfs",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "glusterfs",
    "afs",
    "fuse.gcs",
)
_IN_MEMORY = ("tmpfs", "ramfs")
_LITTLE_ROOM = 2**30
_TAKE = """
import sys
from pathlib import Path
from trajstore.errors import BusyError
from trajstore.machine.storing import locked_as_for_recording
try:
    with locked_as_for_recording(Path(sys.argv[1])):
        print("taken")
except BusyError:
    print("refused")
"""
_SLAB = "doctor", "forward", 0


@contextmanager
def locked_as_for_recording(store: Path) -> Iterator[None]:
    """Hold all the locks that the writer of a slab holds: on a file beside a store, and on a folder in it."""
    with place_of(store).lock(slab_lock(*_SLAB), "it") as also:
        also(slab_folder(_SLAB[0], (0, 0)))
        yield


@check("locks", "Do the locks of a recording keep a second writer out, in this process and in another?")
def _locks(folder: Path) -> Iterator[tuple[State, str, str, Mapping[str, Any]]]:
    (store := folder / "locked.zarr").mkdir()
    remedy = "keep stores on another file system; here two writers can damage one"
    ways = {"by the same path": store}
    if _works(os.symlink, folder, "linked"):
        (linked := folder / "linked.zarr").symlink_to(store.absolute())
        ways["through a symbolic link"] = linked

    def elsewhere(path: Path) -> str:
        told = subprocess.run([sys.executable, "-c", _TAKE, str(path)], capture_output=True, text=True, check=False)
        return told.stdout.strip() or (told.stderr.strip().splitlines() or ["it says nothing"])[-1]

    try:
        with locked_as_for_recording(store):
            try:
                with locked_as_for_recording(store):
                    yield "wrong", "a lock was taken twice by one process", remedy, {}
                    return
            except BusyError:
                pass
            held = {way: elsewhere(path) for way, path in ways.items()}
            # Then only the lock within the store is left, as for whoever comes by another mount.
            shutil.rmtree(folder / f"{store.name}.traj")
            held["when the folder beside the store was deleted"] = elsewhere(store)
    except WriteError as error:
        yield "wrong", str(error), remedy, {}
        return
    freed = elsewhere(store)
    figures = {"held": held, "freed": freed}
    if failed := [f"{told} {way}" for way, told in held.items() if told != "refused"]:
        yield "wrong", f"another process, while the lock was held: {'; '.join(failed)}", remedy, figures
    elif freed != "taken":
        yield "wrong", f"another process, after the lock was freed: {freed}", remedy, figures
    else:
        yield "good", "a lock that is held keeps others out, and is free afterwards", "", figures


@check("fsync", "Can a file be made durable, and how long does it take?")
def _fsync(folder: Path) -> Iterator[tuple[State, str, str, Mapping[str, Any]]]:
    taken = []
    for k in range(12):
        begun = time.perf_counter()
        with (folder / f"{k}").open("wb") as file:
            file.write(bytes(65_536))
            file.flush()
            os.fsync(file.fileno())
        above = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(above)
        finally:
            os.close(above)
        taken.append(time.perf_counter() - begun)
    usual = statistics.median(taken)
    figures, told = {"seconds": usual, "longest": max(taken)}, f"64 kB are durable after {usual * 1e3:.1f} ms"
    if usual > _SLOW_FSYNC:
        remedy = "record with --durability none where a power cut may cost the recording, or on another disk"
        yield "slow", told, remedy, figures
    else:
        yield "good", told, "", figures


@check("renaming", "Does a file that is replaced always show its old content or its new?")
def _renaming(folder: Path) -> Iterator[tuple[State, str, str, Mapping[str, Any]]]:
    file, size, torn, done = folder / "replaced", 100_000, list[str](), threading.Event()
    file.write_bytes(bytes(size))

    def read() -> None:
        while not done.is_set():
            try:
                content = file.read_bytes()
            except FileNotFoundError:
                torn.append("it was not there")
                continue
            if len(content) != size or len(set(content)) != 1:
                torn.append("it was half written")

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for k in range(200):
            partial = folder / "partial"
            partial.write_bytes(bytes([k % 256]) * size)
            partial.replace(file)
    finally:
        done.set()
        reader.join()
    if torn:
        told = f"a file that was replaced was seen otherwise {len(torn)} times: {torn[0]}"
        yield "wrong", told, "keep stores on another file system", {"torn": len(torn)}
    else:
        yield "good", "200 replacements, each seen whole", "", {"torn": 0}


@check("disk", "What kind of file system is it, and how much room is there?")
def _disk(folder: Path) -> Iterator[tuple[State, str, str, Mapping[str, Any]]]:
    kind, room = _kind_of(folder), shutil.disk_usage(folder)
    links = {"symbolic": _works(os.symlink, folder, "a"), "hard": _works(os.link, folder, "b")}
    (folder / "Case").touch()
    cases = not (folder / "case").exists()
    figures = {"kind": kind, "free": room.free, "links": links, "tells_cases": cases}
    able = [f"{name} links" for name, works in links.items() if works] + ["upper and lower case"] * cases
    told = f"{kind}, {human_bytes(room.free)} free; it knows {', '.join(able) or 'no links'}"
    if kind.startswith(_NETWORK):
        remedy = "let one machine at a time write a store, or keep it in a bucket"
        yield "doubtful", f"{told}; on a network, locks may not hold between machines", remedy, figures
    elif kind in _IN_MEMORY:
        yield "doubtful", f"{told}; it lies in memory and is gone after a restart", "keep stores on a disk", figures
    elif room.free < _LITTLE_ROOM:
        yield "doubtful", f"{told}, which is little", "make room, or record fewer states (--dry-run tells)", figures
    else:
        yield "good", told, "", figures


def _works(link: Any, folder: Path, name: str) -> bool:  # noqa: ANN401
    (folder / name).touch()
    try:
        link(folder / name, folder / f"{name}.link")
    except OSError:
        return False
    return True


def _kind_of(folder: Path) -> str:
    """Return the kind of the file system that a folder lies in, as Linux names it."""
    mounts = Path("/proc/self/mountinfo")
    if not mounts.exists():
        return f"a file system of {platform.system()}"
    best, kind, own = -1, "unknown", folder.resolve()
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        fields, _, rest = line.partition(" - ")
        at = Path(fields.split()[4].encode().decode("unicode_escape"))
        if own.is_relative_to(at) and len(at.parts) >= best:  # a later one hides an earlier one
            best, kind = len(at.parts), rest.split()[0]
    return kind


@check("codecs", "Do codecs give back every bit, whatever lies in memory in whichever order?")
def _codecs(folder: Path) -> Iterator[tuple[State, str, str, Mapping[str, Any]]]:
    wrong = False
    for codec in CODECS:
        for dtype in ("float32", "float64"):
            for order, block in _orders(_numbers(dtype)).items():
                told = _round_trip(folder / f"{codec}-{dtype}-{order}.zarr", codec, block)
                if told:
                    wrong = True
                    remedy = "pip install --upgrade 'numcodecs[pcodec]'; verify what was recorded with it"
                    yield "wrong", f"{codec}, {dtype} in {order} order: {told}", remedy, {"codec": codec}
    if not wrong:
        told = f"{' and '.join(CODECS)} give back every bit, {len(_orders(_numbers('float32')))} orders in memory"
        yield "good", told, "", {"codecs": list(CODECS)}


def _numbers(dtype: str) -> NDArray[Any]:
    """Return numbers that wander as weights do, and all that is special: zeros of both signs, infinities, NaN, tiny."""
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.standard_normal((96, 64)), axis=1).astype(dtype)
    tiny = np.finfo(dtype).smallest_subnormal
    walk[0, :6] = [0.0, -0.0, np.inf, -np.inf, np.nan, tiny]
    return walk


def _orders(block: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Return equal arrays that lie in memory in different ways."""
    every = np.zeros((2 * block.shape[0], 3 * block.shape[1]), block.dtype)
    every[::2, ::3] = block
    frozen = block.copy()
    frozen.setflags(write=False)
    return {
        "C": block,
        "Fortran": np.asfortranarray(block),
        "strided": every[::2, ::3],
        "reversed": block[::-1, ::-1].copy()[::-1, ::-1],
        "read-only": frozen,
    }


def _round_trip(path: Path, codec: Codec, block: NDArray[Any]) -> str:
    """Write a block in chunks and read it in both ways that there are; return what is wrong, if anything is."""
    serializer, compressors = chunk_codecs(codec)
    array = zarr.create_array(
        LocalStore(path), name="params", shape=block.shape, chunks=(32, 64), dtype=block.dtype, fill_value=np.nan,
        serializer=serializer, compressors=compressors, filters=None,
    )  # fmt: skip
    write_block(array, (0, 0), block)
    both = {"Zarr": array[...], "trajstore": States.of(place_of(path), array, codec)[:, :]}
    for reader, found in both.items():
        bits = np.ascontiguousarray(np.asarray(found)).tobytes()
        if bits != np.ascontiguousarray(block).tobytes():
            return f"{reader} reads other numbers than were written"
    return ""
