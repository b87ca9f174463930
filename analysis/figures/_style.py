"""How all figures look: the colours of the orders, and the style sheet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources

import matplotlib as mpl

__all__ = ["FURTHER_COLOURS", "ORDER_COLOURS", "order_colour", "style"]

# Okabe and Ito's colours, told apart with every kind of colour vision.
ORDER_COLOURS = {"forward": "#D55E00", "backward": "#0072B2"}
FURTHER_COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def order_colour(order: str, position: int) -> str:
    """Return the colour of an order; the plain two keep theirs in every figure."""
    return ORDER_COLOURS.get(order, FURTHER_COLOURS[position % len(FURTHER_COLOURS)])


@contextmanager
def style() -> Iterator[None]:
    """Draw in the project's style."""
    with (
        resources.as_file(resources.files("trajstore.analysis.figures") / "trajstore.mplstyle") as sheet,
        mpl.rc_context(fname=str(sheet)),
    ):
        yield
