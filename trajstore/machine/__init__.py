"""What a machine can do for recordings: is everything there, is it quick, and does it compute what it should?

A check is one declaration, which its module puts on the list; `examine` runs all of them. A check that cannot finish is
itself a finding: what raises where it should compute does not compute.

>>> [check.name for check in checks()][:3]
['versions', 'checksums', 'threads']
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from trajstore.errors import ConfigurationError, choices

__all__ = ["Check", "Finding", "State", "check", "checks", "examine"]

State = Literal["good", "slow", "missing", "doubtful", "wrong"]
"""`wrong`: what is computed or kept here is not what it should be. `doubtful`: it may be, under conditions that are
told. `missing` and `slow`: everything is right, and takes longer or can do less."""


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    check: str
    state: State
    told: str
    """One line for a person."""
    remedy: str = ""
    """What to do about it."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """What was measured or read, for programs. Durations are in seconds."""


Looks = Callable[[Path], Iterator[tuple[State, str, str, Mapping[str, Any]]]]
"""Looks, with a folder of its own to write to; yields state, line, remedy and figures of each finding."""


@dataclass(frozen=True)
class Check:
    """Something to look at."""

    name: str
    question: str
    look: Looks


_MODULES = ("software", "computing", "storing", "asking")
_checks: dict[str, Check] = {}


def check(name: str, question: str) -> Callable[[Looks], Looks]:
    """Put a check on the list."""

    def put(look: Looks) -> Looks:
        _checks[name] = Check(name, question, look)
        return look

    return put


def checks() -> Sequence[Check]:
    """Return all checks, in the order in which they are declared, whatever was imported first."""
    for module in _MODULES:
        import_module(f"{__name__}.{module}")
    return sorted(_checks.values(), key=lambda each: _MODULES.index(each.look.__module__.rpartition(".")[2]))


def examine(path: str | Path = ".", only: Sequence[str] = ()) -> Iterator[Finding]:
    """Yield what is found, check by check: stores are to lie in the folder `path`; `only` names some checks."""
    known = {each.name: each for each in checks()}
    for name in only:
        if name not in known:
            raise ConfigurationError(f"no check {name!r}; {choices(name, known)}")
    with _room(Path(path)) as room:
        for each in known.values():
            if only and each.name not in only:
                continue
            folder = Path(room, each.name)
            folder.mkdir()
            try:
                for state, told, remedy, figures in each.look(folder):
                    yield Finding(each.name, state, told, remedy, figures)
            except Exception as error:
                told = " ".join(f"{each.question} It failed: {type(error).__name__}: {error}".split())
                yield Finding(each.name, "wrong", told[:500])


def _room(path: Path) -> TemporaryDirectory[str]:
    """Return a folder for what checks write, where stores lie: beside a store, if the path is one."""
    if "://" in str(path) or ":/" in str(path):
        raise ConfigurationError(f"{path}: give a folder; buckets are tried out by recording into them")
    if not path.is_dir():
        raise ConfigurationError(f"there is no folder {path}")
    place = path.resolve().parent if (path / "zarr.json").exists() else path  # where a link to a store leads
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigurationError(f"cannot write to {place}; give a folder in which stores can lie")
    return TemporaryDirectory(prefix=".trajstore-doctor-", dir=place, ignore_cleanup_errors=True)
