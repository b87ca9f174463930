"""How far apart iterates are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["extent_of"]

_COMPARED, _BLOCK, _SWEEPS = 8_192, 512, 3
"""So many iterates are all compared with each other for a diameter, so many with all others at a time."""

Floats = NDArray[np.float64]


def extent_of(points: Floats, moves: Floats) -> dict[str, float]:
    """Return how far apart iterates are: all of them, the last quarter, and successive ones there in the median.

    `points` are a row each, and `moves` their successive distances.
    """
    of_tail = _diameter(points[-max(2, len(points) // 4) :])
    move = float(np.median(moves[-max(1, len(moves) // 4) :]))
    # Of more iterates than are all compared, those of the tail may be farther apart.
    return {"diameter": max(_diameter(points), of_tail), "tail_diameter": of_tail, "move": move}


def _diameter(points: Floats) -> float:
    """Return the largest distance between two of them: exactly, of up to `_COMPARED`, and at least half of it of more.

    Of more, those farthest from their mean are all compared, and three of the others with all there are.
    """
    if points.shape[1] == 1:
        return float(np.ptp(points))
    centred = points - points.mean(0)
    radii = np.sqrt((centred**2).sum(1))
    outward = np.argsort(-radii, kind="stable")[:_COMPARED]
    far, radii, largest, end = centred[outward], radii[outward], 0.0, centred[outward[0]]
    for _ in range(_SWEEPS):  # to the farthest, from there to the farthest, …
        away = ((centred - end) ** 2).sum(1)
        end, largest = centred[away.argmax()], max(largest, float(np.sqrt(away.max())))
    for begin in range(0, len(far), _BLOCK):
        # No two are farther apart than their radii together.
        rows, reach = far[begin : begin + _BLOCK], int((radii > largest - radii[begin]).sum())
        if reach <= begin:
            break
        columns = far[begin:reach]
        # From products, which round by the squares of the radii: the largest distance is no smaller than they are.
        squares = radii[begin : begin + _BLOCK, None] ** 2 + radii[begin:reach] ** 2 - 2 * rows @ columns.T
        i, j = np.unravel_index(int(squares.argmax()), squares.shape)
        largest = max(largest, float(np.sqrt(((rows[i] - columns[j]) ** 2).sum())))
    return largest
