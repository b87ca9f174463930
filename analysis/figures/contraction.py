"""Contraction: a panel an order, by which factors the distances of stored iterates grow under one batch."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from trajstore.analysis.contracting import contraction, lyapunov
from trajstore.analysis.figures._panels import Drawn, Given, Orders, Seeds, panels, titled
from trajstore.analysis.figures._style import order_colour, style
from trajstore.analysis.writing import interval

from trajstore.errors import NotFoundError, StatisticError, choices
from trajstore.store import StoredExperiment

__all__ = ["draw"]

_BINS, _COLUMNS, _WIDE, _HIGH = 40, 2, 3.45, 2.4


def draw(
    stored: StoredExperiment,
    *,
    pairs: int | None = None,
    seed: Seeds = None,
    order: Orders = None,
    axes: Given = None,
) -> Drawn:
    """Draw the factors of random pairs: 100 for an order, or as many as `pairs` says; left of 1 they contract.

    The dashed line is the rate of the products, from the Lyapunov exponent along forward iterates of the first seed; a
    dotted one is the factor by which every map is known to contract. The experiment is asked itself, not its dataset:
    the factors are computed with its operators.
    """
    names = [order] if isinstance(order, str) else list(order or stored.schema.orders)
    if unknown := [name for name in names if name not in stored.schema.orders]:
        raise NotFoundError(f"no order {unknown[0]!r}; {choices(unknown[0], stored.schema.orders)}")
    found = [contraction(stored, name, pairs or 100) for name in names]
    rate = _rate(stored, seed)
    with style():
        columns = min(len(names), _COLUMNS)
        rows, columns = (1, len(names)) if axes is not None else (-(-len(names) // columns), columns)
        made = panels(rows, columns, axes, (_WIDE, _HIGH))
        edges = _edges(found)
        for ax in made.flat[len(names) :]:
            ax.set_axis_off()
        for ax, name, factors in zip(made.flat, names, found, strict=False):
            _histogram(ax, name, factors, edges, names.index(name))
            ax.axvline(1, color="black", linewidth=0.8)
            if rate is not None:
                ax.axvline(float(rate["rate"]), color="black", linestyle="--", label="rate of the products")
            if (known := factors.attrs.get("uniform_factor")) is not None:
                ax.axvline(known, color="black", linestyle=":", label="proven factor")
            finite = factors["factor"].values[np.isfinite(factors["factor"].values)]
            share = f"{100 * float((finite < 1).mean()):.0f}% of {len(finite)} pairs contract"
            titled(ax, name, f"{share}, median {float(np.median(finite)):.4g}", _said(rate))
        made.label("factor ‖T x − T y‖ / ‖x − y‖", "pairs")
        made.legend()
    return made.figure


def _edges(found: list[xr.Dataset]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    values = np.concatenate([factors["factor"].values for factors in found])
    values = values[np.isfinite(values)]
    if not len(values):
        raise StatisticError("all pairs that were drawn are equal up to rounding, so there is no factor")
    low, high = float(values.min()), float(values.max())
    room = 0.05 * max(high - low, 0.02)
    return np.linspace(min(low, 1) - room, max(high, 1) + room, _BINS + 1)


def _histogram(
    ax: Axes, name: str, factors: xr.Dataset, edges: np.ndarray[tuple[int], np.dtype[np.float64]], position: int
) -> None:
    ax.hist(factors["factor"].values, edges.tolist(), color=order_colour(name, position), alpha=0.7)


def _rate(stored: StoredExperiment, seed: Seeds) -> xr.Dataset | None:
    """Return the exponent of the first seed, or None where the experiment is too short for one."""
    chosen = list(seed) if seed is not None and not isinstance(seed, int) else [seed] if seed is not None else []
    try:
        return lyapunov(stored, chosen[0] if chosen else None)
    except StatisticError:
        return None


def _said(rate: xr.Dataset | None) -> str:
    if rate is None:
        return ""
    value, low, high = (float(rate[name]) for name in ("rate", "rate_low", "rate_high"))
    if np.isnan(value):
        return "rate of the products not known"
    return f"rate of the products {interval(value, low, high)}"
