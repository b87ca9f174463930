"""`trajstore analyze`: the statistics of `trajstore.analysis` as tables."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from trajstore.cli.console import print_json, print_table, say
from trajstore.cli.options import JSON, ExperimentName, StorePath, Trust

from trajstore._common.plugins import loaded, offered
from trajstore.errors import ConfigurationError, NotFoundError, StatisticError, choices

if TYPE_CHECKING:
    import xarray as xr

    from trajstore.store import StoredExperiment

__all__ = ["analysis_names", "analyze"]


@dataclass(frozen=True)
class Table:
    """A result, which of its columns a person is shown, and which of them are one number with its interval."""

    title: str
    result: xr.Dataset
    shown: Sequence[str]
    intervals: Mapping[str, tuple[str, str]]


def _variance(
    stored: StoredExperiment, metric: str | None = None, window: int | None = None, kind: str = "tail"
) -> list[Table]:
    from trajstore.analysis import variance, variance_ratio
    from trajstore.analysis.windows import usual_metric

    ds = stored.dataset()
    chosen = metric or usual_metric(ds)
    each = variance(ds, chosen, window, kind)  # type: ignore[arg-type]  # it says what there is
    tables = [
        Table(f"{kind} variance of {_window(each)}", each, ("variance", "effective"), {"variance": ("low", "high")})
    ]
    if {"forward", "backward"} <= set(map(str, each["order"].values)):
        ratio = variance_ratio(ds, chosen, window, kind)  # type: ignore[arg-type]
        shown = ("ratio", "basis")
        tables.append(Table("forward over backward", ratio, shown, {"ratio": ("low", "high")}))
    return tables


def _convergence(stored: StoredExperiment, metric: str = "parameters", window: int | None = None) -> list[Table]:
    from trajstore.analysis import convergence

    found = convergence(stored.dataset(), metric, window)
    pairs = {name: (f"{name}_low", f"{name}_high") for name in ("rate", "shrinks", "drift")}
    shown = ("verdict", "rate", "shrinks", "drift", "effective", "diameter", "tail_diameter", "move")
    return [Table(f"point or distribution: {_window(found)}", found, shown, pairs)]


def _resets(stored: StoredExperiment, metric: str | None = None, window: int | None = None) -> list[Table]:
    from trajstore.analysis import resets
    from trajstore.analysis.windows import usual_metric

    ds = stored.dataset()
    found = resets(ds, metric or usual_metric(ds), window)
    pairs = {name: (f"{name}_low", f"{name}_high") for name in ("before", "after", "difference")}
    shown = (
        "order", "seed", "step", "before", "after", "difference", "settles", "why", "settled_after",
        "forward_between", "forward_crosses_before", "forward_crosses_after",
    )  # fmt: skip
    return [Table(f"resets: {found.attrs['metric']}", found, shown, pairs)]


def _law(stored: StoredExperiment, metrics: Sequence[str] = ("parameters",), steps: Sequence[int] = ()) -> list[Table]:
    from trajstore.analysis import law

    found = law(stored.dataset(), metrics, steps or None)
    shown = ("p_swap", "p_disjoint", "p_swap_adjusted", "p_disjoint_adjusted", "rejected")
    seeds, drawn = found.attrs["seeds"], found.attrs["permutations"]
    title = f"equal law of forward and backward: {seeds} seeds, p-values from {drawn} permutations"
    return [Table(title, found, shown, {})]


def _contraction(stored: StoredExperiment, order: str | None = None, pairs: int = 100) -> list[Table]:
    import numpy as np
    import xarray as xr
    from trajstore.analysis import contraction

    names = stored.schema.orders
    order = order or ("forward" if "forward" in names else names[0])
    found = contraction(stored, order, pairs)
    factors = {"parameters": found["factor"].values, "sum:train_loss": found["loss_factor"].values}
    factors = {space: values for space, values in factors.items() if np.isfinite(values).any()}
    numbers = {
        "pairs": [int(np.isfinite(f).sum()) for f in factors.values()],
        "share_below_1": [float((f < 1).sum() / np.isfinite(f).sum()) for f in factors.values()],
        "median": [float(np.nanmedian(f)) for f in factors.values()],
        "largest": [float(np.nanmax(f)) for f in factors.values()],
    }
    summary = xr.Dataset(
        {name: ("space", column) for name, column in numbers.items()}, {"space": list(factors)}, found.attrs
    )
    known, lemma = (found.attrs.get(name) for name in ("uniform_factor", "lemma_factor"))
    proven = f"; every map contracts by {known:.4g}" if known else ""
    proven += f", by Lemma 2.5 by {lemma:.4g}" if lemma else ""
    title = f"factors of {pairs} pairs of {order} iterates under one batch{proven}"
    return [Table(title, summary, tuple(numbers), {}), _exponents(stored)]


def _exponents(stored: StoredExperiment) -> Table:
    import xarray as xr
    from trajstore.analysis import lyapunov

    title, seeds = "Lyapunov exponent of the products, along forward iterates", list(stored.schema.seeds)
    try:
        each = [lyapunov(stored, seed) for seed in seeds]
    except StatisticError as error:  # the factors have been found all the same
        return Table(f"{title}: {error}", xr.Dataset(), (), {})
    exponents = xr.concat(each, "seed", combine_attrs="drop_conflicts").assign_coords(seed=seeds)
    pairs = {"exponent": ("exponent_low", "exponent_high"), "rate": ("rate_low", "rate_high")}
    shown = ("exponent", "rate", "growth")
    if any(exponents["why"].values.tolist()):
        return Table(f"{title}; growth is that of a random difference", exponents, (*shown, "why"), pairs)
    return Table(title, exponents, shown, pairs)


ANALYSES: Mapping[str, Callable[..., list[Table]]] = {
    "variance": _variance,
    "convergence": _convergence,
    "resets": _resets,
    "contraction": _contraction,
    "law": _law,
}
"""Name on the command line → what makes its tables; its parameters are the options that it takes."""
_GROUP = "trajstore.statistics"


def analysis_names() -> list[str]:
    """Return the names of what can be asked, those that installed packages add last."""
    return [*ANALYSES, *(name for name in offered(_GROUP) if name not in ANALYSES)]


def _asked(name: str) -> Callable[..., list[Table]]:
    if name in ANALYSES:
        return ANALYSES[name]
    if name not in offered(_GROUP):
        raise NotFoundError(f"no analysis {name!r}; {choices(name, analysis_names())}")
    statistic = loaded(offered(_GROUP)[name])

    @functools.wraps(statistic)
    def tables(stored: StoredExperiment, **options: Any) -> list[Table]:  # noqa: ANN401  what it takes
        found = statistic(stored, **options)
        return [Table(str(found.attrs.get("long_name", name)), found, tuple(map(str, found.data_vars)), {})]

    return tables


def _complete_analysis(incomplete: str) -> list[str]:
    return [name for name in analysis_names() if name.startswith(incomplete)]


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
    import trajstore as ts

    asked = _asked(analysis)
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


def _window(result: xr.Dataset) -> str:
    a = result.attrs
    return f"{a['metric']}, {a['window']} recorded steps, {a['from_step']} to {a['to_step']}"
