"""Which recorded steps a statistic looks at, and what a metric is there.

A window is the last so many steps at which a metric was measured. Every slab must have all of them, evenly spaced:
anything else would be a number about something else, so it is an error that says what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from trajstore.analysis.rounding import UNKNOWN, Precision

from trajstore.errors import NotFoundError, StatisticError, choices
from trajstore.measures import MEASURES
from trajstore.origin import attributes_of

__all__ = [
    "SLABS",
    "Window",
    "ends_early",
    "measured_steps",
    "measured_where",
    "metrics_of",
    "own_metrics",
    "precision_of",
    "resets_within",
    "stored_window",
    "usual_metric",
    "window_of",
    "with_slabs",
]

SLABS = ("order", "seed")


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

    `least` is how many steps a statistic takes at the least, `called` what an error calls it, by default the metric.
    """
    what = called or metric
    if isinstance(window, int) and window < least:
        raise StatisticError(f"window is {window}; this statistic needs at least {least} steps")
    recorded, known = _masks(ds, metric, what)
    steps = _measured(ds, what, recorded & known)
    steps = steps[: len(steps) - ends_early(ds["step"].values[steps])]
    asked = max(least, len(steps) // 2 if window is None else len(steps) if window == "all" else window)
    if len(steps) < asked:
        raise StatisticError(f"{what}: it was measured at {len(steps)} steps, fewer than the window of {asked}")
    tail = steps[-asked:]
    labels = ds["step"].values[tail]
    _refuse_uneven(ds, what, labels)
    coords = {dim: np.atleast_1d(ds[dim].values) for dim in SLABS}
    for there, lack in ((recorded, "has no step"), (known, "was not measured at step")):
        missing = ~there[:, :, tail]
        if missing.any():
            order, seed, step = next(zip(*np.nonzero(missing), strict=True))
            raise StatisticError(
                f"{what}: order {str(coords['order'][order])!r}, seed {coords['seed'][seed]} {lack} {labels[step]}; "
                "finish the recording, or select the orders and seeds that are complete"
            )
    values = with_slabs(ds[metric].isel(step=tail)).values.astype(np.float64)
    return Window(metric, labels.astype(np.int64), values, coords, precision_of(ds, metric))


def precision_of(ds: xr.Dataset, metric: str) -> Precision:
    """Return what is known of how a metric was computed: the dtype of the states, and how large it was at first."""
    layout = attributes_of(ds).get("schema", {}).get("layout", {})
    known = {entry["dtype"] for entry in layout.get("entries", ()) if entry["role"] == "parameter"}
    recorded, measured = _masks(ds, metric, metric)
    there = recorded & measured
    first = int(there.any((0, 1)).argmax())
    begun = np.abs(with_slabs(ds[metric].isel(step=first)).values[there[..., first]].astype(np.float64))
    begun = begun[np.isfinite(begun)]
    start = float(np.median(begun)) if len(begun) else 0.0
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
    places = places[: len(places) - ends_early(ds["snapshot"].values[places])]
    asked = max(least, len(places) // 2) if window is None else window
    if asked < least or len(places) < asked:
        raise StatisticError(
            f"{what}: {len(places)} states are stored; a window of {asked} needs as many, and this statistic at "
            f"least {least}"
        )
    tail = places[-asked:]
    steps = ds["snapshot"].values[tail]
    _refuse_uneven(ds, what, steps)
    missing = ~stored[:, :, tail]
    if missing.any():
        order, seed, step = next(zip(*np.nonzero(missing), strict=True))
        labels = [np.atleast_1d(ds[dim].values) for dim in SLABS]
        raise StatisticError(
            f"{what}: order {str(labels[0][order])!r}, seed {labels[1][seed]} has no state of step {steps[step]}; "
            "finish the recording, or select the orders and seeds that are complete"
        )
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


def _refuse_uneven(ds: xr.Dataset, metric: str, steps: NDArray[Any]) -> None:
    gaps = set(np.diff(steps).tolist())
    if len(gaps) <= 1:
        if gaps and min(gaps) < 0:
            raise StatisticError(f"{metric}: the steps decrease, from {steps[0]} to {steps[-1]}; sort them")
        return
    why = f" where {ds.attrs['adaptive']} changes most" if ds.attrs.get("adaptive") else ""
    raise StatisticError(
        f"{metric}: steps {steps[0]} to {steps[-1]} are recorded at uneven distances{why}, and a statistic over time "
        "would be wrong; record them evenly, or choose a window that is even"
    )
