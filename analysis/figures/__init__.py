"""Figures: one a file, drawn by its `draw(ds, ...)`, in the project's own style.

The file name is the figure's name: `learning_curves.py` is ``trajstore plot STORE EXP learning-curves``. What else
`draw` takes (`metric`, `window`, `seed`, `order`) are the figure's options, on the command line, too. `axes` are axes
to draw on instead of a figure of its own; they get no legend, but their lines have labels.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module, resources
from inspect import Parameter, signature
from typing import Any, Protocol

import matplotlib as mpl
import xarray as xr
from matplotlib.figure import Figure, SubFigure

from trajstore.errors import ConfigurationError, NotFoundError, choices
from trajstore.store import StoredExperiment

__all__ = ["ORDER_COLOURS", "draw", "figure_names", "order_colour", "style"]

# Okabe and Ito's colours, told apart with every kind of colour vision.
ORDER_COLOURS = {"forward": "#D55E00", "backward": "#0072B2"}
_FURTHER = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


class Drawing(Protocol):
    """What a figure's module declares as `draw`."""

    def __call__(self, of: Any, /, **options: Any) -> Figure | SubFigure:  # noqa: ANN401
        """Draw a dataset, or an experiment."""


def figure_names() -> list[str]:
    """Return the names of the figures."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def draw(name: str, of: xr.Dataset | StoredExperiment, **options: Any) -> Figure | SubFigure:  # noqa: ANN401  each its own
    """Draw a figure of a dataset or an experiment by its name; an option that is None, or an empty list, is not given.

    Most figures are of a dataset. What computes with the recorded operators takes the experiment.
    """
    if name not in figure_names():
        raise NotFoundError(f"no figure {name!r}; {choices(name, figure_names())}")
    drawing: Drawing = import_module(f"{__name__}.{name.replace('-', '_')}").draw
    taken = signature(drawing).parameters
    if "ds" in taken and isinstance(of, StoredExperiment):
        of = of.dataset()
    if "stored" in taken and isinstance(of, xr.Dataset):
        raise ConfigurationError(f"the figure {name!r} computes with the experiment; give store[name] itself")
    return drawing(of, **_fitting(name, taken, options))


def _fitting(name: str, taken: Mapping[str, Parameter], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given, as a figure takes them."""
    fitting = {}
    for option, value in options.items():
        if value is None or (isinstance(value, list) and not value):
            continue
        if option not in taken:
            known = ", ".join(parameter for parameter in taken if parameter not in ("ds", "stored", "axes"))
            raise ConfigurationError(f"the figure {name!r} takes no option {option!r}; it takes {known}")
        several = isinstance(value, Sequence) and not isinstance(value, str)
        if several and taken[option].annotation in ("str", "str | None", "int | None"):
            if len(value) > 1:
                raise ConfigurationError(f"the figure {name!r} takes one {option}, and not {len(value)}")
            value = value[0]
        fitting[option] = value
    return fitting


def order_colour(order: str, position: int) -> str:
    """Return the colour of an order; the plain two keep theirs in every figure."""
    return ORDER_COLOURS.get(order, _FURTHER[position % len(_FURTHER)])


@contextmanager
def style() -> Iterator[None]:
    """Draw in the project's style."""
    with (
        resources.as_file(resources.files(__name__) / "trajstore.mplstyle") as sheet,
        mpl.rc_context(fname=str(sheet)),
    ):
        yield
