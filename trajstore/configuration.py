"""Configurations: plain data ⇄ declarations.

A declaration is a frozen dataclass of a family (`trajstore.problems.quadratic`, `trajstore.operators.sgd`, …);
its configuration is a table with ``family`` and its fields. `build` reads one and names the field that is
wrong; `describe` writes one, and fingerprints what is not plain data (functions, tensors), so that two equal
descriptions mean the same declaration.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, cast, get_type_hints

from trajstore.errors import ConfigurationError, choices
from trajstore.families import family, family_name

__all__ = ["build", "check_fields", "describe", "differences", "merge"]

_PACKAGES = {
    "problem": "trajstore.problems",
    "operator": "trajstore.operators",
    "schedule": "trajstore.schedules",
}
_FACTORY = "trajstore.problems.factory"


def build(kind: str, table: Any) -> Any:  # noqa: ANN401
    """Build the declaration of a kind (problem, operator, schedule) from its table."""
    if not isinstance(table, Mapping):
        return table  # already a declaration
    if not isinstance(name := table.get("family"), str):
        raise ConfigurationError(f"{kind}: say which, as in family = {_example(kind)!r}")
    declared = family(_PACKAGES[kind], name)
    given = {key: value for key, value in table.items() if key != "family"}
    return declared(**check_fields(f"{kind} {name}", declared, given))


def check_fields(what: str, declared: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Validate values against the fields of a dataclass."""
    known = {f.name: f for f in fields(declared)}
    hints = get_type_hints(declared)
    for name in given:
        if name not in known:
            raise ConfigurationError(f"{what} has no field {name!r}; {choices(name, known)}")
    for name, field in known.items():
        if field.default is MISSING and field.default_factory is MISSING and name not in given:
            raise ConfigurationError(f"{what} needs {name}")
    return {
        name: build(name, value) if name in _PACKAGES else _validated(f"{what}: {name}", hints[name], value)
        for name, value in given.items()
    }


def _validated(what: str, hint: Any, value: Any) -> Any:  # noqa: ANN401
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"[{part}]" for part in first["loc"])
        raise ConfigurationError(f"{what}{where} is {first['input']!r}; {first['msg'].lower()}") from None


def describe(value: Any) -> Any:  # noqa: ANN401
    """Return a value as plain data that tells it from every different one."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [describe(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        name = family_name(value)
        head = {"family": name} if name else {"object": _reference(type(value))}
        table = head | {f.name: describe(getattr(value, f.name)) for f in fields(value)}
        return table | ({"made": describe(cast(Any, value).made)} if type(value).__module__ == _FACTORY else {})
    if callable(value):
        return {"callable": _reference(value), "source": _source_digest(value)}
    if (numpy := getattr(value, "numpy", None)) is not None:  # a tensor
        array = numpy(force=True)
        return {"tensor": str(value.dtype), "shape": list(array.shape), "sha256": _sha256(array.tobytes())}
    if callable(own := getattr(value, "describe", None)):
        return {"object": _reference(type(value)), "describes_itself": describe(own())}
    raise ConfigurationError(
        f"cannot describe a {_reference(type(value))} for the record: make it a dataclass, "
        "or give it describe() that returns plain data"
    )


def differences(a: Mapping[str, Any], b: Mapping[str, Any], at: str = "") -> list[str]:
    """Return where two descriptions differ, as 'operator.lr: 0.05 / 0.1'."""
    found = []
    for key in sorted(a.keys() | b.keys()):
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += differences(left, right, f"{at}{key}.")
        elif left != right:
            found.append(f"{at}{key}: {left!r} / {right!r}")
    return found


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Lay changes over a base, table by table; a table of another family replaces the old one whole."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            replaced = "family" in value and value["family"] != old.get("family")
            merged[key] = dict(value) if replaced else merge(old, value)
        else:
            merged[key] = value
    return merged


def _example(kind: str) -> str:
    return {"problem": "regression", "operator": "sgd", "schedule": "cosine"}[kind]


def _reference(thing: Any) -> str:  # noqa: ANN401
    return f"{getattr(thing, '__module__', '?')}:{getattr(thing, '__qualname__', repr(thing))}"


def _source_digest(function: Any) -> str | None:  # noqa: ANN401
    try:
        return _sha256(inspect.getsource(function).encode())
    except (OSError, TypeError):
        return None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
