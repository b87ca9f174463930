"""Figures: one a file, drawn by its `draw(ds, ...)`, in the project's own style.

The file name is the figure's name: `learning_curves.py` is ``trajstore plot STORE EXP learning-curves``.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, resources
from typing import Protocol

import matplotlib as mpl
import xarray as xr
from matplotlib.figure import Figure

from trajstore.errors import NotFoundError, choices

__all__ = ["ORDER_COLOURS", "draw", "figure_names", "order_colour", "style"]

# Okabe and Ito's colours, told apart with every kind of colour vision.
ORDER_COLOURS = {"forward": "#D55E00", "backward": "#0072B2"}
_FURTHER = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


class Drawing(Protocol):
    """What a figure's module declares as `draw`."""

    def __call__(self, ds: xr.Dataset) -> Figure:
        """Draw a dataset."""


def figure_names() -> list[str]:
    """Return the names of the figures."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__))


def draw(name: str, ds: xr.Dataset) -> Figure:
    """Draw a figure by its name."""
    if name not in figure_names():
        raise NotFoundError(f"no figure {name!r}; {choices(name, figure_names())}")
    drawing: Drawing = import_module(f"{__name__}.{name.replace('-', '_')}").draw
    return drawing(ds)


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
