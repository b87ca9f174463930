"""The figures of the paper, one declaration each: what they show of an experiment, and in which layout.

Any experiment can be drawn as any of them that it has the metrics and orders for. Each says in words, with an interval,
what the paper reads off by eye.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from types import MappingProxyType

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from trajstore.analysis.comparing import compare
from trajstore.analysis.figures import learning_curves, reset
from trajstore.analysis.figures._panels import Drawn, Orders, Seeds, named, panels, selected, step_axis, titled
from trajstore.analysis.figures._ratios import ratios
from trajstore.analysis.figures._style import FURTHER_COLOURS, ORDER_COLOURS, style
from trajstore.analysis.local import local_variance_ratio
from trajstore.analysis.resets import resets
from trajstore.analysis.windows import metrics_of
from trajstore.analysis.writing import interval

from trajstore.errors import NotFoundError

__all__ = ["PAPER", "Curves", "Levels", "Variants"]

_LOSSES = ("train_loss", "test_loss")
_ALL = (*_LOSSES, "train_accuracy", "test_accuracy")
_FORWARD, _BASE = "forward", "large"
_ROW = (3.3, 1.9)
_WIDE = (5.0, 2.3)
_COLOURS = (*ORDER_COLOURS.values(), *FURTHER_COLOURS)
_SPREAD = 5
"""Differences beyond so many times their median are left out of the panel."""


@dataclass(frozen=True)
class Curves:
    """Learning curves, a row a seed; above each panel, how many times forward varies more than the other order."""

    metrics: tuple[str, ...]
    first: int | None = None
    """Only so many seeds, unless others are asked for."""

    def __call__(self, ds: xr.Dataset, *, seed: Seeds = None, order: Orders = None) -> Drawn:
        """Draw it."""
        _refuse_missing(ds, self.metrics)
        ds = selected(_seeds(ds, seed, self.first), order=order)
        seeds, other = ds["seed"].values.tolist(), _other(ds)
        with style():
            made = panels(len(seeds), len(self.metrics), None, _ROW, share_y="col")
            learning_curves.draw(ds, self.metrics, axes=made.flat)
            for column, metric in enumerate(self.metrics):
                told = ratios(ds, metric, local_variance_ratio, (_FORWARD, other)) if other else {}
                for row, one in enumerate(seeds):
                    titled(made.at(row, column), "" if row else named(metric), told.get(one, ""))
            made.label("step $n$", "")
            for row, one in enumerate(seeds):
                made.at(row, 0).set_ylabel(f"seed {one}")
            made.legend()
        return made.figure


@dataclass(frozen=True)
class Levels:
    """The levels of a metric before and after a reset, seeds one above the other, and how much less it varies."""

    metric: str
    first: int | None = None

    def __call__(self, ds: xr.Dataset, *, seed: Seeds = None) -> Drawn:
        """Draw it."""
        _refuse_missing(ds, (self.metric,))
        ds = _seeds(ds, seed, self.first)
        with style():
            made = panels(ds.sizes["seed"], 1, None, _WIDE)
            reset.draw(ds, self.metric, axes=made.flat)
            restarted = str(resets(ds, self.metric)["order"].values[0])
            told = ratios(ds, self.metric, local_variance_ratio, (_FORWARD, restarted))
            for ax, one in zip(made.flat, ds["seed"].values.tolist(), strict=True):
                titled(ax, *ax.get_title(loc="left").split("\n"), told.get(one, ""))
            made.label("step $n$", named(self.metric))
            made.legend()
        return made.figure


@dataclass(frozen=True)
class Variants:
    """A metric of all variants, a row a seed, and beside it what each differs by from the first of them."""

    metric: str

    def __call__(self, variants: Mapping[str, xr.Dataset], *, seed: Seeds = None) -> Drawn:
        """Draw it."""
        chosen = {name: selected(ds, seed, _FORWARD) for name, ds in variants.items()}
        for ds in chosen.values():
            _refuse_missing(ds, (self.metric,))
        found = compare(chosen, self.metric, _BASE if _BASE in chosen else None)
        base, seeds = found.attrs["base"], found["seed"].values.tolist()
        with style():
            made = panels(len(seeds), 2, None, _WIDE, share_y="col")
            for row, one in enumerate(seeds):
                for colour, name in zip(cycle(_COLOURS), found["variant"].values.tolist(), strict=False):
                    mine, label = found.sel(variant=name, seed=one), f"{name}{_effect(found.sel(variant=name), base)}"
                    for column, what in enumerate(("curve", "difference")):
                        made.at(row, column).plot(mine["step"], mine[what], label=label, color=colour)
                made.at(row, 1).axvspan(found.attrs["from_step"], found.attrs["to_step"], color="black", alpha=0.06)
                titled(made.at(row, 0), f"seed {one}, {named(self.metric)}")
                titled(made.at(row, 1), f"less that of {base!r}{_zoom(made.at(row, 1), found['difference'])}")
            step_axis(made.flat)
            made.label(f"step $n$ of {base!r}", "")
            made.legend()
        return made.figure


def _zoom(ax: Axes, differences: xr.DataArray) -> str:
    """Show the differences that are of one size; return what to say of those that leave the panel."""
    sizes = abs(differences).max(("seed", "step"))
    shown = sizes <= _SPREAD * float(sizes.median())
    reach = 1.1 * float(sizes.where(shown).max())
    if bool(shown.all()) or not 0 < reach < np.inf:
        return ""
    ax.set_ylim(-reach, reach)
    return f"; beyond the panel: {', '.join(sizes['variant'].values[~shown.values])}"


def _effect(found: xr.Dataset, base: str) -> str:
    if found["variant"].item() == base:
        return ""
    return f": {interval(*(float(found[name]) for name in ('mean', 'low', 'high')))}"


def _seeds(ds: xr.Dataset, seed: Seeds, first: int | None) -> xr.Dataset:
    return selected(ds, ds["seed"].values.tolist()[:first] if seed is None and ds["seed"].ndim else seed)


def _other(ds: xr.Dataset) -> str | None:
    """Return the order that forward is compared with: the first other one, if there is forward."""
    orders = ds["order"].values.tolist()
    others = [order for order in orders if order != _FORWARD]
    return others[0] if others and _FORWARD in orders else None


def _refuse_missing(ds: xr.Dataset, metrics: tuple[str, ...]) -> None:
    known = metrics_of(ds)
    if missing := [metric for metric in metrics if metric not in known]:
        raise NotFoundError(
            f"experiment {ds.attrs.get('experiment')!r} has no {missing[0]}, which this figure shows; it has "
            f"{', '.join(known)}"
        )


PAPER: Mapping[str, Curves | Levels | Variants] = MappingProxyType(
    {
        "fig2": Curves(_ALL, first=1),
        "fig3": Levels("test_accuracy", first=2),
        **{f"fig{n}": Curves(_LOSSES) for n in (4, 5, 6)},
        **{f"fig{n}": Curves(_ALL) for n in range(7, 14)},
        **{f"fig{n}": Variants("test_loss" if n % 2 else "train_loss") for n in range(14, 20)},
    }
)
"""Number in the paper → what it shows."""
