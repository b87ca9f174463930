"""Families found by file name: `problems/least_squares.py` is the family `least-squares`.

A module in one of the family packages declares its class as ``FAMILY: type[Protocol] = Class``. The
annotation lets the type checker see that the class keeps the protocol; the file name is the name that
configurations use. So adding a family is adding a file.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from trajstore.errors import ConfigurationError, choices
from trajstore.system import opening

__all__ = ["family", "family_name", "family_names"]


def family_names(package: str) -> list[str]:
    """Names of the families in a package, without importing any of them."""
    path = import_module(package).__path__
    if not (found := _modules(path)):  # a folder that cannot be listed is empty to pkgutil
        opening(lambda: [*Path(path[0]).iterdir()], path[0])
        found = _modules(path)
    return sorted(name.replace("_", "-") for name in found)


def _modules(path: Sequence[str]) -> list[str]:
    return [module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_")]


def family(package: str, name: str) -> type[Any]:
    """Return the class that a family declares."""
    if name not in family_names(package):
        kind = package.rpartition(".")[2].removesuffix("s")
        raise ConfigurationError(f"unknown {kind} {name!r}; {choices(name, family_names(package))}")
    declared: type[Any] = import_module(f"{package}.{name.replace('-', '_')}").FAMILY
    return declared


def family_name(instance: object) -> str | None:
    """Return the family that an object belongs to, None for a class from elsewhere."""
    package, _, module = type(instance).__module__.rpartition(".")
    if package.startswith("trajstore.") and not module.startswith("_"):
        return module.replace("_", "-")
    return None
