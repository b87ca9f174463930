"""Which recorded steps a statistic looks at, and what a metric is there.

A window is the last so many steps at which a metric was measured. Every slab must have all of them, evenly spaced:
anything else would be a number about something else, so it is an error that says what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from trajstore.analysis.rounding import UNKNOWN, Precision

from trajstore.errors import NotFoundError, StatisticError, choices
from trajstore.reading.origin import attributes_of
from trajstore.storage.format.metrics import MEASURES

__all__ = [
    "OUTPUTS",
    "SLABS",
    "Window",
    "dense_tail",
    "ends_early",
    "even_tail",
    "evenly",
    "measured_steps",
    "measured_where",
    "metrics_of",
    "own_metrics",
    "precision_of",
    "resets_within",
    "stored_window",
    "uneven",
    "usual_metric",
    "usual_window",
    "window_of",
    "with_slabs",
]

SLABS = ("order", "seed")
OUTPUTS = "outputs"
"""What a problem makes of its probe, among metrics and other spaces."""
_BEGINNING, _JUMP = 5, 100.0
"""Measured steps that say how large a metric was at first, and how much larger than those the first may count."""


@dataclass(frozen=True)
class Window:
    """A metric over consecutive recorded steps, slab by slab."""

    metric: str
    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    """(order, seed, step); not finite where the slab diverged."""
    coords: dict[str, Any]
    """The coordinates order and seed."""
    precision: Precision = UNKNOWN

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def gap(self) -> int:
        """Steps from one to the next."""
        return int(self.steps[1] - self.steps[0])

    @property
    def attrs(self) -> dict[str, Any]:
        """What a result says of the window that it is about."""
        return {
            "metric": self.metric, "window": len(self), "from_step": int(self.steps[0]), "to_step": int(self.steps[-1])
        }  # fmt: skip

    def over_slabs(self, values: NDArray[Any], name: str) -> xr.DataArray:
        """Return one value a slab, labelled."""
        return xr.DataArray(values, dims=SLABS, coords=self.coords, name=name, attrs=self.attrs)


def metrics_of(ds: xr.Dataset) -> list[str]:
    """Return the names of the metrics of a dataset."""
    flagged = _flagged(ds)
    return [*flagged, *(str(name) for name, v in ds.data_vars.items() if "late" in v.attrs and name not in flagged)]


def own_metrics(ds: xr.Dataset) -> list[str]:
    """Return the metrics that were recorded of the problem, or what there is, without those without any value."""
    known = metrics_of(ds)
    own = [name for name in known if name not in MEASURES and "late" not in ds[name].attrs] or known
    valued = [name for name in own if bool(np.isfinite(ds[name]).any())]
    if not valued:
        raise StatisticError(f"no metric of {', '.join(own) or 'this experiment'} has a finite value")
    return valued


def usual_metric(ds: xr.Dataset) -> str:
    """Return the metric to look at first: the test loss, or else the first of the experiment's own."""
    own = own_metrics(ds)
    return "test_loss" if "test_loss" in own else own[0]


def with_slabs(variable: xr.DataArray) -> xr.DataArray:
    """Return a variable with the dimensions order and seed, also where one of each was selected."""
    return variable.expand_dims([dim for dim in SLABS if dim not in variable.dims]).transpose(*SLABS, ...)


def window_of(
    ds: xr.Dataset,
    metric: str,
    window: int | Literal["all"] | None = None,
    least: int = 3,
    called: str | None = None,
) -> Window:
    """Return the last `window` steps at which a metric was measured, or by default the last half of all of them.

    Of an adaptive grid with a dense tail, the default is that tail, at most the last half.

    `least` is how many steps a statistic takes at the least, `called` what an error calls it, by default the metric.
    """
    what = called or metric
    if isinstance(window, int) and window < least:
        raise StatisticError(f"window is {window}; this statistic needs at least {least} steps")
    recorded, known = _masks(ds, metric, what)
    steps = _measured(ds, what, recorded & known)
    lacks = {"has no step": recorded[..., steps], "was not measured at step": known[..., steps]}
    tail = steps[_window(ds, what, ds["step"].values[steps], lacks, window, least)]
    labels = ds["step"].values[tail]
    coords = {dim: np.atleast_1d(ds[dim].values) for dim in SLABS}
    values = with_slabs(ds[metric].isel(step=tail)).values.astype(np.float64)
    return Window(metric, labels.astype(np.int64), values, coords, precision_of(ds, metric))


def precision_of(ds: xr.Dataset, metric: str) -> Precision:
    """Return what is known of how a metric was computed: the dtype of the states, and how large it was at first.

    Training may begin with a jump, from outputs so large that they say nothing of the numbers that are learned. So the
    first value counts as at most 100 times the median of the first five that were measured.
    """
    layout = attributes_of(ds).get("schema", {}).get("layout", {})
    known = {entry["dtype"] for entry in layout.get("entries", ()) if entry["role"] == "parameter"}
    recorded, measured = _masks(ds, metric, metric)
    there = recorded & measured
    begun = np.flatnonzero(there.any((0, 1)))[:_BEGINNING]
    sizes = np.abs(with_slabs(ds[metric].isel(step=begun)).values.astype(np.float64))
    sizes = np.where(there[..., begun] & np.isfinite(sizes), sizes, np.nan)
    usual = [
        float(np.median(column[~np.isnan(column)]))
        for column in np.moveaxis(sizes, -1, 0)
        if not np.isnan(column).all()
    ]
    start = min(usual[0], _JUMP * float(np.median(usual))) if usual else 0.0
    return Precision(np.dtype(np.float64 if known == {"float64"} else np.float32) if known else None, start)


def resets_within(ds: xr.Dataset, steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many resets lie between the first and the last of some steps, (order, seed)."""
    if "leg" not in ds:
        return np.zeros(with_slabs(ds["recorded"]).shape[:2], dtype=np.int64)
    legs = with_slabs(ds["leg"].sel(step=steps)).values
    return np.asarray((np.diff(legs, axis=-1) != 0).sum(-1), dtype=np.int64)


def stored_window(ds: xr.Dataset, what: str, window: int | None = None, least: int = 3) -> NDArray[np.int64]:
    """Return the last `window` steps with a stored state, or the last half of them; every slab must have them all."""
    stored = with_slabs(ds["stored"]).values
    places = np.flatnonzero(stored.any((0, 1)))
    asked = least if window is None else window
    if asked < least or len(places) < asked:
        raise StatisticError(
            f"{what}: {len(places)} states are stored; a window of {asked} needs as many, and this statistic at "
            f"least {least}"
        )
    labels = ds["snapshot"].values[places]
    steps = labels[_window(ds, what, labels, {"has no state of step": stored[:, :, places]}, window, least)]
    return np.asarray(steps, dtype=np.int64)


def measured_steps(ds: xr.Dataset, metric: str) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]]:
    """Return the places along `step` where a metric was measured in some slab, its values, and which there are.

    Both are (order, seed, step); values are NaN where there are none, and where training diverged.
    """
    recorded, known = _masks(ds, metric, metric)
    there = recorded & known
    places = _measured(ds, metric, there)
    values = with_slabs(ds[metric].isel(step=places)).values.astype(np.float64)
    return places, np.where(there[..., places], values, np.nan), there[..., places]


def _masks(ds: xr.Dataset, metric: str, what: str) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which steps were recorded, and where the metric was measured, both (order, seed, step)."""
    if not {"measured", "recorded"} <= set(ds.variables):
        raise StatisticError(
            f"{what}: this dataset does not say at which steps it was measured; select steps, orders and seeds, "
            "not variables"
        )
    if metric not in metrics_of(ds) or metric not in ds:
        if what != metric:
            raise StatisticError(
                f"{what}: this dataset does not have {metric!r}; select steps, orders and seeds, not variables"
            )
        raise NotFoundError(f"no metric {metric!r}; {choices(metric, metrics_of(ds))}")
    if "step" not in ds[metric].dims:
        raise StatisticError(f"{what}: one step was selected, and a statistic over time needs several")
    return with_slabs(ds["recorded"]).values, with_slabs(measured_where(ds, metric)).values


def _measured(ds: xr.Dataset, metric: str, there: NDArray[np.bool_]) -> NDArray[np.int64]:
    if not bool(ds["recorded"].any()):
        raise StatisticError(f"{metric}: nothing is recorded yet")
    places = np.flatnonzero(there.any((0, 1)))
    if not len(places):
        raise StatisticError(f"{metric}: it was not measured at any recorded step")
    return places


def measured_where(ds: xr.Dataset, metric: str) -> xr.DataArray:
    """Return where a metric has a value, be it NaN because training diverged."""
    flagged = _flagged(ds)
    return ds["measured"] >> flagged.index(metric) & 1 > 0 if metric in flagged else ds[metric].notnull()


def _flagged(ds: xr.Dataset) -> list[str]:
    """Return the metrics that have a bit of their own."""
    return str(ds["measured"].attrs.get("flag_meanings", "")).split()


def ends_early(steps: NDArray[Any]) -> bool:
    """Tell whether the last step comes before its time, since it is recorded on any grid."""
    gaps = np.diff(steps[-3:])
    return len(gaps) == 2 and bool(gaps[1] < gaps[0])


def even_tail(steps: NDArray[Any], complete: NDArray[np.bool_] | None = None) -> int:
    """Return how many of the last steps are evenly spaced, and complete, where that is told of each.

    >>> even_tail(np.array([0, 4, 6, 7, 8, 9]))
    4
    """
    whole = np.ones(len(steps), dtype=bool) if complete is None else complete
    lacking = np.flatnonzero(~whole)
    steps = steps[lacking[-1] + 1 if len(lacking) else 0 :]
    gaps = np.diff(steps)
    if not len(gaps) or gaps[-1] <= 0:
        return min(len(steps), 1)
    other = np.flatnonzero(gaps != gaps[-1])
    return len(gaps) - (int(other[-1]) + 1 if len(other) else 0) + 1


def usual_window(ds: xr.Dataset, steps: NDArray[Any], even: int) -> int:
    """Return how many of some steps to look at where nobody says: the last half of them.

    Where an adaptive grid has left some of these out, it is the tail that it was to have whole.
    """
    tail = dense_tail(ds)
    if tail is None or even < 2:
        return len(steps) // 2
    places = int(steps[-1] - steps[0]) // int(steps[-1] - steps[-2]) + 1
    return places // 2 if even >= places // 2 else min(places // 2, tail, even)


def dense_tail(ds: xr.Dataset) -> int | None:
    """Return how many of the last steps of each leg an adaptive grid was to have whole."""
    found = attributes_of(ds).get("config", {}).get("record", {}).get("dense_tail")
    return None if found is None else int(found)


def evenly(ds: xr.Dataset) -> str:
    """Return how to record steps so that they are evenly spaced where they are not."""
    if not ds.attrs.get("adaptive"):
        return "record them evenly"
    tail = dense_tail(ds)
    end = "the end of each leg (dense_tail)" if not tail else f"a longer dense_tail, now {tail}"
    return f"record them evenly, or {end}"


def uneven(ds: xr.Dataset, what: str, steps: NDArray[Any], longest: str) -> StatisticError:
    """Return the error that says that steps are not evenly spaced; `longest` says what there is that is."""
    why = f" where {ds.attrs['adaptive']} changes most" if ds.attrs.get("adaptive") else ""
    return StatisticError(
        f"{what}: steps {steps[0]} to {steps[-1]} are recorded at uneven distances{why}, and a statistic over time "
        f"would be wrong; {longest}"
    )


def _window(
    ds: xr.Dataset,
    what: str,
    labels: NDArray[Any],
    lacks: Mapping[str, NDArray[np.bool_]],
    window: int | Literal["all"] | None,
    least: int,
) -> slice:
    """Return which of some steps are the window; refuse one that is uneven, or that some slab lacks steps of.

    `lacks` says (order, seed, step) which there are, by how an error tells that one is missing.
    """
    count = len(labels) - ends_early(labels)
    labels, lacks = labels[:count], {lack: there[..., :count] for lack, there in lacks.items()}
    complete = np.logical_and.reduce([there.all((0, 1)) for there in lacks.values()])
    even = even_tail(labels, complete)
    usual = count if window == "all" else usual_window(ds, labels, even)
    asked = max(least, window if isinstance(window, int) else usual)
    if count < asked:
        raise StatisticError(f"{what}: it was measured at {count} steps, fewer than the window of {asked}")
    tail = labels[-asked:]
    if even >= asked:
        return slice(count - asked, count)
    if (np.diff(tail) < 0).any():
        raise StatisticError(f"{what}: the steps decrease, from {tail[0]} to {tail[-1]}; sort them")
    longest = evenly(ds)
    if even > 2:
        longest += f"; the longest even window is {even}, from step {labels[-even]} on"
    if len(set(np.diff(tail).tolist())) > 1:
        raise uneven(ds, what, tail, longest)
    for lack, there in lacks.items():
        missing = ~there[..., -asked:]
        if missing.any():
            order, seed, step = next(zip(*np.nonzero(missing), strict=True))
            names, seeds = (np.atleast_1d(ds[dim].values) for dim in SLABS)
            slab = f"order {str(names[order])!r}, seed {seeds[seed]}"
            # The last step is on every grid: a slab that has it has left out the others.
            left_out = bool(ds.attrs.get("adaptive")) and bool(there[order, seed, -1])
            remedy = longest if left_out else "finish the recording, or select the orders and seeds that are complete"
            raise StatisticError(f"{what}: {slab} {lack} {tail[step]}; {remedy}")
    raise AssertionError("an uneven window is uneven, or lacks a step")
