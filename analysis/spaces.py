"""Spaces: in what sense two iterates are near each other. "Converges to a point" depends on it.

======================  =====================================================================================
``test_loss``           any recorded metric; the distance is the difference of its values
``parameters``          all parameters: distances of successive iterates are exact, others come from the sketch
``layer:0.weight``      the parameters whose names match a glob, from the stored states: all distances are exact
``sum:train_loss``      L(x) + L(y), the pseudo-metric of the paper's Appendix G: only a loss of 0 is a point
``outputs``             what the model says of a few examples (`analysis.outputs`), from the stored states
======================  =====================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from trajstore.analysis.rounding import Precision, of_moves, of_zero
from trajstore.analysis.windows import OUTPUTS, SLABS, Window, metrics_of, stored_window, window_of, with_slabs

from trajstore.errors import NotFoundError, StatisticError, choices
from trajstore.reading.origin import attributes_of

__all__ = ["LAYER", "PARAMETERS", "SUM", "Path", "embedded", "path_of", "paths_of"]

PARAMETERS, LAYER, SUM = "parameters", "layer:", "sum:"
_EMBEDDED, _NOTHING = 256, 1e-12
"""So many iterates have all their distances taken; a coordinate with less of the variance is rounding."""


Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Path:
    """Where one slab goes in a space, over consecutive recorded steps."""

    steps: NDArray[np.int64]
    points: Floats
    """(place, coordinate): at each step, or evenly at some of them."""
    moves: Floats
    """Distances of successive iterates, one fewer."""
    rounding: Floats
    """Below what each move is rounding."""
    earlier: Floats = field(default_factory=lambda: np.zeros(0))
    """The moves before the window, 0 where they are rounding; none if they are not known."""
    before: Floats = field(default_factory=lambda: np.zeros((0, 1)))
    """The places before the window, as dense as those in it; none if they are not known."""

    @property
    def half_before(self) -> Floats:
        """The places before the window, half as many as there are in it; none if so many are not known."""
        count = len(self.points) // 2
        known = self.before[len(self.before) - count :] if len(self.before) >= count else self.before[:0]
        return known if np.isfinite(known).all() else known[:0]

    @property
    def moves_half_before(self) -> Floats:
        """The moves before the window, half as many as there are in it; none if so many are not known."""
        count = len(self.moves) // 2
        known = self.earlier[len(self.earlier) - count :] if len(self.earlier) >= count else self.earlier[:0]
        return known if np.isfinite(known).all() and len(self.half_before) else known[:0]

    def scaled(self, by: float) -> Path:
        """Return the path in units that are so many times as small."""
        return replace(
            self, points=by * self.points, moves=by * self.moves, rounding=by * self.rounding,
            earlier=by * self.earlier, before=by * self.before,
        )  # fmt: skip

    @property
    def finite(self) -> bool:
        """Whether training did not diverge in this window."""
        return bool(np.isfinite(self.points).all() and np.isfinite(self.moves).all())


def paths_of(ds: xr.Dataset, space: str, window: int | None, least: int) -> tuple[Window, list[list[Path]]]:
    """Return the window and, for each order and seed, the path through a space.

    `space` is one of those above, `window` how many recorded steps at the end it is looked at in, by default the last
    half, and `least` how many it takes at the least.
    """
    if space == PARAMETERS:
        return _of_parameters(ds, window, least)
    if space.startswith(LAYER):
        return _of_layer(ds, space, window, least)
    metric = space.removeprefix(SUM)
    if space == OUTPUTS and OUTPUTS not in metrics_of(ds):
        return _of_outputs(ds, window, least)
    if metric not in metrics_of(ds):
        raise NotFoundError(f"no metric {space!r}; {choices(metric, [*metrics_of(ds), PARAMETERS, OUTPUTS])}")
    seen = window_of(ds, metric, window, least)
    together = space.startswith(SUM)
    before = _before(ds, metric, seen)
    return seen, [
        [path_of(seen.steps, seen.values[i, k], seen.precision, together, before[i, k]) for k in range(before.shape[1])]
        for i in range(before.shape[0])
    ]


def _before(ds: xr.Dataset, metric: str, seen: Window) -> Floats:
    """Return a metric before the window, (order, seed, step): all of it, or as much as half the window.

    Of no step where it was not measured as evenly.
    """
    asked: tuple[int | Literal["all"], ...] = ("all", len(seen) + len(seen) // 2)
    for window in asked:
        try:
            whole = window_of(ds, metric, window, len(seen))
        except StatisticError:
            continue
        if whole.gap == seen.gap:
            return whole.values[..., : -len(seen)]
    return seen.values[..., :0]


def _of_parameters(ds: xr.Dataset, window: int | None, least: int) -> tuple[Window, list[list[Path]]]:
    if "sketch" not in ds:
        raise StatisticError("this dataset has no sketches; select steps, orders and seeds of it, not variables")
    seen = window_of(ds, "step_distance", window, least, called=PARAMETERS)
    norms = window_of(ds, "param_norm", len(seen), least, called=PARAMETERS).values
    points = with_slabs(ds["sketch"].sel(step=seen.steps)).values.astype(np.float64)
    moves = seen.values[..., 1:]
    if seen.gap != _recorded_gap(ds):  # the distances that were recorded are those to iterates in between
        moves = np.sqrt((np.diff(points, axis=2) ** 2).sum(-1))
    precision = Precision(ds["params"].dtype if "params" in ds else np.dtype(np.float64))
    before, norms_before = _before(ds, "step_distance", seen), _before(ds, "param_norm", seen)
    # At the first step there is no distance to an iterate before.
    known = min(before.shape[-1], norms_before.shape[-1]) if seen.gap == _recorded_gap(ds) else 0
    before, norms_before = (values[..., values.shape[-1] - known :] for values in (before, norms_before))
    earlier = _beyond(before[..., 1:], of_moves(norms_before, precision))
    places = seen.steps[0] - seen.gap * np.arange(before.shape[-1], 0, -1)
    points_before = with_slabs(ds["sketch"].sel(step=places[len(places) - len(seen) // 2 :])).values.astype(np.float64)
    return seen, [
        [
            Path(
                seen.steps,
                points[i, k],
                moves[i, k],
                of_moves(norms[i, k], precision),
                earlier[i, k],
                points_before[i, k],
            )
            for k in range(points.shape[1])
        ]
        for i in range(points.shape[0])
    ]


def _beyond(moves: Floats, rounding: Floats) -> Floats:
    return np.where(moves > rounding, moves, 0.0)


def _recorded_gap(ds: xr.Dataset) -> int:
    record = attributes_of(ds).get("config", {}).get("record", {})
    return int(record.get("every") or 1)


def _of_layer(ds: xr.Dataset, space: str, window: int | None, least: int) -> tuple[Window, list[list[Path]]]:
    from trajstore.analysis.distance_matrix import DistanceMatrix
    from trajstore.analysis.streaming import stream

    from trajstore.reading.distances import Norm, Successive

    globs = space.removeprefix(LAYER)
    steps, before = _stored(ds, space, window, least)
    every = -(-len(steps) // _EMBEDDED)
    seen = ds.sel(snapshot=np.append(before, steps))
    moved = stream(seen, [Successive(), Norm()], layers=globs)
    some = seen.isel(snapshot=slice(len(before) % every, None, every))
    apart = with_slabs(stream(some, [DistanceMatrix()], layers=globs)["distance_matrix"]).values
    moves, norms = (with_slabs(moved[name]).values for name in (Successive.name, Norm.name))
    coords = {dim: np.atleast_1d(ds[dim].values) for dim in SLABS}
    precision = Precision(ds["params"].dtype)
    return Window(space, steps, moves[..., len(before) :], coords), [
        [
            _split(steps, embedded(apart[i, k]), moves[i, k, 1:], of_moves(norms[i, k], precision), every)
            for k in range(moves.shape[1])
        ]
        for i in range(moves.shape[0])
    ]


def _stored(ds: xr.Dataset, what: str, window: int | None, least: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the steps of a window with a stored state, and half as many before it, or none if these are not stored."""
    steps = stored_window(ds, what, window, least)
    try:
        whole = stored_window(ds, what, len(steps) + len(steps) // 2, least)
    except StatisticError:
        return steps, steps[:0]
    return steps, whole[: -len(steps)]


def _split(steps: NDArray[np.int64], points: Floats, moves: Floats, rounding: Floats, every: int) -> Path:
    """Return the path of a window from the places and moves of it and of what is before, of which places are fewer."""
    earlier = len(moves) + 1 - len(steps)
    before = earlier // every
    return Path(
        steps,
        points[before:],
        moves[earlier:],
        rounding[earlier:],
        _beyond(moves[:earlier], rounding[:earlier]),
        points[:before],
    )


def _of_outputs(ds: xr.Dataset, window: int | None, least: int) -> tuple[Window, list[list[Path]]]:
    from trajstore.analysis.probing import outputs_of_slabs

    steps, earlier = _stored(ds, OUTPUTS, window, least)
    every = -(-len(steps) // _EMBEDDED)
    coords = {dim: np.atleast_1d(ds[dim].values) for dim in SLABS}
    rows: list[list[Path]] = [[] for _ in coords["order"]]
    for (i, _), states in outputs_of_slabs(ds.sel(snapshot=np.append(earlier, steps))):
        points, moves, norms = [], [], []
        before: Floats | None = None
        for n, one in enumerate(states):
            assert one is not None  # the window is of stored states
            here = one.ravel() / np.sqrt(len(one))
            if before is not None:
                moves.append(float(np.linalg.norm(here - before)))
            if n % every == len(earlier) % every:
                points.append(here)
            norms.append(float(np.linalg.norm(here)))
            before = here
        rounding = of_moves(np.array(norms), Precision(ds["params"].dtype))
        rows[i].append(_split(steps, np.array(points), np.array(moves), rounding, every))
    return Window(OUTPUTS, steps, np.array([[path.moves for path in row] for row in rows]), coords), rows


def embedded(distances: Floats) -> Floats:
    """Return points that have these Euclidean distances, one a row, each coordinate less important than the one before.

    >>> embedded(np.array([[0.0, 3.0], [3.0, 0.0]])).round(9).tolist()
    [[1.5], [-1.5]]
    """
    if not np.isfinite(distances).all():
        return np.full((len(distances), 1), np.nan)
    squares = -0.5 * distances**2
    centred = squares - squares.mean(0) - squares.mean(1)[:, None] + squares.mean()
    weights, axes = np.linalg.eigh(centred)
    kept = [k for k in range(len(weights))[::-1] if weights[k] > _NOTHING * max(weights[-1], 0)] or [0]
    points = axes[:, kept] * np.sqrt(np.maximum(weights[kept], 0))
    return np.asarray(points * np.where(points[:1] < 0, -1.0, 1.0))


def path_of(
    steps: NDArray[np.int64],
    values: Floats,
    precision: Precision,
    together: bool = False,
    before: Floats | None = None,
) -> Path:
    """Return the path of a metric's `values` at some `steps`, after those `before`.

    `precision` says how they were computed, and `together` measures distances as L(x) + L(y).
    """
    known = values if before is None else np.append(before, values)
    with np.errstate(invalid="ignore"):  # told as diverged
        moves = known[1:] + known[:-1] if together else np.abs(np.diff(known))
        rounding = np.full(len(moves), 2 * of_zero(known, precision)) if together else of_moves(known, precision)
    earlier = len(known) - len(values)
    return Path(
        steps,
        values[:, None],
        moves[earlier:],
        rounding[earlier:],
        _beyond(moves[:earlier], rounding[:earlier]),
        known[:earlier, None],
    )
