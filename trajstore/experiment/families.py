"""Families: the declarations that a configuration may name, each in a module of its own.

A package of them lists its modules as ``FAMILIES``. The module ``least_squares`` is the family ``least-squares``, and
declares its class as ``FAMILY: type[Protocol] = Class``: the annotation lets the type checker see that the class keeps
the protocol. So adding a family is adding a file and its line in that list. An installed package adds its own by entry
points (`trajstore._common.plugins`) of which each gives the class.
"""

from __future__ import annotations

import sys
from dataclasses import is_dataclass
from importlib import import_module
from importlib.metadata import EntryPoint
from typing import Any

from trajstore._common.plugins import added, loaded
from trajstore.errors import ConfigurationError, choices

__all__ = ["family", "family_name", "family_names"]

_METHODS = {
    "trajstore.problems": ("build",),
    "trajstore.operators": ("memory", "apply"),
    "trajstore.operators.schedules": ("factor",),
    "trajstore.problems.images": ("load",),
}
"""The packages, and what a class must have that is added to one: those here are seen by the type checker."""


def family_names(package: str) -> list[str]:
    """Names of the families in a package, and of those that others add to it; none of them is imported."""
    return sorted([*_own(package), *_added(package)])


def family(package: str, name: str) -> type[Any]:
    """Return the class that a family declares."""
    if name in _own(package):
        declared: type[Any] = import_module(f"{package}.{name.replace('-', '_')}").FAMILY
        return declared
    kind = package.rpartition(".")[2].removesuffix("s")
    if (entry := _added(package).get(name)) is None:
        raise ConfigurationError(
            f"unknown {kind} {name!r}; {choices(name, family_names(package))}; or install what offers it"
        )
    given = loaded(entry)
    if not (isinstance(given, type) and is_dataclass(given)):
        raise ConfigurationError(f"{kind} {name!r} is {entry.value}, which is no dataclass")
    if missing := _missing(given, package):
        raise ConfigurationError(f"{kind} {name!r} is {entry.value}, which has no {missing[0]}()")
    return given


def family_name(instance: object) -> str | None:
    """Return the family that an object belongs to, None for a class from elsewhere."""
    declared = type(instance)
    package, _, module = declared.__module__.rpartition(".")
    if module in getattr(sys.modules.get(package), "FAMILIES", ()):
        return module.replace("_", "-")
    reference = f"{declared.__module__}:{declared.__qualname__}"
    packages = (package for package in _METHODS if not _missing(declared, package))
    there = ((name, entry) for package in packages for name, entry in _added(package).items())
    return next((name for name, entry in there if entry.value.replace(" ", "") == reference), None)


def _own(package: str) -> list[str]:
    return [module.replace("_", "-") for module in import_module(package).FAMILIES]


def _added(package: str) -> dict[str, EntryPoint]:
    """Return what others add. What is here keeps its name: no number of `sgd` may come from elsewhere."""
    return added(f"trajstore.{package.rpartition('.')[2]}", _own(package))


def _missing(declared: type[Any], package: str) -> list[str]:
    return [method for method in _METHODS[package] if not callable(getattr(declared, method, None))]
