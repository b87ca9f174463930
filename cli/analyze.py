"""`trajstore analyze`: the statistics of `trajstore.analysis` as tables."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from trajstore.cli.console import print_json, print_table, say
from trajstore.cli.options import JSON, ExperimentName, StorePath, Trust

from trajstore.errors import ConfigurationError

if TYPE_CHECKING:
    import xarray as xr
    from trajstore.analysis.tables import Table

__all__ = ["analyze"]


def _complete_analysis(incomplete: str) -> list[str]:
    from trajstore.analysis.tables import statistic_names

    return [name for name in statistic_names() if name.startswith(incomplete)]


AnalysisName = Annotated[
    str, typer.Argument(metavar="variance|convergence|resets|contraction|law", autocompletion=_complete_analysis)
]


def analyze(
    store: StorePath,
    exp: ExperimentName,
    analysis: AnalysisName,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="A metric; convergence takes parameters, layer:GLOB, outputs and sum:METRIC too, and law several."
        ),
    ] = None,
    window: Annotated[int | None, typer.Option(help="Recorded steps at the end; by default the last half.")] = None,
    kind: Annotated[str | None, typer.Option(help="Of variance: level, tail or step.")] = None,
    step: Annotated[list[int] | None, typer.Option(help="Of law: which steps; by default the last.")] = None,
    order: Annotated[str | None, typer.Option(help="Of contraction: whose iterates; forward by default.")] = None,
    pairs: Annotated[int | None, typer.Option(help="Of contraction: how many.")] = None,
    trust: Trust = False,
    json: JSON = False,
) -> None:
    """Ask whether training converges, how much it varies, what a reset does."""
    from trajstore.analysis.tables import tables_of

    import trajstore as ts

    asked = tables_of(analysis)
    given: dict[str, Any] = {"window": window, "kind": kind, "steps": step, "order": order, "pairs": pairs}
    taken = inspect.signature(asked).parameters
    if "metrics" in taken:
        given["metrics"] = metric
    elif metric and len(metric) > 1:
        raise ConfigurationError(f"{analysis} takes one --metric")
    else:
        given["metric"] = metric[0] if metric else None
    options = {name: value for name, value in given.items() if value is not None and value != []}
    if foreign := sorted(set(options) - set(taken)):
        flag = {"steps": "--step"}.get(foreign[0], f"--{foreign[0]}")
        raise ConfigurationError(f"{analysis} has no {flag}")
    tables = asked(ts.open(store, trust=trust)[exp], **options)
    if json:
        print_json([{"what": t.title, **_plain(t.result.attrs), "rows": _rows(t.result)} for t in tables])
        return
    for k, table in enumerate(tables):
        if k:
            say("")
        say(f"{table.title}\n" if table.shown else table.title)
        if not table.shown:
            continue
        rows = _rows(table.result)
        labels = [name for name in rows[0] if name in table.result.coords]
        columns = [*labels, *table.shown]
        print_table(columns, [[_cell(row, column, table) for column in columns] for row in rows])
        told = () if "why" in table.shown else rows  # a shown column says it already
        if reasons := [f"  {' '.join(str(row[c]) for c in labels)}: {row['why']}" for row in told if row.get("why")]:
            say("\n" + "\n".join(reasons))


def _cell(row: Mapping[str, Any], column: str, table: Table) -> Any:  # noqa: ANN401
    value = row[column]
    if isinstance(value, float) and value != value:
        return "–"
    if column not in table.intervals:
        return value
    from trajstore.analysis.writing import interval

    low, high = (row[name] for name in table.intervals[column])
    return f"{value:.4g}" if low != low else interval(value, low, high).replace("\N{NO-BREAK SPACE}", " ")


def _rows(result: xr.Dataset) -> list[dict[str, Any]]:
    """Return a dataset as one row for each combination of its labels."""
    if not result.data_vars:
        return []
    dims = list(result.dims)
    frame = result.to_dataframe().reset_index()
    if dims == ["reset"]:
        frame = frame.drop(columns="reset")
    return [dict(row) for row in frame.astype(object).to_dict("records")]


def _plain(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name): value for name, value in attrs.items()}
