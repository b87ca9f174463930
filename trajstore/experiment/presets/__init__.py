"""Presets: experiments as TOML files, one a file. `trajstore presets NAME` prints one to start your own from.

A file may begin with another preset, as experiment files do. Its table ``small`` is laid over the rest at the scale of
the same name: what two cores do in minutes. ``variants`` makes it several experiments, each a table laid over what they
share, in which ``times`` and ``over`` say what is multiplied and divided; one alone is ``NAME.VARIANT``.

>>> preset_table("fig4")["steps"], preset_table("fig4", "small")["name"]
(1400, 'fig4-small')
>>> variants("fig4"), variants("fig14")[:2]
(['fig4'], ['fig14.large', 'fig14.large-slow'])
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Literal, get_args

from trajstore.errors import ConfigurationError, choices
from trajstore.experiment.configuration import merge

__all__ = ["FULL", "Scale", "about", "family_of", "preset_names", "preset_table", "preset_text", "variants"]

Scale = Literal["full", "small"]
FULL: Scale = "full"


def preset_names() -> list[str]:
    """Return the names of the presets, fig2 before fig10."""
    names = [entry.name.removesuffix(".toml") for entry in resources.files(__name__).iterdir()]
    names = [name for name in names if resources.files(__name__).joinpath(f"{name}.toml").is_file()]
    return sorted(names, key=lambda name: (name.rstrip("0123456789"), len(name), name))


def preset_text(name: str) -> str:
    """Return a preset as it is written."""
    if not isinstance(name, str) or name not in preset_names():
        raise ConfigurationError(f"unknown preset {name!r}; {choices(str(name), preset_names())}")
    return resources.files(__name__).joinpath(f"{name}.toml").read_text("utf-8")


def about(name: str) -> str:
    """Return what a preset is, in a line."""
    return str(_merged(name, FULL)["about"])


def variants(name: str) -> list[str]:
    """Return the experiments of a preset: itself, or its variants."""
    if "." in name:
        return [name]
    return [f"{name}.{variant}" for variant in _merged(name, FULL).get("variants", {})] or [name]


def preset_table(name: str, scale: Scale = FULL, shared: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a preset, or one variant of it, as plain data.

    `shared` changes what variants have in common: with half the steps, one that does two for each does half as many.
    """
    if scale not in get_args(Scale):
        raise ConfigurationError(f"unknown scale {scale!r}; {choices(str(scale), get_args(Scale))}")
    base, _, variant = name.partition(".") if isinstance(name, str) else (name, "", "")
    table = {"name": base if scale == FULL else f"{base}-{scale}"} | merge(_merged(base, scale), shared or {})
    known = table.pop("variants", {})
    if not known and not variant:
        return table
    names = [f"{base}.{one}" for one in known]
    if not variant:
        raise ConfigurationError(f"preset {name!r} is several experiments; name one: {', '.join(names)}")
    if variant not in known:
        raise ConfigurationError(f"unknown preset {name!r}; {choices(name, names or [base])}")
    return _variant(table, known[variant], name) | {"name": f"{table['name']}.{variant}", "variant_of": table["name"]}


def family_of(name: str) -> str | None:
    """Return the name before that of a variant of any preset: before it was stored, only names said what is a variant.

    >>> family_of("fig14-small.lambda-0.5"), family_of("mine.large"), family_of("lr-0.02")
    ('fig14-small', 'mine', None)
    """
    return next((name.removesuffix(f".{v}") for v in _variants() if name.endswith(f".{v}") and name != f".{v}"), None)


@cache
def _variants() -> frozenset[str]:
    """Return the names that presets give to their variants."""
    return frozenset(variant for preset in preset_names() for variant in _merged(preset, FULL).get("variants", {}))


def _variant(shared: Mapping[str, Any], own: Mapping[str, Any], name: str) -> dict[str, Any]:
    table = _laid_over(shared, {key: value for key, value in own.items() if key not in ("times", "over")})
    return _divided(_multiplied(table, own.get("times", {})), own.get("over", {}), name)


def _laid_over(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Lay a table over another; unlike in `merge`, a variant of another family has all that it shares."""
    both = {
        key: _laid_over(shared[key], value) if isinstance(shared.get(key), Mapping) else value
        for key, value in own.items()
    }
    return {**shared, **both}


def _multiplied(table: Mapping[str, Any], by: Mapping[str, Any]) -> dict[str, Any]:
    products = {
        key: _multiplied(table[key], factor) if isinstance(factor, Mapping) else table[key] * factor
        for key, factor in by.items()
        if table.get(key) is not None
    }
    return {**table, **products}


def _divided(table: Mapping[str, Any], by: Mapping[str, Any], where: str) -> dict[str, Any]:
    quotients: dict[str, Any] = {}
    for key, divisor in by.items():
        value = table.get(key)
        if isinstance(divisor, Mapping) and isinstance(value, Mapping):
            quotients[key] = _divided(value, divisor, f"{where}: {key}")
        elif isinstance(value, int) and value % divisor == 0:
            quotients[key] = value // divisor
        elif isinstance(value, float):
            quotients[key] = value / divisor
        else:
            hint = "write it with a point, as in 1.0" if key == "lr" else "choose one that it divides"
            raise ConfigurationError(f"{where}: {key} is {value!r}, and this variant divides it by {divisor}; {hint}")
    return {**table, **quotients}


def _merged(name: str, scale: Scale) -> dict[str, Any]:
    """Return a preset's table at a scale, with that which it begins with and with all variants."""
    table = tomllib.loads(preset_text(name))
    changes: Mapping[str, Any] = table.pop("small", {})
    if "preset" in table:
        table = merge(_merged(table.pop("preset"), scale), table)
    if scale == FULL:
        return table
    if not changes:
        raise ConfigurationError(f"preset {name!r} has no small scale: it takes minutes as it is")
    return merge(table, changes)
