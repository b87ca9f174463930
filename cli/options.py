"""Arguments that several commands share, their completion, and how text becomes values."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from trajstore.errors import ConfigurationError

__all__ = [
    "JSON",
    "ExperimentName",
    "FigureName",
    "PresetName",
    "StateMetricName",
    "StorePath",
    "Trust",
    "WhatToRecord",
    "complete_experiment",
    "parse_adaptive",
    "parse_seeds",
    "parse_settings",
    "parse_size",
]


def _complete_preset(incomplete: str) -> list[str]:
    from trajstore.experiment.presets import preset_names

    return [name for name in preset_names() if name.startswith(incomplete)]


def complete_experiment(ctx: typer.Context, incomplete: str) -> list[str]:
    """Offer the experiments of the store that was given."""
    store = Path(ctx.params.get("store") or "")
    from trajstore.storage.format.checking import is_name  # a shell would obey what other folders may be called

    names = [file.parent.name for file in sorted(store.glob("*/zarr.json"))]
    return [name for name in names if name.startswith(incomplete) and is_name(name)]


def _complete_figure(incomplete: str) -> list[str]:
    from trajstore.analysis.figures import figure_names

    return [name for name in figure_names() if name.startswith(incomplete)]


def _complete_state_metric(incomplete: str) -> list[str]:
    from trajstore.analysis.afterwards import METRICS

    return [name for name in METRICS if name.startswith(incomplete)]


StorePath = Annotated[str, typer.Argument(metavar="STORE", help="The store's folder, or its URL: s3://, gs://.")]
ExperimentName = Annotated[str, typer.Argument(metavar="EXP", autocompletion=complete_experiment)]
FigureName = Annotated[str, typer.Argument(metavar="FIGURE", autocompletion=_complete_figure)]
StateMetricName = Annotated[str, typer.Argument(metavar="METRIC", autocompletion=_complete_state_metric)]
PresetName = Annotated[str | None, typer.Argument(metavar="NAME", autocompletion=_complete_preset)]
WhatToRecord = Annotated[
    str, typer.Argument(metavar="PRESET|FILE.toml|module:function", autocompletion=_complete_preset)
]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Call the functions, and read the folders of images, that this store names."),
]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def parse_seeds(text: str, option: str = "--seeds") -> list[int]:
    """Read seeds such as '0-4' or '0,2,5-7'."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})(?:-(\d{1,18}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last - first >= 1_000_000:
            raise ConfigurationError(f"{option} {text!r}: {part!r} is not a seed or a range; write '0-4' or '0,2,5'")
        seeds += range(first, last + 1)
    return seeds


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """Read 'operator.lr=0.1' into nested tables; values are TOML, or else text."""
    changes: dict[str, Any] = {}
    for setting in settings:
        path, equals, value = setting.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", path.strip()):
            raise ConfigurationError(f"--set {setting!r}: write FIELD=VALUE, as in operator.lr=0.1")
        *tables, field = path.strip().split(".")
        table = changes
        for name in tables:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise ConfigurationError(f"--set {setting!r}: {name!r} was set to a value already")
        table[field] = _value(value.strip())
    return changes


def parse_adaptive(text: str | None) -> dict[str, Any]:
    """Read 'test_loss=1e-4' into the fields of a record."""
    if text is None:
        return {}
    metric, _, tolerance = text.partition("=")
    try:
        return {"adaptive": metric.strip(), "tolerance": float(tolerance)}
    except ValueError:
        raise ConfigurationError(f"--adaptive {text!r}: write METRIC=TOLERANCE, as in test_loss=1e-4") from None


def parse_size(text: str | None) -> int | None:
    """Read a size such as '4GB' or '500 MiB'; a bare number is in bytes."""
    if text is None:
        return None
    units = {"": 1, **{f"{prefix}B": 1000**k for k, prefix in enumerate(("", "K", "M", "G", "T"))}}
    units |= {f"{prefix}IB": 1024**k for k, prefix in enumerate(("K", "M", "G", "T"), start=1)}
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in units:
        raise ConfigurationError(f"--memory {text!r} is not a size; write 4GB or 500MB")
    return int(float(match[1]) * units[match[2].upper()])


def _value(text: str) -> Any:  # noqa: ANN401
    try:
        parsed: Mapping[str, Any] = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"]
