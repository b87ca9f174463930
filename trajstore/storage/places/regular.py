"""The files of a store in a folder: regular ones, and none through a link inside the store.

What a stranger's store links to is not the store's.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from trajstore._common.system import opening
from trajstore.errors import DamageError, FormatError
from trajstore.storage.places.place import DOCUMENT

__all__ = ["DOCUMENT_BYTES", "below", "contents", "entries", "inside", "refuse_large", "refuse_more"]

DOCUMENT_BYTES = 2**26
"""More than any document is. What is read of one takes twenty times the memory, at worst."""


def inside(root: Path, key: str) -> Path:
    """Return where a key of a store lies; refuse one that leads out of it, by its parts or through a link."""
    path = str(root)
    for part in filter(None, key.split("/")):
        if part in (".", "..") or "\0" in part:
            raise FormatError(f"{root}: {key!r} is no name of something in a store")
        path = f"{path}/{part}"
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return root / key
        if stat.S_ISLNK(mode):
            raise FormatError(
                f"{path} is a symbolic link; nothing is read or written through links inside a store: put there what "
                "it leads to (`cp -rL` copies a store so)"
            )
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise FormatError(f"{path} is neither a file nor a folder; a store has nothing else")
    return Path(path)


def refuse_large(path: Path, most: int | None) -> None:
    """Refuse a file that is larger than what it holds could be, before memory is taken for it."""
    document = most is None and path.name == DOCUMENT
    most = DOCUMENT_BYTES if document else most
    if most is None:
        return
    with suppress(FileNotFoundError, NotADirectoryError):
        try:
            refuse_more(path, path.lstat().st_size, most)
        except ValueError as error:
            raise DamageError(f"{error}; restore it from a copy") if document else error from None


def refuse_more(path: Path, size: int, most: int) -> None:
    """Refuse so many bytes at a path if they are more than what they hold could be, encoded."""
    if size > most + most // 50 + 4096:
        raise ValueError(f"{path} has {size:,} bytes, and what it is to hold has at most {most:,}")


def contents(path: Path, most: int | None = None) -> bytes | None:
    """Return what a file holds, None where there is none; refuse one of more bytes than can be."""
    refuse_large(path, most)
    try:
        return opening(path.read_bytes, path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what is in a folder; where that cannot be known, it is an error, and not nothing."""
    return opening(lambda: [*os.scandir(folder)], folder)


def below(folder: Path) -> Iterator[Path]:
    """Yield everything below a folder, without going through links."""
    folders = [folder]
    while folders:
        with suppress(FileNotFoundError, NotADirectoryError):  # there is none, or none any more
            for entry in entries(folders.pop()):
                yield Path(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
