"""Names of a package that are imported when they are first used, so that what is heavy is not loaded for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["lazily"]


def lazily(package: str, home: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a package's `__getattr__`, given which of its modules each name is in.

    No module may be called as one of its names: once imported, it would stand in the name's place.
    """

    def find(name: str) -> Any:  # noqa: ANN401
        if name in home:
            return getattr(import_module(f"{package}.{home[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find
