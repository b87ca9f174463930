"""Spaces: in what sense two iterates are near each other. "Converges to a point" depends on it.

======================  =====================================================================================
``test_loss``           any recorded metric; the distance is the difference of its values
``parameters``          all parameters: distances of successive iterates are exact, others come from the sketch
``sum:train_loss``      L(x) + L(y), the pseudo-metric of the paper's Appendix G: only a loss of 0 is a point
======================  =====================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from trajstore.analysis.windows import Window, metrics_of, window_of, with_slabs

from trajstore.errors import NotFoundError, choices

__all__ = ["PARAMETERS", "SUM", "Path", "paths_of"]

PARAMETERS, SUM = "parameters", "sum:"
_ROUNDING = 4.0
"""Moves below so many units in the last place are rounding, not training."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Path:
    """Where one slab goes in a space, over consecutive recorded steps."""

    steps: NDArray[np.int64]
    points: Floats
    """(step, coordinate)."""
    moves: Floats
    """Distances of successive iterates, one fewer."""
    rounding: float
    """Moves below this are rounding."""

    @property
    def finite(self) -> bool:
        """Whether training did not diverge in this window."""
        return bool(np.isfinite(self.points).all() and np.isfinite(self.moves).all())


def paths_of(ds: xr.Dataset, space: str, window: int | None, least: int) -> tuple[Window, list[list[Path]]]:
    """Return the window and, for each order and seed, the path through a space."""
    if space == PARAMETERS:
        seen = window_of(ds, "step_distance", window, least)
        norms = window_of(ds, "param_norm", len(seen), least).values
        points = with_slabs(ds["sketch"].sel(step=seen.steps)).values.astype(np.float64)
        return seen, [
            [
                Path(seen.steps, points[i, k], seen.values[i, k, 1:], _rounding(ds, norms[i, k]))
                for k in range(points.shape[1])
            ]
            for i in range(points.shape[0])
        ]
    metric = space.removeprefix(SUM)
    if metric not in metrics_of(ds):
        raise NotFoundError(f"no metric {space!r}; {choices(metric, [*metrics_of(ds), PARAMETERS])}")
    seen = window_of(ds, metric, window, least)
    together = space.startswith(SUM)
    return seen, [[_path(ds, seen.steps, values, together) for values in rows] for rows in seen.values]


def _path(ds: xr.Dataset, steps: NDArray[np.int64], values: Floats, together: bool) -> Path:
    with np.errstate(invalid="ignore"):  # told as diverged
        moves = values[1:] + values[:-1] if together else np.abs(np.diff(values))
    return Path(steps, values[:, None], moves, 0.0 if together else _rounding(ds, values))


def _rounding(ds: xr.Dataset, sizes: Floats) -> float:
    dtype = ds["params"].dtype if "params" in ds else np.dtype(np.float64)
    return _ROUNDING * float(np.finfo(dtype).eps) * float(np.abs(sizes).max())
