"""Statistics as tables, by name: what `trajstore analyze` prints.

A module of the list declares `tables`, whose parameters after the experiment are the options that it takes. Installed
packages add theirs by entry points of the group ``trajstore.statistics``, each a function that returns a dataset.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, cast

import xarray as xr

from trajstore._common.plugins import added, loaded
from trajstore.errors import NotFoundError, choices
from trajstore.store import StoredExperiment

__all__ = ["STATISTICS", "Table", "Tables", "statistic_names", "tables_of", "window_told"]

STATISTICS = {
    "variance": "variance",
    "convergence": "convergence",
    "resets": "resets",
    "contraction": "contracting",
    "law": "law",
}
"""Name → the module that declares its `tables`."""
_GROUP = "trajstore.statistics"


@dataclass(frozen=True)
class Table:
    """A result, which of its columns a person is shown, and which of them are one number with its interval."""

    title: str
    result: xr.Dataset
    shown: Sequence[str]
    intervals: Mapping[str, tuple[str, str]] = field(default_factory=dict)


Tables = Callable[..., list[Table]]


def statistic_names() -> list[str]:
    """Return the names of the statistics, those that installed packages add last."""
    return [*STATISTICS, *added(_GROUP, STATISTICS)]


def tables_of(name: str) -> Tables:
    """Return what makes the tables of a statistic."""
    if name in STATISTICS:
        return cast(Tables, import_module(f"trajstore.analysis.{STATISTICS[name]}").tables)
    if (entry := added(_GROUP, STATISTICS).get(name)) is None:
        raise NotFoundError(f"no analysis {name!r}; {choices(name, statistic_names())}")
    statistic = loaded(entry)

    @functools.wraps(statistic)
    def tables(stored: StoredExperiment, **options: Any) -> list[Table]:  # noqa: ANN401  what it takes
        found = statistic(stored, **options)
        return [Table(str(found.attrs.get("long_name", name)), found, tuple(map(str, found.data_vars)))]

    return tables


def window_told(result: xr.Dataset) -> str:
    """Say which steps a statistic is of."""
    a = result.attrs
    return f"{a['metric']}, {a['window']} recorded steps, {a['from_step']} to {a['to_step']}"
