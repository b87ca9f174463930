"""Record grids: which steps are computed. Step 0 and the last step always are.

Only these chains are computed, so a grid of every k-th step costs about a k-th of all.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

__all__ = ["coarse", "every", "exactly", "log_then_every", "planned", "tail"]


def exactly(wanted: Iterable[int], steps: int) -> tuple[int, ...]:
    """Return the wanted steps in order, with the first and the last."""
    return tuple(sorted({0, steps, *wanted}))


def every(k: int, steps: int) -> tuple[int, ...]:
    """Return 0, k, 2k, … and the last step."""
    return exactly(range(0, steps + 1, k), steps)


def log_then_every(until: int, k: int, steps: int, per_decade: int = 10) -> tuple[int, ...]:
    """Return steps evenly spaced in the logarithm up to `until`, then every k-th.

    >>> log_then_every(10, 20, 60, per_decade=3)
    (0, 1, 2, 5, 10, 20, 40, 60)
    """
    last = min(until, steps)
    points = {round(10 ** (j / per_decade)) for j in range(per_decade * len(str(last)) + 1)}
    return exactly({n for n in points if n <= last} | {n for n in range(0, steps + 1, k) if n > last}, steps)


def planned(
    steps: int, listed: Iterable[int] | None, log_until: int | None, k: int, stops: Iterable[int] = ()
) -> tuple[int, ...]:
    """Return the grid of an experiment: the steps that are listed, or else every k-th, and the ends of earlier runs."""
    if listed is not None:
        grid = exactly(listed, steps)
    else:
        grid = every(k, steps) if log_until is None else log_then_every(log_until, k, steps)
    return exactly({*grid, *stops}, steps) if stops else grid


def coarse(grid: Sequence[int], turns: Iterable[int], parts: int = 8) -> tuple[int, ...]:
    """Return where to begin to refine: evenly spaced steps of a grid, and those on both sides of every turn.

    >>> coarse(range(101), turns=[40], parts=4)
    (0, 25, 40, 41, 50, 75, 100)
    """
    even = {grid[round(k * (len(grid) - 1) / parts)] for k in range(parts + 1)}
    after = [bisect_right(grid, turn) for turn in turns]
    beside = {grid[k] for a in after for k in (a - 1, a) if 0 <= k < len(grid)}
    return tuple(sorted(even | beside))


def tail(grid: Sequence[int], begin: int, end: int, most: int) -> Sequence[int]:
    """Return the last steps of a grid that are after a step and not after another one, so many at most.

    >>> tail(range(0, 101, 10), begin=40, end=85, most=3)
    range(60, 90, 10)
    """
    last = bisect_right(grid, end)
    return grid[max(bisect_right(grid, begin), last - most) : last]
