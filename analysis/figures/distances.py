"""Distance to the last iterate, a panel a seed: what converges to a point comes near it at a rate."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from numpy.typing import NDArray
from trajstore.analysis.convergence import convergence
from trajstore.analysis.figures._panels import (
    Drawn,
    Given,
    Orders,
    Seeds,
    log_axis,
    main_metric,
    named,
    refuse_empty,
    seed_panels,
    selected,
    sketched,
    slab_style,
    spans_decades,
    step_axis,
    titled,
)
from trajstore.analysis.figures._style import style
from trajstore.analysis.spaces import LAYER, PARAMETERS
from trajstore.analysis.windows import OUTPUTS, measured_steps, metrics_of
from trajstore.analysis.writing import interval

from trajstore.errors import StatisticError
from trajstore.reading.origin import attributes_of

__all__ = ["draw"]

_CONTRACTING = ("least-squares", "quadratic")
"""Problems whose maps may be known to contract; to ask takes torch, which other figures do without."""
_LEAST = 3
"""Stored states of a slab; with fewer there is no path to draw."""


def draw(
    ds: xr.Dataset,
    metric: str = PARAMETERS,
    *,
    window: int | None = None,
    seed: Seeds = None,
    order: Orders = None,
    axes: Given = None,
) -> Drawn:
    """Draw how far each iterate is from the last one: stored states, one layer, outputs, or the values of a metric.

    Where no slab has three stored states they are compared by their sketch, and the label says so. The title of a panel
    has the verdict of `analysis.convergence` over `window` recorded steps, by default the last half, and the rate, the
    factor a step by which moves shrink, where that is not 1; the dashed line has this rate. Where every batch map is
    known to contract by k < 1, a dotted line is Theorem 2.2's bound C kⁿ of backward iterates. `axes` are one a seed.
    """
    ds = selected(ds, seed, order)
    if metric == OUTPUTS and metric not in metrics_of(ds):
        from trajstore.analysis.probing import outputs

        ds = ds.assign(outputs=outputs(ds))  # once, for distances and verdicts
    far, label = _distances(ds, metric)
    far = refuse_empty(far.where(np.isfinite(far)), f"distances of {metric}")
    seeds = ds["seed"].values.tolist()
    verdict, where = _verdicts(ds, metric, window)
    with style():
        made = seed_panels(seeds, axes, height=1.75 + 0.28 * ds.sizes["order"])  # a line or two of title each
        for ax, one in zip(made.flat, seeds, strict=False):
            said = [f"seed {one}{f', on {where}:' if where else ''}"]
            for name in ds["order"].values.tolist():
                curve = far.sel(order=name, seed=one).dropna("step")
                ax.plot(curve["step"], curve, label=name, **slab_style(ds, name))
                found = verdict(name, one)
                if found is None:
                    said += [f"{name}: not finished"] if _unfinished(ds, name, one) else []
                else:
                    own = _steps(found)
                    said.append(f"{name}: {_said(found)}{'' if own == where else f' ({own})'}")
                    _rate(ax, curve, found)
                if name == "backward" and metric == PARAMETERS:
                    _bound(ax, ds, one, curve)
            titled(ax, *said)
        if spans_decades(far):
            log_axis(made.flat)
        step_axis(made.flat)
        made.label("step $n$", label)
        made.legend()
    return made.figure


def _distances(ds: xr.Dataset, metric: str) -> tuple[xr.DataArray, str]:
    """Return distances to the last iterate, (order, seed, step), and what to call them."""
    if metric == PARAMETERS or metric.startswith(LAYER):
        return _of_states(ds, metric)
    if metric == OUTPUTS and metric not in metrics_of(ds):
        return _of_outputs(ds["outputs"])
    main_metric(ds, metric)
    places, values, _ = measured_steps(ds, metric)
    there = ds["recorded"].transpose("order", "seed", "step").values[..., places]
    # NaN if the last one diverged: then nothing is near it
    far = np.abs(values - _last(values, there))
    coords = {"order": ds["order"].values, "seed": ds["seed"].values, "step": ds["step"].values[places]}
    return xr.DataArray(far, coords, ("order", "seed", "step")), f"|{named(metric)} − that of\nthe last iterate|"


def _of_states(ds: xr.Dataset, metric: str) -> tuple[xr.DataArray, str]:
    layers = metric.removeprefix(LAYER) if metric.startswith(LAYER) else None
    enough = ds["stored"].sum("snapshot") >= _LEAST
    if bool(enough.any()):
        far = ds.traj.distances(to="last", layers=layers).compute().rename(snapshot="step")
        return far.where(enough), f"distance{f' of {layers}' if layers else ''} to the\nlast stored state"
    if layers:
        raise StatisticError(f"{metric}: no slab has {_LEAST} stored states, and sketches know of no layers")
    far = ds.traj.sketch_distances(to="last").compute()
    return far, f"distance to the last iterate,\n{sketched(far.attrs['relative_error'])}"


def _of_outputs(found: xr.DataArray) -> tuple[xr.DataArray, str]:
    found = found.rename(snapshot="step")
    there = found.notnull().all(("probe", "output")).values
    gap = found.copy(data=found.values - _last(found.values, there))
    far = (gap**2).sum("output").mean("probe") ** 0.5
    return far.where(there), "distance of outputs to those\nof the last stored state"


def _last(values: NDArray[np.float64], there: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the last values of each slab that are there, along (order, seed, step, …)."""
    last = there.shape[2] - 1 - there[..., ::-1].argmax(-1)
    return np.take_along_axis(values, last.reshape(*last.shape, *[1] * (values.ndim - 2)), axis=2)


def _verdicts(ds: xr.Dataset, metric: str, window: int | None) -> tuple[Callable[[str, int], xr.Dataset | None], str]:
    """Return what finds the verdict on a slab, None where too little is recorded for any, and on which steps they are.

    What has been at rest for long shows no rate there: it is then looked at from the beginning. Where a slab is not
    finished, each of the others is looked at by itself.
    """
    try:
        found = convergence(ds, metric, window)
    except StatisticError:
        if window is not None:
            raise
        return (lambda order, seed: _verdict(ds.sel(order=[order], seed=[seed]), metric)), ""
    early = window is None and bool((found["rate"].isnull() & (found["verdict"] == "point")).any())
    whole = _or_none(ds, metric, 2 * found.attrs["window"]) if early else None

    def of(order: str, seed: int) -> xr.Dataset:
        one = found.sel(order=order, seed=seed)
        if whole is None:
            return one
        other = whole.sel(order=order, seed=seed)
        rests = one["verdict"].item() == other["verdict"].item() == "point" and not np.isfinite(one["rate"])
        return other if rests else one

    return of, _steps(found)


def _verdict(slab: xr.Dataset, metric: str) -> xr.Dataset | None:
    found = _or_none(slab, metric, None)
    return None if found is None else found.isel(order=0, seed=0)


def _or_none(ds: xr.Dataset, metric: str, window: int | None) -> xr.Dataset | None:
    try:
        return convergence(ds, metric, window)
    except StatisticError:
        return None


def _steps(found: xr.Dataset) -> str:
    return f"steps {found.attrs['from_step']}–{found.attrs['to_step']}"


def _unfinished(ds: xr.Dataset, order: str, seed: int) -> bool:
    """Tell whether a slab has fewer steps than another; of an adaptive grid, whether it has come less far."""
    there = ds["recorded"] * ds["step"] if ds.attrs.get("adaptive") else ds["recorded"]
    reached = there.max("step") if ds.attrs.get("adaptive") else there.sum("step")
    return bool(reached.sel(order=order, seed=seed) < reached.max())


def _said(found: xr.Dataset) -> str:
    verdict, (rate, low, high) = found["verdict"].item(), (float(found[k]) for k in ("rate", "rate_low", "rate_high"))
    if low > 1 or high < 1:
        return f"{verdict}, rate {interval(rate, low, high)}"
    if found["why"].item().startswith("diverged"):
        return "diverged"
    rests = float(found["rest_from"])
    return f"{verdict}, at rest from step {rests:.0f}" if verdict == "point" and np.isfinite(rests) else str(verdict)


def _bound(ax: Axes, ds: xr.Dataset, seed: int, curve: xr.DataArray) -> None:
    """Draw what Theorem 2.2 says of the distances, where it says something, as far down as they go."""
    config = attributes_of(ds).get("config", {})
    if config.get("problem", {}).get("family") not in _CONTRACTING or len(curve) < _LEAST:
        return
    from trajstore.analysis.contracting import limit_bound

    try:
        bound = limit_bound(ds, seed, curve["step"].values)
    except StatisticError:  # not all maps are known to contract
        return
    shown = bound >= float(curve.where(curve > 0).min())
    if shown.sum() < _LEAST:
        return
    ax.plot(curve["step"].values[shown], bound[shown], ":", linewidth=1.0, color="black", label="bound $C k^n$")


def _rate(ax: Axes, curve: xr.DataArray, found: xr.Dataset) -> None:
    """Draw the fitted rate beside what it was fitted to, if it is one of convergence."""
    rate = float(found["rate"])
    if found["verdict"].item() != "point" or not rate < 1:
        return
    until = float(found["rest_from"])
    stop = found.attrs["to_step"] if np.isnan(until) else until
    here = curve[(curve["step"] >= found.attrs["from_step"]) & (curve["step"] <= stop) & (curve > 0)]
    if len(here) < _LEAST:
        return
    steps = here["step"].values.astype(float)
    # The last iterate is at no distance of itself: the first half of them is hardly bent by that.
    first = slice(0, max(1, len(steps) // 2))
    height = float(np.median(np.log(here.values[first]) - steps[first] * np.log(rate)))
    ax.plot(steps, np.exp(height + steps * np.log(rate)), linestyle="--", linewidth=1.0, color="black", zorder=9)
