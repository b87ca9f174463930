"""Figures: one a file, drawn by its `draw(ds, ...)`, in the project's own style.

`learning_curves.py` is ``trajstore plot STORE EXP learning-curves``; installed packages add theirs, each a function as
`draw`, by entry points of the group ``trajstore.figures``. What else
`draw` takes (`metric`, `window`, `seed`, `order`) are the figure's options, on the command line, too. `axes` are axes
to draw on instead of a figure of its own; they get no legend, but their lines have labels.

``fig2`` to ``fig19`` are the paper's, declared in `_paper.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from inspect import Parameter, signature
from typing import Any, Protocol, cast

import xarray as xr
from matplotlib.figure import Figure, SubFigure
from trajstore.analysis.figures._style import FURTHER_COLOURS, ORDER_COLOURS, order_colour, style

from trajstore._common.plugins import added, loaded
from trajstore.errors import ConfigurationError, NotFoundError, choices
from trajstore.store import StoredExperiment

__all__ = ["FURTHER_COLOURS", "ORDER_COLOURS", "draw", "figure_names", "order_colour", "style"]

FIGURES = (
    "contraction",
    "distance_matrix",
    "distances",
    "law",
    "learning_curves",
    "plane",
    "reset",
    "rolling_variance",
)
"""Modules that declare one; ``learning_curves`` is the figure ``learning-curves``."""
_GROUP = "trajstore.figures"
_ONE = (*(kind for one in (str, int) for kind in (one, one | None)), "str", "int", "str | None", "int | None")
"""Annotations of options that take one value, where the command line has a list."""

Drawable = xr.Dataset | StoredExperiment | Mapping[str, xr.Dataset | StoredExperiment]


class Drawing(Protocol):
    """What a figure's module declares as `draw`."""

    def __call__(self, of: Any, /, **options: Any) -> Figure | SubFigure:  # noqa: ANN401
        """Draw a dataset, or an experiment."""


def figure_names() -> list[str]:
    """Return the names of the figures, those of the paper last."""
    from trajstore.analysis.figures._paper import PAPER

    own = [module.replace("_", "-") for module in FIGURES]
    return [*sorted([*own, *added(_GROUP, {*own, *PAPER})]), *PAPER]


def draw(name: str, of: Drawable, **options: Any) -> Figure | SubFigure:  # noqa: ANN401  each its own
    """Draw a figure by its name; an option that is None, or an empty list, is not given.

    Most figures are of a dataset. What computes with the recorded operators takes the experiment, and what compares
    variants takes them by name, as `store.variants(name)` returns them.
    """
    drawing = _drawing(name)
    taken = signature(drawing).parameters
    if not isinstance(of, xr.Dataset | StoredExperiment):
        if "variants" not in taken:
            raise ConfigurationError(f"the figure {name!r} is of one experiment; choose a variant: {', '.join(of)}")
        variants = {variant: _dataset(each) for variant, each in of.items()}
        return drawing(variants, **_fitting(name, taken, options))
    if "variants" in taken:
        raise ConfigurationError(f"the figure {name!r} compares the variants of an experiment; this is one alone")
    if "stored" in taken and isinstance(of, xr.Dataset):
        raise ConfigurationError(f"the figure {name!r} computes with the experiment; give store[name] itself")
    return drawing(of if "stored" in taken else _dataset(of), **_fitting(name, taken, options))


def _drawing(name: str) -> Drawing:
    from trajstore.analysis.figures._paper import PAPER

    if name not in figure_names():
        raise NotFoundError(f"no figure {name!r}; {choices(name, figure_names())}")
    if name in PAPER:
        return cast(Drawing, PAPER[name])
    if (module := name.replace("-", "_")) in FIGURES:
        return cast(Drawing, import_module(f"{__name__}.{module}").draw)
    return cast(Drawing, loaded(added(_GROUP, FIGURES)[name]))


def _dataset(of: xr.Dataset | StoredExperiment) -> xr.Dataset:
    """Return the dataset, with labels as figures write them."""
    ds = of.dataset() if isinstance(of, StoredExperiment) else of
    if "order" not in ds.coords or not any("$" in str(label) for label in ds["order"].values.ravel()):
        return ds
    return ds.assign_coords(order=[_plain(str(label)) for label in ds["order"].values]) if ds["order"].ndim else ds


def _plain(label: str) -> str:
    """Return a label so that what is between two dollars is no formula."""
    return label.replace("$", r"\$")


def _fitting(name: str, taken: Mapping[str, Parameter], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given, as a figure takes them."""
    fitting = {}
    for option, value in options.items():
        if value is None or (isinstance(value, list) and not value):
            continue
        if option not in taken:
            known = ", ".join(parameter for parameter in taken if parameter not in ("ds", "stored", "variants", "axes"))
            raise ConfigurationError(f"the figure {name!r} takes no option {option!r}; it takes {known}")
        if option == "order":
            value = _plain(value) if isinstance(value, str) else [_plain(label) for label in value]
        several = isinstance(value, Sequence) and not isinstance(value, str)
        if several and taken[option].annotation in _ONE:
            if len(value) > 1:
                raise ConfigurationError(f"the figure {name!r} takes one {option}, and not {len(value)}")
            value = value[0]
        fitting[option] = value
    return fitting
