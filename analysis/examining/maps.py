"""Claims about the maps T_i and the products of them: Section 2, Section 3 and Appendix G."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from trajstore.analysis.contracting import contraction, known_factors, limit_bound, lyapunov
from trajstore.analysis.convergence import convergence
from trajstore.analysis.examining.finding import FAILS, HOLDS, OPEN, Finding, by_interval, number_of
from trajstore.analysis.rounding import of_size
from trajstore.analysis.seeds import DECIDES, FEWEST, over_seeds

from trajstore.operators.sgd import is_plain
from trajstore.problems.quadratic import Quadratic
from trajstore.replay.recipe import Recipe, experiment_of, why_not
from trajstore.store import StoredExperiment

__all__ = ["bound", "closed_form", "curvature", "jumps", "lemma", "loss_contracts", "loss_metric", "rate"]

Floats = NDArray[np.float64]
_PAIRS = 100
_PAIRS_A_SEED = 4
_FAR = 0.01
"""Of the largest distance: pairs nearer than that are left out."""
_FEW = 8
"""Stored states of a slab; with fewer, forward may be still by chance."""
_TURN = 2_000
"""Steps along which an exponent is looked for where it is not found along those that are recorded."""
_BACKWARD, _FORWARD = "backward", "forward"
_NOTHING = "nothing is recorded yet"


def bound(stored: StoredExperiment) -> Iterator[Finding]:
    """Theorem 2.2, where every map is known to contract: d(θ_n, θ*) ≤ C kⁿ at every recorded n."""
    factor = _factor(stored, "uniform_factor")
    if factor is None or _BACKWARD not in stored.schema.orders:
        return
    ds = stored.dataset()
    for seed in stored.schema.seeds:
        steps, states = _states(ds, _BACKWARD, seed)
        if not len(steps):
            yield Finding(OPEN, f"seed {seed}", "largest distance over C kⁿ", evidence=_NOTHING)
            continue
        allowed = limit_bound(ds, seed, steps)
        # The bound is above the distance to every later iterate, so that θ* need not be known.
        far = np.linalg.norm(states - states[-1], axis=1)
        # Each step rounds, and what it adds shrinks from then on by the factor.
        rounding = of_size(np.linalg.norm(states, axis=1).max(), stored.schema.layout.dtype) / (1 - factor)
        far = np.maximum(0, far - rounding)
        worst = float((far / np.maximum(allowed, np.finfo(float).tiny)).max())
        verdict = HOLDS if worst <= 1 else FAILS
        told = f"every map contracts by {factor:.4g}; the bound is looked at in {len(steps)} steps"
        yield Finding(verdict, f"seed {seed}", "largest distance over C kⁿ", worst, evidence=told)


def rate(stored: StoredExperiment) -> Iterator[Finding]:
    """Theorem 2.2: the rate of backward iterates that settle is that of the products."""
    if _BACKWARD not in stored.schema.orders or why_not(stored) is not None:
        return
    ds = stored.dataset().sel(order=[_BACKWARD])
    for seed in stored.schema.seeds:
        found = convergence(ds.sel(seed=[seed])).isel(order=0, seed=0)
        fitted, low, high = number_of(found, "rate")
        if found["verdict"].item() != "point" or not np.isfinite([low, high]).all():
            told = f"no rate can be fitted to the backward iterates, whose verdict is {found['verdict'].item()}"
            yield Finding(OPEN, f"seed {seed}", "rate of the distances of successive iterates", evidence=told)
            continue
        products = lyapunov(stored, seed)
        if np.isnan(products["exponent"].item()) and stored.schema.steps < _TURN:
            products = lyapunov(stored, seed, _TURN)  # differences may not have turned yet
        known = number_of(products, "rate")
        gap, reach = abs(fitted - known[0]), (high - low + known[2] - known[1]) / 2
        # Intervals so wide that they reach to 1 would agree with any rate.
        agree, telling = gap <= reach, max(high, known[2]) < 1
        verdict = HOLDS if agree and telling else FAILS if gap > 2 * reach else OPEN
        along = f"that of the products, followed along {products.attrs['steps']} steps,"
        told = f"{along} is {known[0]:.6g} [{known[1]:.6g}, {known[2]:.6g}]"
        if np.isnan(known[0]):
            told = f"{along} is not known: {products['why'].item()}"
        yield Finding(verdict, f"seed {seed}", "rate of the distances of successive iterates", fitted, low, high, told)


def jumps(stored: StoredExperiment) -> Iterator[Finding]:
    """Example 2.4: of two constant maps, forward jumps for ever and backward stays at the value of T_1."""
    if stored.config["problem"].get("family") != "two-constants" or not _both(stored) or not _plain(stored):
        return
    if float(stored.config["operator"]["lr"]) != 1:
        return  # only then are the maps constant
    recipe, ds, statistic = Recipe.of(stored), stored.dataset(), "share of stored steps at which forward jumps"
    for seed in stored.schema.seeds:
        forward, backward = (_states(ds, order, seed)[1][1:, 0] for order in (_FORWARD, _BACKWARD))
        if min(len(forward), len(backward)) < _FEW:
            yield Finding(OPEN, f"seed {seed}", statistic, evidence="too few states")
            continue
        share = float((np.diff(forward) != 0).mean())
        first = recipe.apply(recipe.start(seed), recipe.batches(seed)[1], 1).params["theta"]
        still = bool((backward == first.double().numpy()[0]).all())
        half = len(forward) // 2
        for_ever = bool((np.diff(forward[half:]) != 0).any())
        told = f"backward {'never leaves' if still else 'leaves'} the value of T_1"
        verdict = HOLDS if still and for_ever else FAILS
        yield Finding(verdict, f"seed {seed}", statistic, share, evidence=told)


def closed_form(stored: StoredExperiment) -> Iterator[Finding]:
    """Section 3: iterates on a quadratic are (1 − hH)ⁿθ₀ + Σ h (1 − hH)^age ε_i, with age n − i or i − 1."""
    if stored.config["problem"].get("family") != "quadratic" or not _plain(stored):
        return
    recipe, ds = Recipe.of(stored), stored.dataset()
    problem, h = recipe.experiment.problem, float(stored.config["operator"]["lr"])
    assert isinstance(problem, Quadratic)
    step = np.eye(len(problem.spectrum)) - h * problem.hessian
    for seed in stored.schema.seeds:
        batches, start = recipe.batches(seed), recipe.start(seed).params["theta"].double().numpy()
        noise = np.array([batches[i][0].double().numpy() for i in range(1, stored.schema.steps + 1)])
        for order in (o for o in (_FORWARD, _BACKWARD) if o in stored.schema.orders):
            expected = _closed(step, h, noise, start, order)
            steps, states = _states(ds, order, seed)
            if not len(steps):
                yield Finding(OPEN, f"{order}, seed {seed}", "largest relative error", evidence=_NOTHING)
                continue
            scale = max(1.0, float(np.abs(expected).max()))
            worst = float(np.abs(states - expected[steps]).max()) / scale
            allowed = _rounding(stored)
            told = f"{len(steps)} iterates; rounding is allowed to be {allowed:.0e}"
            verdict = HOLDS if worst <= allowed else FAILS
            yield Finding(verdict, f"{order}, seed {seed}", "largest relative error", worst, evidence=told)


def _closed(step: Floats, h: float, noise: Floats, start: Floats, order: str) -> Floats:
    """Return the iterates from their sums: of forward by adding to all earlier noise, of backward to the newest."""
    out, power, total = [start], np.eye(len(step)), np.zeros_like(start)
    for epsilon in noise:
        total = step @ total + h * epsilon if order == _FORWARD else total + h * power @ epsilon
        power = step @ power
        out.append(power @ start + total)
    return np.array(out)


def curvature(stored: StoredExperiment) -> Iterator[Finding]:
    """Example 2.1: on a quadratic the map contracts if and only if h < 2/λ_max."""
    problem = stored.config["problem"]
    if problem.get("family") != "quadratic" or not _plain(stored):
        return
    h, edge = float(stored.config["operator"]["lr"]), 2 / max(problem["spectrum"])
    found = _factors(stored)
    if not len(found):
        yield Finding(OPEN, "all seeds", "largest factor", evidence="no two stored iterates are far enough apart")
        return
    largest = float(found.max())
    told = f"h is {h:g}, 2/λ_max {edge:g}, of {len(found)} pairs"
    contracts = min(problem["spectrum"]) > 0 and h < edge
    agrees = (largest < 1) == contracts
    # A pair may differ along some eigenvectors only, and shrink where the map as a whole does not.
    yield Finding(
        HOLDS if agrees else FAILS if contracts else OPEN, "all seeds", "largest factor", largest, evidence=told
    )


def lemma(stored: StoredExperiment) -> Iterator[Finding]:
    """Lemma 2.5: no pair is contracted by less than √(1 − 2hm + h²M²)."""
    factor = _factor(stored, "lemma_factor")
    if factor is None:
        return
    found = _factors(stored)
    if not len(found):
        yield Finding(OPEN, "all seeds", "largest factor", evidence="no two stored iterates are far enough apart")
        return
    largest = float(found.max())
    verdict = HOLDS if largest <= factor * (1 + _rounding(stored)) else FAILS
    told = f"of {len(found)} pairs; the lemma's is {factor:.6g}"
    yield Finding(verdict, "all seeds", "largest factor", largest, evidence=told)


def loss_metric(stored: StoredExperiment) -> Iterator[Finding]:
    """Appendix G: mini-batches contract L(x) + L(y) in expectation."""
    if why_not(stored) is not None or "train_loss" not in stored.schema.metrics:
        return
    if stored.config["operator"].get("family") != "sgd":
        return
    order = _FORWARD if _FORWARD in stored.schema.orders else stored.schema.orders[0]
    seeds = len(stored.schema.seeds)
    found = contraction(stored, order, max(_PAIRS, _PAIRS_A_SEED * seeds))
    statistic, about = "mean of 1 − the factor of L(x) + L(y)", f"{found.sizes['pair']} pairs of {order} iterates"
    yield loss_contracts(found["loss_factor"].values, found["seed"].values, statistic, about)


def loss_contracts(factors: Floats, seeds: NDArray[np.int64], statistic: str = "", about: str = "") -> Finding:
    """Find whether factors are below 1 in the mean over seeds: pairs of one trajectory depend on each other."""
    finite = np.isfinite(factors)
    if finite.sum() < len(factors) // 2:
        return Finding(OPEN, about, statistic, evidence="of most pairs the loss is 0, or no number")
    drops = np.array([1 - factors[finite & (seeds == seed)].mean() for seed in np.unique(seeds[finite])])
    number = tuple(float(value) for value in over_seeds(drops, DECIDES))
    why = f"{len(drops)} seeds; pairs of one trajectory depend on each other, so an interval takes {FEWEST} seeds"
    one = by_interval(0.0, about, statistic, (number[0], number[1], number[2]), why)
    told = f"{one.evidence} ({DECIDES:.0%}, {len(drops)} seeds)" if len(drops) >= FEWEST else one.evidence
    return replace(one, evidence=f"{told}; near a minimum that batches do not share it cannot hold")


def _factors(stored: StoredExperiment) -> Floats:
    """Return the factors of pairs that are far apart, so that rounding is not seen in them."""
    found = contraction(stored, stored.schema.orders[0], _PAIRS)
    far = found["distance"] > _FAR * found["distance"].max()
    return np.asarray(found["factor"].values[far & np.isfinite(found["factor"])])


def _rounding(stored: StoredExperiment) -> float:
    return 1e3 * float(np.finfo(stored.schema.layout.dtype).eps)


def _factor(stored: StoredExperiment, name: str) -> float | None:
    """Return a factor that is known of the maps."""
    if why_not(stored) is not None:
        return None
    return known_factors(experiment_of(stored)).get(name)


def _plain(stored: StoredExperiment) -> bool:
    return why_not(stored) is None and is_plain(experiment_of(stored).operator)


def _both(stored: StoredExperiment) -> bool:
    return {_FORWARD, _BACKWARD} <= set(stored.schema.orders)


def _states(ds: xr.Dataset, order: str, seed: int) -> tuple[NDArray[np.int64], Floats]:
    """Return the steps of the stored states of a slab, and the states."""
    slab = ds.sel(order=order, seed=seed)
    there = slab["stored"].values
    states = slab["params"].transpose("snapshot", "param").values[there]
    return slab["snapshot"].values[there].astype(np.int64), np.asarray(states, dtype=np.float64)
