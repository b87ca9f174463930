"""What figures share: which slabs are drawn, a panel a seed, axes whose ticks can be read.

Seeds are drawn one by one and never averaged. What a figure has to say in words stands in the title of a panel and the
legend beside the panels, so that neither lies over data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from textwrap import wrap
from typing import Any, Literal, cast

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray
from trajstore.analysis.figures._style import order_colour, style
from trajstore.analysis.windows import SLABS, measured_where, metrics_of, usual_metric

from trajstore.errors import ConfigurationError, NotFoundError, StatisticError, choices

__all__ = [
    "Drawn",
    "Given",
    "Orders",
    "Panels",
    "Seeds",
    "log_axis",
    "main_metric",
    "named",
    "panels",
    "recorded",
    "refuse_empty",
    "seed_panels",
    "selected",
    "sketched",
    "slab_style",
    "spans_decades",
    "step_axis",
    "titled",
]

Drawn = Figure | SubFigure
"""What a figure returns: one of its own, or that of the axes that were passed in."""
Given = Axes | Sequence[Axes] | NDArray[Any] | None
"""Axes that are passed in, row by row; None for a figure of its own."""
Seeds = int | Sequence[int] | None
"""One, several, or None for all."""
Orders = str | Sequence[str] | None
"""One, several, or None for all."""

_MOST = 24
"""Panels: more could not be read."""
_PAGE = 6.9
"""Inches: the width of a page's text."""
_LETTERS = 17.5
"""Letters of a title to the inch."""
_HANDLE = 8
"""Letters as wide as what stands before a label in a legend."""
_HIGHEST = 1e200
"""Values beyond are not drawn: an axis of them would overflow."""
_SHOWN = 0.8
"""Share of the values that a logarithmic axis must be able to show."""


class _Shown(Figure):
    """A figure that a notebook shows by itself, whatever backend there is."""

    def _repr_png_(self) -> bytes:
        made = BytesIO()
        with style():
            self.savefig(made, format="png")
        return made.getvalue()


def titled(ax: Axes, *parts: str) -> None:
    """Write above a panel what it is and what is known of it, in lines no wider than the panel."""
    wide = int(ax.get_window_extent().width / ax.figure.dpi * _LETTERS)
    lines = (line for part in parts if part for line in wrap(part, max(wide, 20), break_on_hyphens=False))
    ax.set_title("\n".join(lines))


@dataclass(frozen=True)
class Panels:
    """Axes to draw on, and the figure that they are on."""

    figure: Drawn
    axes: NDArray[Any]
    """(row, column) of Axes."""
    own: bool
    """Whether the figure was made here; the legend of another's is its owner's affair."""

    @property
    def flat(self) -> list[Axes]:
        """The axes, row by row."""
        return list(self.axes.flat)

    def at(self, row: int, column: int) -> Axes:
        """Return one of them."""
        return cast(Axes, self.axes[row, column])

    def legend(self) -> None:
        """Tell the lines of all panels apart, above them."""
        if not self.own:
            return
        found: dict[str, Any] = {}
        for ax in self.flat:
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
                found.setdefault(label, handle)
        if found:
            room = self.figure.bbox.width / self.figure.dpi * _LETTERS
            fitting = int(room // (max(map(len, found)) + _HANDLE))
            rows = -(-len(found) // max(1, fitting))
            columns = -(-len(found) // rows)
            self.figure.legend(list(found.values()), list(found), loc="outside upper center", ncols=columns)

    def label(self, x: str, y: str) -> None:
        """Label the axes at the left and at the bottom."""
        rows, columns = self.axes.shape
        for row, column in np.ndindex(rows, columns):
            ax = self.at(row, column)
            if not ax.axison:
                continue
            below = row + 1 < rows and self.at(row + 1, column).axison
            if not below:
                ax.set_xlabel(x)
                ax.tick_params(labelbottom=True)
            if column == 0 or not self.own:
                ax.set_ylabel(y)


def panels(
    rows: int, columns: int, given: Given, size: tuple[float, float], share_y: bool | Literal["col"] = True
) -> Panels:
    """Return rows × columns of axes, each of a size in inches, or those that were passed in."""
    if given is not None:
        axes = np.array([given] if isinstance(given, Axes) else given, dtype=object).ravel()
        if len(axes) != rows * columns:
            raise ConfigurationError(f"{len(axes)} axes were passed in; this figure takes {rows * columns}")
        return Panels(axes[0].figure, axes.reshape(rows, columns), own=False)
    _refuse_many(rows * columns)
    width, height = size
    figure = _Shown(figsize=(width * columns, height * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=share_y, squeeze=False)
    return Panels(figure, axes, own=True)


def seed_panels(seeds: Sequence[int], given: Given, height: float = 2.3) -> Panels:
    """Return a panel a seed, titled; as wide as a page together."""
    count = len(seeds)
    _refuse_many(count)
    if given is not None:
        made = panels(1, count, given, (0, 0))
    else:  # three a row, or two where that leaves no gap
        columns = count if count <= 3 else 3 if count % 3 == 0 or count > 4 else 2
        width = 4.4 if columns == 1 else _PAGE / columns
        made = panels(-(-count // columns), columns, None, (width, height))
    for ax in made.flat[count:]:
        ax.set_axis_off()
    return made


def _refuse_many(count: int) -> None:
    if count > _MOST:
        raise ConfigurationError(f"{count} panels are more than can be read; choose fewer seeds")


def selected(ds: xr.Dataset, seed: Seeds = None, order: Orders = None) -> xr.Dataset:
    """Return the seeds and orders that were asked for, along both dimensions; refuse if nothing of them is recorded."""
    masks = [name for name in ("recorded", "stored") if name in ds.coords]
    loose = [dim for dim in SLABS if dim not in ds.dims]
    if loose:
        ds = ds.reset_coords(masks).expand_dims(loose).set_coords(masks)
    for dim, asked in (("seed", seed), ("order", order)):
        if asked is None:
            continue
        known = ds[dim].values.tolist()
        wanted = list(dict.fromkeys(np.atleast_1d(np.asarray(asked)).tolist()))
        for one in wanted:
            if one not in known:
                # The seed with the most similar digits is of no help.
                there = choices(one, known) if dim == "order" else f"there is {', '.join(map(str, known))}"
                raise NotFoundError(f"no {dim} {one!r}; {there}")
        ds = ds.sel({dim: wanted})
    if not bool(ds["recorded"].any()):
        raise StatisticError(
            f"experiment {ds.attrs.get('experiment')!r}: nothing is recorded yet, so there is nothing to draw"
        )
    return ds


def main_metric(ds: xr.Dataset, metric: str | None) -> str:
    """Return the metric that was asked for, or the one to look at first; an error if it has no value to draw."""
    if metric is None:
        return usual_metric(ds)
    if metric not in (known := metrics_of(ds)):
        raise NotFoundError(f"no metric {metric!r}; {choices(metric, known)}")
    if not bool(np.isfinite(ds[metric]).any()):
        raise StatisticError(f"{metric}: no value is finite, so there is nothing to draw")
    return metric


def slab_style(ds: xr.Dataset, order: str) -> dict[str, Any]:
    """Return how lines of an order look in every figure; those of `forward`, the noisiest, lie below."""
    position = ds["order"].values.tolist().index(order)
    return {
        "color": order_colour(order, position),
        "zorder": 2 + position,
        "linewidth": 0.7 if order == "forward" else 1.1,
    }


def sketched(error: float) -> str:
    """Return how a label says that distances come from the sketch, whose relative error this is."""
    return f"from the sketch (±{error:.0%})" if error else "from the sketch, which is exact"


def named(metric: str) -> str:
    """Return a metric's name as a label has it."""
    return metric.replace("_", " ")


def recorded(ds: xr.Dataset, metric: str, order: str, seed: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the steps of a slab at which a metric was measured and its values, as far as they can be drawn."""
    here = (ds["recorded"] & measured_where(ds, metric)).sel(order=order, seed=seed).values
    values = ds[metric].sel(order=order, seed=seed).values[here]
    return ds["step"].values[here], np.where(np.abs(values) < _HIGHEST, values, np.nan)


def refuse_empty(found: xr.DataArray, what: str) -> xr.DataArray:
    """Return what is to be drawn, unless nothing of it is finite."""
    if not bool(np.isfinite(found).any()):
        raise StatisticError(
            f"{what}: every slab has diverged, so there is nothing to draw; select the steps before that"
        )
    return found


def spans_decades(values: ArrayLike) -> bool:
    """Tell whether a logarithmic axis serves: more than a decade, and next to nothing that it could not show.

    Of an accuracy it never does: what nears 1 is what matters.
    """
    if isinstance(values, xr.DataArray) and str(values.name).endswith("accuracy"):
        return False
    array = np.asarray(values)
    finite = array[np.isfinite(array)]
    shown = finite[finite > 0]
    # What has come to rest may be 0 at last.
    some = len(shown) >= _SHOWN * len(finite) and not (finite < 0).any()
    return bool(shown.size and some and shown.max() > 10 * shown.min())


def log_axis(axes: Iterable[Axes]) -> None:
    """Make axes of values logarithmic, once all is drawn; over few powers of ten there are ticks at twos and fives."""
    for ax in axes:
        ax.set_yscale("log", nonpositive="mask")
        low, high = ax.get_ylim()
        axis = ax.yaxis
        if high < 100 * low:
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=20))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            axis.set_major_locator(LogLocator(numticks=6))
        axis.set_minor_formatter(NullFormatter())


def step_axis(axes: Iterable[Axes]) -> None:
    """Put few, whole numbers on an axis of steps."""
    for ax in axes:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        ax.margins(x=0.01)
