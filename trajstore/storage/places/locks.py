"""Locks: one writer a slab, one declaration at a time.

`flock`, twice. On a file beside the store, whose text says who holds it: releases of trajstore that know no other are
kept out by it, and other machines that see the same file. And on a folder inside the store, which is one and the same
by whatever path it is reached, a symbolic link or a bind mount, and which nobody can take away without taking away
what it guards. The kernel frees both when the process ends, however it ends, so nothing goes stale.
"""

from __future__ import annotations

import fcntl
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from trajstore._common.system import is_full, opening, way_clear
from trajstore.errors import BusyError, WriteError

__all__ = ["descriptor_of", "lock"]


@contextmanager
def lock(path: Path, what: str, patience: float = 0.0) -> Iterator[Callable[[Path], None]]:
    """Hold a lock, waiting up to `patience` seconds; a BusyError names the holder.

    Gives what locks a folder of what is guarded as well.
    """
    deadline = time.monotonic() + patience
    with ExitStack() as held:
        with way_clear(f"{what} cannot be locked"):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _opened(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, held)
        if not _taken(descriptor, deadline):
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
            raise BusyError(f"{what} is being written by {holder or 'another process'}; wait for it or stop it")
        _sign(descriptor)

        def inside(folder: Path) -> None:
            if not _taken(_opened(folder, os.O_RDONLY | os.O_DIRECTORY, held), deadline):
                raise BusyError(
                    f"{what} is being written by another process, which came here by another path, or whose lock in "
                    f"{path.parent} was deleted; wait for it or stop it"
                )

        yield inside
        os.ftruncate(descriptor, 0)


def _sign(descriptor: int) -> None:
    """Write who holds a lock, for people; on a full disk it is held all the same, by somebody without a name."""
    me = f"process {os.getpid()} on {platform.node()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    os.ftruncate(descriptor, 0)
    try:
        os.pwrite(descriptor, me.encode(), 0)
    except OSError as error:
        if not is_full(error):
            raise


def descriptor_of(path: Path, flags: int) -> int:
    """Open a file or folder, also where many are open already: each slab that is recorded takes some."""
    return opening(lambda: os.open(path, flags | os.O_CLOEXEC, 0o666), path)


def _opened(path: Path, flags: int, held: ExitStack) -> int:
    """Open something until a stack is closed, which frees its lock."""
    descriptor = descriptor_of(path, flags)
    held.callback(os.close, descriptor)
    return descriptor


def _taken(descriptor: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        except OSError as error:  # of a file system without locks, say, or without room for one more
            raise WriteError(
                f"the file system lends no lock ({error.strerror}), and without one two processes could write at once; "
                "record to a folder on another disk"
            ) from None
        else:
            return True
