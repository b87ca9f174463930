"""Presets: experiments as TOML files, one a file. `trajstore presets NAME` prints one to start your own from.

A file may begin with another preset, as experiment files do. Its table ``small`` is laid over the rest at the scale of
the same name: what two cores do in minutes. ``variants`` makes it several experiments, each a table laid over what they
share; one alone is ``NAME.VARIANT``.

>>> preset_table("fig4")["steps"], preset_table("fig4", "small")["name"]
(1400, 'fig4-small')
>>> variants("fig4"), variants("fig14")[:2]
(['fig4'], ['fig14.large', 'fig14.large-slow'])
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib import resources
from typing import Any, Literal, get_args

from trajstore.configuration import merge
from trajstore.errors import ConfigurationError, choices

__all__ = ["FULL", "Scale", "about", "preset_names", "preset_table", "preset_text", "variants"]

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


def preset_table(name: str, scale: Scale = FULL) -> dict[str, Any]:
    """Return a preset, or one variant of it, as plain data."""
    if scale not in get_args(Scale):
        raise ConfigurationError(f"unknown scale {scale!r}; {choices(str(scale), get_args(Scale))}")
    base, _, variant = name.partition(".") if isinstance(name, str) else (name, "", "")
    table = _merged(base, scale)
    known = table.pop("variants", {})
    suffix = "" if scale == FULL else f"-{scale}"
    if not known and not variant:
        return {"name": f"{base}{suffix}"} | table
    names = [f"{base}.{one}" for one in known]
    if not variant:
        raise ConfigurationError(f"preset {name!r} is several experiments; name one: {', '.join(names)}")
    if variant not in known:
        raise ConfigurationError(f"unknown preset {name!r}; {choices(name, names or [base])}")
    return {"name": f"{base}{suffix}.{variant}"} | merge(table, known[variant])


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
