"""Does training converge to a point or to a distribution? A verdict for each slab, with its evidence.

The rule is written in `docs/analysis.md` and in `Rule`, whose values are the thresholds:

``point``         the moves shrink geometrically, by a factor of `settled` or more over the window; or have stopped,
                  after shrinking or abruptly
``distribution``  over the window and half as much before it, the moves neither shrink nor grow by a factor of `steady`
                  and nothing wanders or swings as far as can be told; the window is worth `effective` independent
                  iterates, over it nothing wanders off, surely not by `drift` standard deviations and as far as can
                  be told not at all, and it does not go round in a cycle
``drifting``      the moves do not shrink, it does wander off by more than `drift` standard deviations, and goes on and
                  on: that way before the window too, more evenly than a random walk does, and without slowing down by
                  a third
``undecided``     none of these is sure

Each comparison is of the end of an interval that speaks against it, of 95% or, where a random walk might get there by
chance, of 99%: a verdict is what the window shows and not what it leaves possible. What is not sure is undecided; a
longer window may decide it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from trajstore.analysis.cycles import lines_of, return_of
from trajstore.analysis.extent import extent_of
from trajstore.analysis.longrun import effective_size, line_of, quantile, slowness, standard_error
from trajstore.analysis.rates import LEAST, Rate, fit_rate
from trajstore.analysis.rounding import scale_of
from trajstore.analysis.spaces import Path, paths_of
from trajstore.analysis.tables import Table, window_told
from trajstore.analysis.windows import SLABS, resets_within

from trajstore.store import StoredExperiment

__all__ = ["RULE", "Evidence", "Rule", "Verdict", "convergence", "judge", "tables"]

Verdict = Literal["point", "distribution", "drifting", "undecided"]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rule:
    """The thresholds of the verdicts."""

    least: int = 40
    """Recorded steps in the window."""
    settled: float = 10.0
    """By so much do the moves of a point shrink over the window."""
    steady: float = 1.5
    """By less do those of a distribution change over the last three quarters of a run, of which the window is the last
    half. Noise that falls or grows as n^⅓ changes by 1.59 over these, as 1/√n by 2."""
    alone: float = 1.2
    """By less over the window, where no steps before it are known. Noise as n^⅓ changes by 1.26 over half a run."""
    drift: float = 2.0
    """Standard deviations that a fitted line goes over the window: more is drift."""
    effective: float = 20.0
    """Independent iterates that a window with a distribution is worth."""
    rest: float = 0.25
    """Of the window: so long nothing must have moved to count as stopped."""
    level: float = 0.95
    """The level of the other intervals."""
    surely: float = 0.99
    """The level of the intervals for `point` and `drifting`, which a random walk must not reach by chance."""
    slowing: float = 0.65
    """The second half of the window must go so many times as far as the first: what settles slows down, 1/√n by 0.6."""
    onward: float = 0.28
    """What drifts went that way before the window too, over half as many steps by this share of how far it goes in it
    at the least: steady drift by half, one that grows as n² by 0.29, and a wave as long as the run goes back."""
    line: float = 30.0
    """A frequency is a line if it is so many times as strong as those beside it."""
    share: float = 0.1
    """Of the variance: so much in lines makes a cycle."""
    same: float = 0.8
    """It returns if its autocorrelation, once it was low, is so high again."""
    chance: float = 0.1
    """A distribution's slow waves must be as likely as that if it varies no more slowly than these steps show."""


RULE = Rule()
_CHANCE, _PAUSES = 0.0005, 8
"""A rest counts if it is less likely than that by chance, and so many times as long as any pause before."""
_ABRUPT, _FAR = 0.1, 30.0
"""The last moves stopped abruptly if they were so many times as large as usual, and as their rounding."""
_PARTS, _RETURNS = 12, 6
"""Parts of a window whose means tell whether it goes on; of fewer returns, lines do not tell the period."""


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
    steady_low: float = np.nan
    """The interval of the factor by which moves shrink over the window and half as much before it, if noise is about
    the rate and no random walk: that of what is stationary."""
    steady_high: float = np.nan
    changes: float = np.nan
    """By how many standard errors moves change within the window, of what is stationary about 1."""
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
    drift_errors: float = np.nan
    """The same in its standard errors: of what is stationary, below 3.4 in 99 of 100."""
    slow: float = np.nan
    """How likely the slowest waves are as strong as here, over the window and half as much before it, if they are no
    stronger than somewhat faster ones."""
    effective: float = np.nan
    """How many independent iterates the window is worth."""
    lines: float = np.nan
    """The share of the variance that is at single frequencies: near 1 for a cycle."""
    period: float = np.nan
    """Recorded steps from one return to the next; NaN where it does not go round."""
    returns: float = np.nan
    """The largest autocorrelation after it was low: near 1 for a cycle, also of few returns."""


def convergence(ds: xr.Dataset, metric: str = "parameters", window: int | None = None, rule: Rule = RULE) -> xr.Dataset:
    """Return a verdict with its evidence for each (order, seed).

    `metric` is the space to look in: a recorded metric, ``parameters``, ``layer:GLOB``, ``outputs`` or ``sum:METRIC``
    (see `analysis.spaces`). `window` counts recorded steps at the end; without it, it is the last half. `rule` has the
    thresholds, which stand in the attributes of the result.
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
    """Judge one path, whose successive iterates are `per_step` steps apart, by the thresholds of a rule."""
    if not path.finite:
        return Evidence("undecided", "diverged within the window")
    scale = scale_of(np.append(path.points.ravel(), path.moves))
    if scale != 1:
        path = path.scaled(1 / scale)
    found: dict[str, Any] = {name: value * scale for name, value in extent_of(path.points, path.moves).items()}
    moving = np.flatnonzero(path.moves > path.rounding)
    last = int(moving[-1]) + 1 if len(moving) else 0
    resting = len(path.moves) - last
    if resting:
        found["rest_from"] = float(path.steps[last])
    if resting >= rule.rest * len(path.moves) and not _by_chance(moving, last, resting):
        since = f"nothing moves from step {path.steps[last]} on, but by rounding"
        rate = _rate(path, last, per_step, rule.level)
        if _came_to_rest(path, last, rule):
            return Evidence("point", since, **found, **_of(rate))
        pause = "; by how it moved before, its moves may grow again: their logarithm may be a random walk"
        return Evidence("undecided", since + pause, **found, **_of(rate))
    rate = _rate(path, last, per_step, rule.level)
    points = _bounded(path.points)
    drift, error = _drift(points)
    reach = quantile(rule.level) * error
    found |= {"drift": drift, "drift_low": max(0.0, drift - reach), "drift_high": drift + reach}
    along, known = _principal(points), path.half_before
    found |= {"drift_errors": drift / error if error else np.inf if drift else 0.0}
    found["slow"] = slowness(_principal(_bounded(np.concatenate([known, path.points]) if len(known) else path.points)))
    lines, period = lines_of(points, rule.line) if len(points) >= rule.least else (0.0, np.nan)
    returns, after = return_of(along, rule.same)
    if lines < rule.share or after > len(along) / _RETURNS:
        period = after
    found |= {"effective": effective_size(along), "halves": _halves(along)}
    found |= {"lines": lines, "period": period, "returns": returns}
    found |= _of(rate)
    before = path.moves_half_before
    whole = fit_rate(np.append(before, _beyond(path)[:last]), per_step, rule.level)
    if rate is None or whole is None:
        return Evidence("undecided", "it moves at too few steps for a rate", **found)
    found |= {"steady_low": float(np.exp(-whole.noisy_high)), "steady_high": float(np.exp(-whole.noisy_low))}
    surely = found["shrinks_low"] >= rule.settled and _shrinks_surely(path, last, rule)
    goes_on = _goes_on(points, rule) and _went_on(points, known, rule)
    return Evidence(*_verdict(found, surely, goes_on, bool(len(before)), rule), **found)


def _shrinks_surely(path: Path, last: int, rule: Rule) -> bool:
    rate = _rate(path, last, 1, rule.surely)
    return rate is not None and float(np.exp(-rate.fall_high)) >= rule.settled


def _came_to_rest(path: Path, last: int, rule: Rule) -> bool:
    """Tell whether moves that have stopped did so abruptly, or after they shrank more than a driftless walk would."""
    moves, rounding = np.append(path.earlier, _beyond(path)[:last]), float(path.rounding[max(0, last - 1)])
    moving = np.flatnonzero(moves)
    if len(moving) < LEAST:
        return True
    latest, usual = (float(np.median(some)) for some in (moves[moving[-_PAUSES:]], moves[moving]))
    if latest > max(_ABRUPT * usual, _FAR * rounding):
        return True
    until = moves[: moving[-1] + 1]
    rate = fit_rate(np.where(until > 0, until, rounding), level=rule.surely)
    return rate is not None and rate.fall_high < 0


def _beyond(path: Path) -> Floats:
    return np.where(path.moves > path.rounding, path.moves, 0.0)


def _by_chance(moving: NDArray[np.int64], last: int, resting: int) -> bool:
    """Tell whether what moved now and then before may just have paused: metrics of few values do."""
    if not len(moving):
        return False
    often = (len(moving) + 1) / (last + 1)
    pauses = np.diff(np.concatenate([[-1], moving]))
    return bool((1 - often) ** resting > _CHANCE or resting < _PAUSES * pauses.max())


def _verdict(found: dict[str, float], surely: bool, goes_on: bool, before: bool, rule: Rule) -> tuple[Verdict, str]:
    """Return a verdict and why; `before` says whether steps before the window are known."""
    if surely:
        return "point", f"moves shrink {_factor(found['shrinks_low'])} times or more over the window"
    low, high, allowed = found["steady_low"], found["steady_high"], rule.steady if before else rule.alone
    steady = 1 / allowed <= low and high <= allowed and found["changes"] <= quantile(rule.level)
    against = _against(found, goes_on, before, rule)
    if steady and not against and not np.isfinite(found["period"]):
        return "distribution", "moves stay as large as they are, and it does not wander off"
    if high <= rule.steady and found["drift_low"] > rule.drift and goes_on:
        far = f"{found['drift_low']:.1f} standard deviations or more"
        return "drifting", f"it goes on by {far}, and moves do not shrink"
    if found["lines"] >= rule.share:
        against.append(f"it returns every {found['period']:.4g} recorded steps to where it was: a cycle")
    else:
        if np.isfinite(found["period"]):
            against.append(f"after {found['period']:.4g} recorded steps it returns to where it was, as a cycle does")
        against.append("a longer window may decide it")
    return "undecided", "; ".join([*([] if steady else _moving(found, before, rule)), *against])


def _moving(found: dict[str, float], before: bool, rule: Rule) -> list[str]:
    """Say how moves change, as it is compared with what a distribution and a point ask for."""
    as_noise, allowed = _change(found["steady_low"], found["steady_high"]), rule.steady if before else rule.alone
    over = "the window and half as much before it" if before else "the window"
    told = [f"moves {as_noise} over {over} if they vary as noise, and a distribution allows {allowed:.3g}"]
    if found["changes"] > quantile(rule.level):
        told.append(f"within the window they change by {found['changes']:.1f} standard errors")
    if found["shrinks_low"] > 1:
        surely = _change(found["shrinks_low"], found["shrinks_high"])
        asked = f"{rule.settled:.3g} at {rule.surely:.0%}"
        told.append(f"moves {surely} if they may also walk, and a point asks for {asked}")
    return told


def _change(low: float, high: float) -> str:
    if low >= 1:
        return f"shrink {_factor(low)} to {_factor(high)} times"
    if high <= 1:
        return f"grow {_factor(1 / high)} to {_factor(1 / low)} times"
    return f"grow up to {_factor(1 / low)} or shrink up to {_factor(high)} times"


def _against(found: dict[str, float], goes_on: bool, before: bool, rule: Rule) -> list[str]:
    """Say what speaks against a distribution, besides moves that change and a cycle."""
    doubts = []
    if found["drift_low"] <= rule.drift < found["drift_high"]:
        doubts.append(f"it may wander off by {found['drift_low']:.1f} to {found['drift_high']:.1f} standard deviations")
    elif found["drift_low"] > rule.drift and not goes_on:
        doubts.append("it wanders off, but slows down, or no more evenly than a random walk" if before else
                      "it wanders off, and no steps before the window tell whether it goes on")  # fmt: skip
    elif found["drift_low"] > rule.drift:
        doubts.append(f"it wanders off by {found['drift_low']:.1f} standard deviations or more")
    elif found["drift_errors"] > quantile(rule.surely):
        doubts.append(f"it wanders off by {found['drift']:.1f} standard deviations, which is little but no chance")
    if found["slow"] <= rule.chance:
        doubts.append("its slowest waves are too strong for what is stationary: it wanders or swings")
    if found["effective"] < rule.effective:
        doubts.append(f"the window is worth {found['effective']:.0f} independent iterates of {rule.effective:.0f}")
    return doubts


def _factor(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def _rate(path: Path, last: int, per_step: int, level: float) -> Rate | None:
    return fit_rate(_beyond(path)[:last], per_step, level)


def _of(rate: Rate | None) -> dict[str, Any]:
    if rate is None:
        return {}
    shrinks = {
        "shrinks": float(np.exp(-rate.fall)),
        "shrinks_low": float(np.exp(-rate.fall_high)),
        "shrinks_high": float(np.exp(-rate.fall_low)),
        "changes": rate.changes,
    }
    return {
        "rate": rate.factor, "rate_low": rate.low, "rate_high": rate.high, "r2": rate.r2, "bend": rate.bend, **shrinks
    }  # fmt: skip


def _bounded(points: Floats) -> Floats:
    """Return them with those far off drawn in, as far as noise of a normal law would reach.

    One spike would make all else look still, independent and small.
    """
    off = points - np.median(points, axis=0)
    distances = np.sqrt((off**2).sum(1))
    reach = 3 / 1.645 * float(np.quantile(distances, 0.9))
    if reach == 0:
        return points
    return np.asarray(points - off + off * np.minimum(1.0, reach / np.maximum(distances, reach))[:, None])


def _goes_on(points: Floats, rule: Rule) -> bool:
    """Tell whether they go one way, more evenly than a random walk does by chance, and do not slow down.

    What is stationary, however slowly it varies, goes back and forth at least as much as a random walk.
    """
    means = np.array([part.mean(0) for part in np.array_split(points, _PARTS)])
    gone = np.diff(means, axis=0)
    there = means[-1] - means[0]
    if not there.any():
        return False
    along = gone @ (there / np.sqrt((there**2).sum()))
    half = len(along) // 2
    weights = np.full(len(along), (1 - rule.slowing) / 2)
    weights[:half], weights[-half:] = -rule.slowing, 1.0
    places = np.column_stack([np.ones(len(gone)), np.arange(len(gone)) - (len(gone) - 1) / 2])
    rest = gone - places @ np.linalg.lstsq(places, gone, rcond=None)[0]
    free = len(gone) - 2
    error = np.sqrt((rest**2).sum() / free * (weights @ weights))
    return bool(weights @ along > quantile(rule.surely, free) * error)


def _went_on(points: Floats, before: Floats, rule: Rule) -> bool:
    """Tell whether they went the same way before as well: what swings slowly comes back."""
    if not len(before):
        return False
    parts = [part.mean(0) for part in np.array_split(points, _PARTS)]
    there, from_here = parts[-1] - parts[0], parts[0] - np.array_split(before, _PARTS // 2)[0].mean(0)
    return bool(there @ from_here > rule.onward * (there @ there))


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


def tables(stored: StoredExperiment, metric: str = "parameters", window: int | None = None) -> list[Table]:
    """Return what `trajstore analyze` shows."""
    found = convergence(stored.dataset(), metric, window)
    pairs = {name: (f"{name}_low", f"{name}_high") for name in ("rate", "shrinks", "drift")}
    shown = ("verdict", "rate", "shrinks", "drift", "effective", "diameter", "tail_diameter", "move")
    return [Table(f"point or distribution: {window_told(found)}", found, shown, pairs)]
