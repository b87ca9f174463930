"""All distances between the iterates of a slab.

A statistic that streams like the others, but one that keeps what it compares: each task holds all selected iterates of
its range of parameters, as float64. Select the iterates first (`ds.isel(snapshot=slice(None, None, 10))`): a thousand
are half a gigabyte a thread, and the time grows with their square.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from trajstore.analysis.streaming import stream

from trajstore.reading.iterates import Layers, Slab
from trajstore.reading.streaming import Block, Need

if TYPE_CHECKING:
    from trajstore.recording.workers import Scheduler

__all__ = ["DistanceMatrix", "distance_matrix"]

_ROWS = 64
"""Iterates that are compared with each other one at a time: with their differences, they stay in the cache."""


def distance_matrix(
    ds: xr.Dataset,
    *,
    layers: Layers = None,
    scheduler: Scheduler | None = None,
    cluster: Scheduler | None = None,
) -> xr.DataArray:
    """Return the Euclidean distances between all stored iterates, (order, seed, snapshot, other).

    They are roots of float64 sums of squared differences; NaN where no iterate is stored. `layers` and `scheduler` are
    those of `stream`; `cluster` is the former name of `scheduler`, deprecated.
    """
    if cluster is not None:
        from trajstore.recording.workers.cluster import one_scheduler

        scheduler = one_scheduler(scheduler, cluster)
    return stream(ds, [DistanceMatrix()], layers=layers, scheduler=scheduler)["distance_matrix"]


@dataclass(frozen=True)
class DistanceMatrix:
    """‖θ_n − θ_m‖ for all stored n and m of a slab."""

    name = "distance_matrix"
    dims = ("snapshot", "other")

    @property
    def attrs(self) -> Mapping[str, Any]:
        """What the result says of itself."""
        return {"description": "Euclidean distances between iterates; NaN where none is stored"}

    def need(self, slab: Slab) -> Need:
        """All iterates that there are."""
        return Need(range(len(slab.steps)))

    def block(self, block: Block) -> tuple[NDArray[np.float64], ...]:
        """Keep them."""
        return (block.values.copy(),)

    def merge(
        self, earlier: tuple[NDArray[np.float64], ...], later: tuple[NDArray[np.float64], ...]
    ) -> tuple[NDArray[np.float64], ...]:
        """One after the other."""
        return earlier + later

    def close(self, part: tuple[NDArray[np.float64], ...]) -> NDArray[np.float64]:
        """Compare every one with every one before it."""
        iterates = np.concatenate(part)
        squares = np.zeros((len(iterates), len(iterates)))
        scratch = np.empty_like(iterates[:_ROWS])
        for first in range(0, len(iterates), _ROWS):
            rows = iterates[first : first + _ROWS]
            for other in range(first + len(rows) - 1):
                begin = max(0, other + 1 - first)
                gaps = np.subtract(rows[begin:], iterates[other], out=scratch[begin : len(rows)])
                squares[first + begin : first + len(rows), other] = np.vecdot(gaps, gaps)
        return squares + squares.T

    def finish(self, total: NDArray[np.float64], parameters: int) -> NDArray[np.float64]:
        """Take the root."""
        return np.sqrt(total)
