"""What the system says of files: that a disk is full, that a process has opened too many.

Neither is damage: what is on the disk may be whole, and is not touched.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from trajstore.errors import OpenFilesError, WriteError

__all__ = ["allow_more_files", "is_file", "is_full", "opening", "refuse_too_many", "system_told", "way_clear"]

T = TypeVar("T")

_FULL = (errno.ENOSPC, errno.EDQUOT)
_TOO_MANY = (errno.EMFILE, errno.ENFILE)
_MANY = 65_536
"""Files to ask for where the system names no limit; some grant no more than they can hold in a table."""


def is_full(error: OSError) -> bool:
    """Tell whether nothing more fits on a disk."""
    return error.errno in _FULL


def system_told(error: OSError) -> str:
    """Say what the system said, and of which file."""
    return ": ".join(str(part) for part in (error.strerror or error, error.filename) if part)


def allow_more_files(error: OSError) -> bool:
    """Let this process open as many files as the system grants; tell whether that is more than before.

    `error` is what opening one ended in.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MANY if hard == resource.RLIM_INFINITY else hard
    if error.errno != errno.EMFILE or wanted <= soft or soft == resource.RLIM_INFINITY:
        return False
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ValueError, OSError):
        return False
    return True


@contextmanager
def way_clear(what: str) -> Iterator[None]:
    """Raise a WriteError where a folder lies in the place of a file, or a file in that of a folder."""
    try:
        yield
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise WriteError(
            f"{what}: something else lies where a file or folder is to be written ({system_told(error)}); move it away"
        ) from None


def opening(do: Callable[[], T], what: str | os.PathLike[str]) -> T:
    """Do what opens a file, with as many files as the system grants; an OpenFilesError says what to do beyond that."""
    try:
        try:
            return do()
        except OSError as error:
            if not allow_more_files(error):
                raise
        return do()
    except OSError as error:
        refuse_too_many(error, what)
        raise


def is_file(path: Path) -> bool:
    """Tell whether a file is there; where that cannot be known, it is an error. (To `Path.is_file` it may be a no.)"""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def refuse_too_many(error: OSError, what: str | os.PathLike[str]) -> None:
    """Raise an OpenFilesError where an error says that too many files are open."""
    if error.errno in _TOO_MANY:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise OpenFilesError(
            f"{error.filename or what} cannot be opened: too many files are open, and this process may have {most:,} "
            f"at once; allow more (`ulimit -n {max(4_096, 4 * most)}`, or as an administrator) and do it again; "
            "nothing is damaged"
        ) from None
