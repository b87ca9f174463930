"""Families found by file name: `problems/least_squares.py` is the family `least-squares`.

A module in one of the family packages declares its class as ``FAMILY: type[Protocol] = Class``. The
annotation lets the type checker see that the class keeps the protocol; the file name is the name that
configurations use. So adding a family is adding a file.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

from trajstore.errors import ConfigurationError, choices

__all__ = ["family", "family_name", "family_names"]


def family_names(package: str) -> list[str]:
    """Names of the families in a package, without importing any of them."""
    path = import_module(package).__path__
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))


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
