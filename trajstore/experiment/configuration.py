"""Configurations: plain data ⇄ declarations.

A declaration is a frozen dataclass of a family (`trajstore.problems.quadratic`, `trajstore.operators.sgd`, …);
its configuration is a table with ``family`` and its fields. `build` reads one and names the field that is
wrong; `describe` writes one, and fingerprints what is not plain data (functions, tensors), so that two equal
descriptions mean the same declaration.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from types import CodeType
from typing import Any, cast, get_type_hints

from trajstore.errors import ConfigurationError, ConflictError, choices
from trajstore.experiment.families import family, family_name, family_names

__all__ = [
    "build",
    "check_fields",
    "check_types",
    "completed",
    "defaults",
    "describe",
    "differences",
    "merge",
    "refuse_differences",
    "shortened",
]

_PACKAGES = {
    "problem": "trajstore.problems",
    "operator": "trajstore.operators",
    "schedule": "trajstore.operators.schedules",
    "images": "trajstore.problems.images",
}
_DOES = {"problem": "build", "operator": "apply", "schedule": "factor", "images": "load"}
_EXAMPLE = {"problem": "regression", "operator": "sgd", "schedule": "cosine", "images": "shapes"}
_FACTORY = "trajstore.problems.factory"
_LASTING = {"trajstore.problems._module:ModuleProblem": "trajstore:ModuleProblem"}
"""Where something of trajstore lay when it was stored → its name in what is stored: modules move, stores stay.

What moves gets a line more. None is ever taken out.
"""
_SHORT = 80
"""Characters of a value that a message shows."""
_SHOWN = 6
"""Differences that a message names."""


def build(kind: str, table: Any) -> Any:  # noqa: ANN401
    """Build the declaration of a kind (problem, operator, schedule, images) from its table, or from a family's name."""
    if callable(getattr(table, _DOES[kind], None)):
        return table  # already a declaration
    if isinstance(table, str):
        table = {"family": table}
    if not isinstance(table, Mapping) or not isinstance(name := table.get("family"), str):
        raise ConfigurationError(
            f"{kind}: {table!r} does not say which; write family = {_EXAMPLE[kind]!r} and its fields"
        )
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
        if not _has_default(field) and name not in given:
            raise ConfigurationError(f"{what} needs {name}")
    return {
        name: build(name, value) if name in _PACKAGES else _validated(f"{what}: {name}", hints[name], value)
        for name, value in given.items()
    }


def check_types(what: str, declared: Any) -> None:  # noqa: ANN401
    """Refuse a declaration, made directly, whose fields are not of their types; nothing is converted."""
    hints = get_type_hints(type(declared))
    for field in fields(declared):
        value = getattr(declared, field.name)
        if field.name in _PACKAGES:
            if not callable(getattr(value, _DOES[field.name], None)):
                raise ConfigurationError(
                    f"{what}: {field.name} is {shortened(value)}; give a declaration, such as one of "
                    f"{_PACKAGES[field.name]}, or make {what} of a table with `of`"
                )
        else:
            _validated(f"{what}: {field.name}", hints[field.name], value, strict=True)


def completed(kind: str, table: Any) -> Any:  # noqa: ANN401
    """Return a stored table with the fields that its family got since it was stored.

    What a field has by default is what was done before there was the field.
    """
    name = table.get("family") if isinstance(table, Mapping) else None
    if name not in family_names(_PACKAGES[kind]):
        return table  # of a loop, of an import, or a declaration from elsewhere
    nested = {key: completed(key, value) if key in _PACKAGES else value for key, value in table.items()}
    return nested | {k: v for k, v in defaults(family(_PACKAGES[kind], name)).items() if k not in table}


def defaults(declared: type[Any]) -> dict[str, Any]:
    """Return what the fields of a dataclass are if nothing is said, described."""
    there = [field for field in fields(declared) if _has_default(field)]
    return {f.name: describe(f.default if f.default_factory is MISSING else f.default_factory()) for f in there}


def _has_default(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _validated(what: str, hint: Any, value: Any, *, strict: bool = False) -> Any:  # noqa: ANN401
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    if isinstance(hint, type) and is_dataclass(hint):
        if isinstance(value, hint):
            return value
        raise ConfigurationError(f"{what} is {value!r}; input should be a {hint.__name__}")
    try:
        return TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False)).validate_python(value, strict=strict)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"[{part}]" for part in first["loc"] if isinstance(part, int))
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
    if isinstance(value, functools.partial):
        return {"partial": describe(value.func), "args": describe(value.args), "kwargs": describe(value.keywords)}
    if inspect.ismodule(value) or isinstance(value, type) or inspect.isbuiltin(value):
        return {"name": _reference(value)}
    if inspect.isfunction(value) or inspect.ismethod(value):
        return _describe_function(value)
    if callable(tensors := getattr(value, "state_dict", None)):
        return {"module": repr(value), "state": describe(dict(tensors()))}
    if callable(getattr(value, "numpy", None)):
        return _describe_tensor(value)
    if callable(own := getattr(value, "describe", None)):
        return {"object": _reference(type(value)), "describes_itself": describe(own())}
    raise ConfigurationError(
        f"cannot describe a {_reference(type(value))} for the record: make it a dataclass, "
        "or give it describe() that returns plain data"
    )


def _describe_function(function: Any) -> dict[str, Any]:  # noqa: ANN401
    """Name a function, and fingerprint its source and what it closes over."""
    plain = inspect.unwrap(getattr(function, "__func__", function))
    try:
        if plain.__code__.co_filename == "<string>":  # Python takes the command line for the source of whatever is so
            raise OSError("made by eval or exec")
        code = inspect.getsource(plain).encode()
    except (OSError, TypeError):  # typed at a prompt
        code = _compiled(plain.__code__)
    cells = [cell.cell_contents for cell in plain.__closure__ or ()]
    bound = [*([function.__self__] if inspect.ismethod(function) else []), *cells, *(plain.__defaults__ or ())]
    bound += (plain.__kwdefaults__ or {}).values()
    return {"callable": _reference(plain), "source": _sha256(code)} | ({"bound": describe(bound)} if bound else {})


def _compiled(code: CodeType) -> bytes:
    """Return what a function does where its source is not known: its bytecode, and what that names and contains."""
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    constants = [repr(c) for c in code.co_consts if not isinstance(c, CodeType)]
    return code.co_code + repr((code.co_names, constants)).encode() + b"".join(map(_compiled, inner))


def _describe_tensor(tensor: Any) -> dict[str, Any]:  # noqa: ANN401
    import torch

    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {"tensor": str(tensor.dtype), "shape": list(tensor.shape), "sha256": _sha256(data)}


def differences(a: Mapping[str, Any], b: Mapping[str, Any], at: str = "") -> list[str]:
    """Return where two descriptions differ, each in short, as 'operator.lr: 0.05 / 0.1'."""
    for head in ("family", "object"):  # the fields of two kinds of things cannot be compared
        if head in a and head in b and (told := _difference(a[head], b[head], f"{at}{head}")):
            return told
    return [told for key in sorted(a.keys() | b.keys()) for told in _difference(a.get(key), b.get(key), f"{at}{key}")]


def _difference(left: Any, right: Any, at: str) -> list[str]:  # noqa: ANN401
    if left == right or (isinstance(left, str) and isinstance(right, str) and _lasting(left) == _lasting(right)):
        return []
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return differences(left, right, f"{at}.")
    if isinstance(left, list) and isinstance(right, list) and max(len(repr(left)), len(repr(right))) > _SHORT:
        if len(left) != len(right):
            return [f"{at}: {len(left)} of them / {len(right)} of them"]
        pairs = enumerate(zip(left, right, strict=True))
        inner = [told for k, (one, other) in pairs for told in _difference(one, other, f"{at}[{k}]")]
        if inner:  # none where a table in it says None and the other says nothing
            return inner
    return [f"{at}: {shortened(left)} / {shortened(right)}"]


def shortened(value: Any) -> str:  # noqa: ANN401
    """Return a value as a message shows it."""
    text = repr(value)
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 1]}…"


def refuse_differences(experiment: str, found: Sequence[str], remedy: str = "choose another name") -> None:
    """Raise if what is stored of an experiment differs from what is requested.

    Fields that were written come alone: what the problem makes of them, shapes and layout, differs as a consequence.
    """
    written = [told for told in found if not told.startswith("schema.") and ".made." not in told]
    shown = written or list(found)
    if shown:
        more = f"; and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        raise ConflictError(
            f"experiment {experiment!r} exists already and differs in {'; '.join(shown[:_SHOWN])}{more} "
            f"(stored / requested); {remedy}"
        )


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


def _reference(thing: Any) -> str:  # noqa: ANN401
    name = getattr(thing, "__qualname__", None) or getattr(thing, "__name__", repr(thing))
    return _lasting(f"{getattr(thing, '__module__', '')}:{name}")


def _lasting(reference: str) -> str:
    return _LASTING.get(reference, reference)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
