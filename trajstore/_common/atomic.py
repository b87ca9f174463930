"""Files and folders that appear whole or not at all.

They are written under a temporary name in the same folder, made durable, and then take their own name. What was
there before stays until then.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trajstore._common.system import system_told
from trajstore.errors import ConfigurationError, ConflictError, TrajstoreError, WriteError

__all__ = ["whole_file", "whole_folder"]


@contextmanager
def whole_file(file: Path, *, force: bool) -> Iterator[Path]:
    """Give a temporary name; what is written there becomes the file when the block ends well."""
    with _appearing(file, lambda: _check_file(file, force), Path.touch) as partial:
        yield partial
        _sync(partial)
        _check_file(file, force)  # somebody may have made it in the meantime
        partial.replace(file)


@contextmanager
def whole_folder(folder: Path, *, force: bool, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Give a temporary folder, which becomes the folder when the block ends well.

    `ours` tells whether a folder holds nothing but what an earlier call wrote: `force` replaces no other.
    """
    place = folder.resolve()
    with _appearing(place, lambda: _check_folder(folder, force, ours), Path.mkdir) as partial:
        yield partial
        for file in partial.iterdir():
            _sync(file)
        _check_folder(folder, force, ours)
        if not place.exists():
            partial.rename(place)
            return
        if _exchanged(partial, place):  # there is no moment at which neither is there
            return  # what was there before is deleted with the temporary folder
        before = _temporary(place)
        place.rename(before)
        try:
            partial.rename(place)
        except BaseException:
            before.rename(place)
            raise
        shutil.rmtree(before)


@contextmanager
def _appearing(place: Path, check: Callable[[], None], make: Callable[[Path], None]) -> Iterator[Path]:
    """Check a place, make the temporary file or folder beside it, and leave nothing of it."""
    try:
        check()
        partial = _temporary(place)
        make(partial)
    except TrajstoreError:
        raise
    except OSError as error:
        raise ConfigurationError(f"cannot write to {place.parent}: {error.strerror}") from None
    try:
        yield partial
    except TrajstoreError:
        raise
    except OSError as error:
        raise WriteError(f"{place} could not be written ({system_told(error)}); nothing of it was kept") from None
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def _check_file(file: Path, force: bool) -> None:
    if not file.parent.is_dir():
        raise ConfigurationError(f"{file}: there is no folder {file.parent}")
    if file.is_dir():
        raise ConfigurationError(f"{file} is a folder; name a file")
    if not (file.exists() or file.is_symlink()):
        return
    if not file.is_file():
        raise ConfigurationError(f"{file} is not a regular file; choose another name")
    if not force:
        raise ConflictError(f"{file} exists already; give --force to replace it")


def _check_folder(folder: Path, force: bool, ours: Callable[[Path], bool]) -> None:
    if not folder.parent.is_dir():
        raise ConfigurationError(f"{folder}: there is no folder {folder.parent}")
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"{folder} is a file; name a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not ours(folder):
        raise ConfigurationError(f"{folder} contains other things than exported arrays; choose another folder")
    if not force:
        raise ConflictError(f"{folder} exists already; give --force to replace it")


_EXCHANGE = 2
"""Of Linux's renameat2."""


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names at once; tell whether this system and its file system can."""
    try:
        libc, here = ctypes.CDLL(None, use_errno=True), -100  # AT_FDCWD: paths begin where this process is
        done = libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), _EXCHANGE)
    except (AttributeError, OSError):
        return False
    return bool(done == 0)


def _temporary(place: Path) -> Path:
    return place.with_name(f".{uuid.uuid4().hex}.partial")


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
