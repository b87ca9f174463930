"""Does training converge to a point or to a distribution? A verdict for each slab, with its evidence.

The rule is written in `docs/analysis.md` and in `Rule`, whose values are the thresholds:

``point``         the moves shrink geometrically, by a factor of `settled` or more over the window, or have stopped
``distribution``  the moves neither shrink nor grow by a factor of `steady`, the window is worth `effective`
                  independent iterates, and over it nothing wanders off by `drift` standard deviations
``drifting``      the moves do not shrink, and it does wander off by more than `drift` standard deviations
``undecided``     none of these is sure

Each comparison is of the end of a 95% interval that speaks against it, so that a verdict is what the window shows and
not what it leaves possible. What is not sure is undecided; a longer window may decide it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from trajstore.analysis.longrun import effective_size, line_of, quantile, standard_error
from trajstore.analysis.rates import Rate, fit_rate
from trajstore.analysis.rounding import scale_of
from trajstore.analysis.spaces import Path, paths_of
from trajstore.analysis.windows import SLABS, resets_within

__all__ = ["RULE", "Evidence", "Rule", "Verdict", "convergence", "judge"]

Verdict = Literal["point", "distribution", "drifting", "undecided"]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rule:
    """The thresholds of the verdicts."""

    least: int = 40
    """Recorded steps in the window."""
    settled: float = 10.0
    steady: float = 2.0
    drift: float = 2.0
    effective: float = 20.0
    rest: float = 0.25
    """Of the window: so long nothing must have moved to count as stopped."""
    level: float = 0.95


RULE = Rule()
_CHANCE, _PAUSES = 0.0005, 8
"""A rest counts if it is less likely than that by chance, and so many times as long as any pause before."""


_COMPARED, _BLOCK, _SWEEPS = 8_192, 512, 3
"""So many iterates are all compared with each other for a diameter, so many with all others at a time."""


@dataclass(frozen=True)
class Evidence:
    """What a verdict rests on; NaN where there is nothing to say."""

    verdict: Verdict
    why: str
    diameter: float = np.nan
    """The largest distance between two iterates of the window. Of more than 8,192 it may be up to half as large; in the
    spaces ``layer:…`` and ``outputs`` it is that of at most 256 evenly chosen ones."""
    tail_diameter: float = np.nan
    """The same of its last quarter: a Cauchy sequence has ever smaller ones."""
    move: float = np.nan
    """The median distance of successive iterates in its last quarter."""
    rest_from: float = np.nan
    """The step from which nothing moves but by rounding."""
    rate: float = np.nan
    """The factor a step by which moves shrink, and its interval."""
    rate_low: float = np.nan
    rate_high: float = np.nan
    shrinks: float = np.nan
    """The factor by which moves shrink over the window, and its interval; below 1 they grow."""
    shrinks_low: float = np.nan
    shrinks_high: float = np.nan
    r2: float = np.nan
    """How much of the logarithm of the moves a geometric rate explains."""
    bend: float = np.nan
    """By how many standard errors the rate's logarithm differs between the halves of the window."""
    halves: float = np.nan
    """By how many standard errors the means of its two halves differ, along the direction in which it varies most: of
    what is stationary, two or less (Geweke)."""
    drift: float = np.nan
    """How far a fitted line goes over the window, in standard deviations about it, and its interval."""
    drift_low: float = np.nan
    drift_high: float = np.nan
    effective: float = np.nan
    """How many independent iterates the window is worth."""


def convergence(ds: xr.Dataset, metric: str = "parameters", window: int | None = None, rule: Rule = RULE) -> xr.Dataset:
    """Return a verdict with its evidence for each (order, seed).

    `metric` is the space to look in: a recorded metric, ``parameters``, or ``sum:METRIC`` (see `analysis.spaces`).
    `window` counts recorded steps at the end; without it, it is the last half.
    """
    seen, paths = paths_of(ds, metric, window, rule.least)
    judged = [[judge(path, seen.gap, rule) for path in row] for row in paths]
    columns = {
        field.name: (SLABS, np.array([[getattr(evidence, field.name) for evidence in row] for row in judged]))
        for field in fields(Evidence)
    }
    columns["resets"] = (SLABS, resets_within(ds, seen.steps))
    return xr.Dataset(columns, seen.coords, {**seen.attrs, "metric": metric, **asdict(rule)})


def judge(path: Path, per_step: int = 1, rule: Rule = RULE) -> Evidence:
    """Judge one path."""
    if not path.finite:
        return Evidence("undecided", "diverged within the window")
    scale = scale_of(np.append(path.points.ravel(), path.moves))
    if scale != 1:
        path = Path(path.steps, path.points / scale, path.moves / scale, path.rounding / scale)
    found: dict[str, Any] = {name: value * scale for name, value in _extent(path).items()}
    moving = np.flatnonzero(path.moves > path.rounding)
    last = int(moving[-1]) + 1 if len(moving) else 0
    resting = len(path.moves) - last
    if resting:
        found["rest_from"] = float(path.steps[last])
    if resting >= rule.rest * len(path.moves) and not _by_chance(moving, last, resting):
        since = f"nothing moves from step {path.steps[last]} on, but by rounding"
        return Evidence("point", since, **found, **_of(_rate(path, last, per_step, rule)))
    rate = _rate(path, last, per_step, rule)
    drift, error = _drift(path.points)
    reach = quantile(rule.level) * error
    found |= {"drift": drift, "drift_low": max(0.0, drift - reach), "drift_high": drift + reach}
    along = _principal(path.points)
    found |= {"effective": effective_size(along), "halves": _halves(along), **_of(rate)}
    return Evidence(*_verdict(found, rate, rule), **found)


def _by_chance(moving: NDArray[np.int64], last: int, resting: int) -> bool:
    """Tell whether what moved now and then before may just have paused: metrics of few values do."""
    if not len(moving):
        return False
    often = (len(moving) + 1) / (last + 1)
    pauses = np.diff(np.concatenate([[-1], moving]))
    return bool((1 - often) ** resting > _CHANCE or resting < _PAUSES * pauses.max())


def _verdict(found: dict[str, float], rate: Rate | None, rule: Rule) -> tuple[Verdict, str]:
    if rate is None:
        return "undecided", "it moves at too few steps for a rate"
    low, high = found["shrinks_low"], found["shrinks_high"]
    if low >= rule.settled:
        return "point", f"moves shrink {_factor(low)} times or more over the window"
    steady = 1 / rule.steady <= low and high <= rule.steady
    if steady and found["drift_high"] <= rule.drift and found["effective"] >= rule.effective:
        return "distribution", "moves stay as large as they are, and it does not wander off"
    if high <= rule.steady and found["drift_low"] > rule.drift:
        far = f"{found['drift_low']:.1f} standard deviations or more"
        return "drifting", f"it goes on by {far}, and moves do not shrink"
    return "undecided", "; ".join(_doubts(found, rule))


def _doubts(found: dict[str, float], rule: Rule) -> list[str]:
    """Say what each definite verdict lacks."""
    low, high = found["shrinks_low"], found["shrinks_high"]
    doubts = [f"moves shrink {_factor(low)} to {_factor(high)} times over the window"]
    if found["drift_low"] <= rule.drift < found["drift_high"]:
        doubts.append(f"it may wander off by {found['drift_low']:.1f} to {found['drift_high']:.1f} standard deviations")
    if found["effective"] < rule.effective:
        doubts.append(f"the window is worth {found['effective']:.0f} independent iterates of {rule.effective:.0f}")
    return [*doubts, "a longer window may decide it"]


def _factor(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def _rate(path: Path, last: int, per_step: int, rule: Rule) -> Rate | None:
    moves = np.where(path.moves > path.rounding, path.moves, 0.0)[:last]
    return fit_rate(moves, per_step, rule.level)


def _of(rate: Rate | None) -> dict[str, Any]:
    if rate is None:
        return {}
    shrinks = {
        "shrinks": float(np.exp(-rate.fall)),
        "shrinks_low": float(np.exp(-rate.fall_high)),
        "shrinks_high": float(np.exp(-rate.fall_low)),
    }
    return {
        "rate": rate.factor, "rate_low": rate.low, "rate_high": rate.high, "r2": rate.r2, "bend": rate.bend, **shrinks
    }  # fmt: skip


def _extent(path: Path) -> dict[str, Any]:
    tail = path.points[-max(2, len(path.points) // 4) :]
    move = float(np.median(path.moves[-max(1, len(path.moves) // 4) :]))
    of_tail = _diameter(tail)
    # Of more iterates than are all compared, those of the tail may be farther apart.
    return {"diameter": max(_diameter(path.points), of_tail), "tail_diameter": of_tail, "move": move}


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


def _drift(points: Floats) -> tuple[float, float]:
    """Return how far a fitted line goes, in standard deviations about it, and the standard error of that."""
    n = len(points)
    slope, errors, residual = line_of(points)
    spread = float((residual**2).sum() / (n - 2))
    if spread == 0:
        return (np.inf if slope.any() else 0.0), 0.0
    return (n - 1) * float(np.sqrt((slope**2).sum() / spread)), (n - 1) * float(np.sqrt((errors**2).sum() / spread))


def _principal(points: Floats) -> Floats:
    """Return them along the direction in which they vary most."""
    centred = points - points.mean(0)
    if points.shape[1] > 1:
        centred = centred @ np.linalg.svd(centred, full_matrices=False)[2][0][:, None]
    return np.asarray(centred[:, 0])


def _halves(along: Floats) -> float:
    """Return by how many standard errors the means of the halves differ."""
    halves = np.array_split(along, 2)
    error = float(np.hypot(*(standard_error(half - half.mean()) for half in halves)))
    return float((halves[1].mean() - halves[0].mean()) / error) if error else np.nan
