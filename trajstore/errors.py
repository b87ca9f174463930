"""Everything trajstore raises on purpose.

::

    TrajstoreError
    ├── ConfigurationError (ValueError)     what was asked for makes no sense: fix the request
    │   ├── OrderError                      an order label that does not parse or does not fit
    │   └── UntrustedError                  a store names a function that nobody allowed to be called
    ├── NotFoundError (KeyError)            a store, experiment, slab, step or metric that is not there
    ├── ConflictError (ValueError)          the experiment exists already and differs, or may not be redone
    │   └── IrreproducibleError *           steps that are committed were computed again, and came out differently
    ├── BusyError (RuntimeError) *          another process is writing what you want to write
    ├── FormatError (ValueError)            no store, or one of a newer format
    │   └── DamageError *                   a store that is damaged
    ├── QueryError (ValueError)             an SQL statement that is wrong or not allowed
    ├── WriteError (OSError) *              the disk is full, or fails: what was committed stays
    ├── OpenFilesError (OSError) *          this process has as many files open as the system lets it have
    ├── OutdatedError (RuntimeError) *      an open experiment was removed, or another one has its name now
    ├── UnreachableError (OSError) *        an object store does not answer, or refuses
    ├── WorkerError (RuntimeError) *        processes that compute died again and again, or are not there
    └── StatisticError (ValueError)         too little data for the number that was asked for

    SlowPlanWarning (UserWarning)           a recording runs slower than it could, and why
    └── RefusedWarning                      a fast way gave something else than its definition, and is not used
    SilentWorkersWarning (UserWarning)      no worker has brought anything for long, and what they have
    ResumedWarning (UserWarning)            a training loop goes on, and its batches are its own affair

Those with a star may come after some of the work was done, and end the program with exit code 1. The others refuse a
request before anything is written, with exit code 2.

Each message is one line that says what happened, to which experiment, order, seed and step where
there are such, and what to do now.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar
from unicodedata import category

__all__ = [
    "BusyError",
    "ConfigurationError",
    "ConflictError",
    "DamageError",
    "FormatError",
    "IrreproducibleError",
    "NotFoundError",
    "OpenFilesError",
    "OrderError",
    "OutdatedError",
    "QueryError",
    "RefusedWarning",
    "ResumedWarning",
    "SilentWorkersWarning",
    "SlowPlanWarning",
    "StatisticError",
    "TrajstoreError",
    "UnreachableError",
    "UntrustedError",
    "WorkerError",
    "WriteError",
    "choices",
    "damage_told",
    "printable",
    "slab_named",
]


class TrajstoreError(Exception):
    """The root: catch this to catch all of them."""

    exit_code: ClassVar[int] = 2
    """2: a request was refused, nothing was written. 1: the work failed, perhaps midway."""

    def __init__(self, *told: object) -> None:
        """Say it; what comes from a store may hold a terminal's commands, and is shown escaped."""
        super().__init__(*(printable(one) if isinstance(one, str) else one for one in told))


class ConfigurationError(TrajstoreError, ValueError):
    """A request that makes no sense as it stands."""


class OrderError(ConfigurationError):
    """An order label that does not parse, or does not fit the experiment."""


class UntrustedError(ConfigurationError):
    """What a store names would be called, or read from elsewhere, and nobody said that it may."""


class NotFoundError(TrajstoreError, KeyError):
    """Something that was named does not exist."""

    # KeyError prints the repr of its argument, which would put quotes around a sentence.
    __str__ = Exception.__str__


class ConflictError(TrajstoreError, ValueError):
    """What is already stored contradicts what was asked for."""


class IrreproducibleError(ConflictError):
    """What is computed again is not what is committed."""

    exit_code = 1


class BusyError(TrajstoreError, RuntimeError):
    """Another process holds the lock."""

    exit_code = 1


class FormatError(TrajstoreError, ValueError):
    """Not a store, or one that this version cannot read."""


class DamageError(FormatError):
    """A store whose files are not what was written."""

    exit_code = 1


class QueryError(TrajstoreError, ValueError):
    """SQL that is wrong, or that would do more than read this store."""


class WriteError(TrajstoreError, OSError):
    """Something could not be written."""

    exit_code = 1


class OpenFilesError(TrajstoreError, OSError):
    """A file could not be opened because too many are."""

    exit_code = 1


class OutdatedError(TrajstoreError, RuntimeError):
    """What was opened is not there any more; what has its name now is something else."""

    exit_code = 1


class UnreachableError(TrajstoreError, OSError):
    """An object store that does not answer, or does not let us in."""

    exit_code = 1


class WorkerError(TrajstoreError, RuntimeError):
    """Workers that die whatever is done."""

    exit_code = 1


class StatisticError(TrajstoreError, ValueError):
    """A statistic that the data cannot support."""


class ResumedWarning(UserWarning):
    """A training loop goes on from where it was; the message says what it has to see to itself."""


class SilentWorkersWarning(UserWarning):
    """Nothing has come back from workers for long; the message says what they have."""


class SlowPlanWarning(UserWarning):
    """A recording runs slower than it could; the message says what is missing."""


class RefusedWarning(SlowPlanWarning):
    """A fast way to compute gave something else than its definition: it is not used, and the message says which."""


_OF_DAMAGE: tuple[type[Exception], ...] = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    RuntimeError,
)
"""What zarr raises on files that are damaged."""


@contextmanager
def damage_told(where: str, remedy: str = "`trajstore verify` tells more", *also: type[Exception]) -> Iterator[None]:
    """Turn what zarr raises on damaged files into one line."""
    damage = (*_OF_DAMAGE, *also)
    try:
        yield
    except TrajstoreError:
        raise
    except damage as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise DamageError(f"{where} is damaged ({told}); {remedy}") from None


def slab_named(experiment: str | None, order: str, seed: object) -> str:
    """Name a slab, as every message does."""
    return f"experiment {experiment!r}, order {order!r}, seed {seed}"


def choices(name: str, known: Iterable[str]) -> str:
    """Finish an error message: the nearest known name, or all of them.

    >>> choices("forwrd", ["forward", "backward"])
    "did you mean 'forward'?"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return "there is " + ", ".join(names) if names else "there is none"


_COMMANDS = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Controls, formats (directions of text among them), halves of characters, separators of lines."""


def printable(text: str, keep: str = "") -> str:
    r"""Return a text with what a terminal would take for a command escaped, but for the characters to keep.

    Names and values may come from a stranger's store, and a terminal takes some characters for commands: to move the
    cursor, to write over what is there, to turn the direction of a line. They are shown as what they are.

    >>> print(printable("\x1b[31mred\x07"))
    \x1b[31mred\x07
    """
    if text.isprintable():
        return text
    return "".join(c if c in keep or category(c) not in _COMMANDS else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
