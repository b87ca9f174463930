"""Telling damaged experiments of a store from those that can be read: what cannot be read hides nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from trajstore.errors import DamageError, FormatError
from trajstore.reading.handles import ExperimentHandle, StoreHandle, unreadable_told

__all__ = ["refuse_damaged", "told_apart"]

T = TypeVar("T")


def told_apart(store: StoreHandle, read: Callable[[ExperimentHandle], T]) -> tuple[dict[str, T], dict[str, str]]:
    """Return what is read of each experiment, by name, and of those that cannot be read, why, in one line each."""
    found, damaged = dict[str, T](), dict[str, str]()
    for name, one in store.experiments():
        with unreadable_told(name, damaged):
            if isinstance(one, FormatError):
                raise one
            found[name] = read(one)
    return found, damaged


def refuse_damaged(damaged: dict[str, str]) -> None:
    """Raise a DamageError where there are damaged experiments. Call when the others have been shown."""
    if damaged:
        raise DamageError("; ".join(damaged.values()))
