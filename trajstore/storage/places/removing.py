"""Removing: a folder is gone at once, by another name; then its files are deleted, however long that takes.

Whoever is killed meanwhile leaves a folder that nothing reads, and that the next writer deletes.
"""

from __future__ import annotations

import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from trajstore.storage.places.locks import descriptor_of
from trajstore.storage.places.place import REMOVED

__all__ = ["delete", "leftovers", "make_durable", "take_away"]


def take_away(root: Path, folder: Path) -> Path:
    """Rename a folder within its store, which takes no room and no other disk, and return where it is now.

    Either that is done or nothing: a folder that is a mount point, say, stays as it is.
    """
    gone = folder.rename(root / f"{REMOVED}{uuid.uuid4().hex}")
    for changed in {root, folder.parent}:  # or after a power cut it could be there again, and not whole
        make_durable(changed)
    return gone


def make_durable(folder: Path) -> None:
    """Have the names in a folder survive a power cut as they are now."""
    descriptor = descriptor_of(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def leftovers(root: Path, beside: Path) -> list[Path]:
    """Return the folders that were taken away and not deleted to the end."""
    return [
        folder
        for above, beginning in ((root, REMOVED), (beside / "removed", ""))  # earlier releases renamed them out
        if above.is_dir() and not (above.is_symlink() and above != root) and not beside.is_symlink()
        for folder in sorted(above.iterdir())
        if folder.name.startswith(beginning) and folder.is_dir() and not folder.is_symlink()
    ]


def delete(folder: Path) -> None:
    """Delete a folder that was taken away; another process may be at it as well."""
    while folder.is_dir():
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)
