"""Locks: one writer a slab, one declaration at a time.

`flock` on a file outside the Zarr hierarchy. The kernel frees it when the process ends, however it ends, so
nothing goes stale; the file's text only says who holds it.
"""

from __future__ import annotations

import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from trajstore.errors import BusyError

__all__ = ["lock"]


@contextmanager
def lock(path: Path, what: str, patience: float = 0.0) -> Iterator[None]:
    """Hold a lock, waiting up to `patience` seconds; a BusyError names the holder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
                    raise BusyError(
                        f"{what} is being written by {holder or 'another process'}; wait for it or stop it"
                    ) from None
                time.sleep(0.05)
        me = f"process {os.getpid()} on {platform.node()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, me.encode(), 0)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)  # frees the lock
