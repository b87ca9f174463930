"""What installed packages add to trajstore, by entry points: problems, operators, statistics, figures.

A package's ``pyproject.toml`` says what it offers, and under which name::

    [project.entry-points."trajstore.operators"]
    signed = "my_package.signed:Signed"

Nothing of a package is imported before something that it offers is asked for by that name. What trajstore has itself
keeps its names.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from trajstore.errors import ConfigurationError

__all__ = ["added", "loaded", "offered"]


@cache
def offered(group: str) -> Mapping[str, EntryPoint]:
    """Return what is offered in a group, as `trajstore.operators`, by name. Nothing is imported."""
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=group), key=lambda entry: (entry.name, entry.value)):
        if (other := found.setdefault(entry.name, entry)).value != entry.value:
            raise ConfigurationError(
                f"two packages offer {entry.name!r} as one of {group}: {_of(other)} and {_of(entry)}; uninstall one"
            )
    return found


def added(group: str, own: Container[str]) -> dict[str, EntryPoint]:
    """Return what is offered in a group beside trajstore's own, which keep their names."""
    return {name: entry for name, entry in offered(group).items() if name not in own}


def loaded(entry: EntryPoint) -> Any:  # noqa: ANN401
    """Import what is offered."""
    try:
        return entry.load()
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigurationError(
            f"{entry.name!r}, one of {entry.group} from {_of(entry)}, cannot be imported: {what}"
        ) from error


def _of(entry: EntryPoint) -> str:
    return f"{entry.dist.name if entry.dist else 'an unknown package'} ({entry.value})"
