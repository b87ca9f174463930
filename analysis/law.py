"""Theorem 2.6: at each fixed n, forward and backward iterates have the same law over batch streams.

Two tests for each metric, or the sketch of the parameters, and each step. Both use the energy distance of the two
samples, one iterate a seed, which is zero for equal laws only.

swap
    The forward and the backward iterate of one seed share their batches and are strongly dependent (correlation 0.99
    at n = 5), so two-sample tests on them say nothing. But where operators are drawn independently from one law, the
    pair is exchangeable: whichever is called forward, its law is the same. Swapping within pairs at random therefore
    gives an exact p-value, for any statistic.
disjoint
    Forward iterates of one half of the seeds against backward iterates of the other half: independent samples, compared
    by permutation. It asks less of the theory, and sees less.

A law that was not rejected was not proven equal: `docs/analysis.md` says what difference these tests see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from trajstore.analysis.rounding import scale_of
from trajstore.analysis.spaces import PARAMETERS
from trajstore.analysis.tables import Table
from trajstore.analysis.windows import metrics_of, with_slabs

from trajstore.errors import ConfigurationError, NotFoundError, StatisticError, choices
from trajstore.reading.drawing import drawing_of
from trajstore.reading.origin import attributes_of
from trajstore.storage.format.metrics import OF_MORE_THAN_THE_ITERATE, maker_of
from trajstore.store import StoredExperiment

__all__ = ["adjusted", "disjoint_test", "law", "refuse_of_more", "swap_test", "tables"]

Floats = NDArray[np.float64]
_FEWEST = 99
"""Permutations: with fewer, p-values are too coarse."""
_LEAST = 10
"""Seeds: with fewer, no swap could be rare enough."""


def law(
    ds: xr.Dataset,
    metrics: str | Sequence[str] = (PARAMETERS,),
    steps: int | Sequence[int] | None = None,
    permutations: int = 1_999,
    random_seed: int = 0,
    level: float = 0.05,
) -> xr.Dataset:
    """Test whether forward and backward have the same law, for each metric and step: (metric, step).

    `metrics` are ``parameters`` or metrics that are functions of the iterate alone, and `steps` those at which laws are
    compared, by default the last. `permutations` are drawn for each test, by `random_seed`; `level` is what a corrected
    p-value must not be above to reject.

    The experiment must have one θ₀ (``init_seed``) and many data seeds. ``p_swap``
    and ``p_disjoint`` are for one test each; the ``_adjusted`` ones are corrected, by Holm's method, for all tests that
    are made here, and ``rejected`` is about those.
    """
    _refuse_dependent(ds)
    last = int(ds["step"].values[np.flatnonzero(ds["recorded"].any(("order", "seed")))][-1])
    chosen = [last] if steps is None else np.atleast_1d(np.asarray(steps, dtype=np.int64)).tolist()
    named, rng = [metrics] if isinstance(metrics, str) else list(metrics), np.random.default_rng(random_seed)
    if not chosen or not named or permutations < _FEWEST:
        raise ConfigurationError(f"a test needs a metric, a step, and {_FEWEST} permutations or more")
    for metric in named:
        refuse_of_more(metric)
    found = []
    for metric in named:
        pairs = [_pairs(ds, metric, step) for step in chosen]
        found.append([(swap_test(*p, permutations, rng), disjoint_test(*p, permutations, rng)) for p in pairs])
    p = np.array(found)
    corrected, columns = adjusted(p), {}
    for k, name in enumerate(("p_swap", "p_disjoint")):
        columns[name] = (("metric", "step"), p[..., k])
        columns[f"{name}_adjusted"] = (("metric", "step"), corrected[..., k])
    rejected = np.asarray((corrected <= level).any(-1))
    attrs = {"seeds": ds.sizes["seed"], "permutations": permutations, "random_seed": random_seed, "level": level}
    columns["rejected"] = (("metric", "step"), rejected)
    return xr.Dataset(columns, {"metric": named, "step": chosen}, attrs)


def refuse_of_more(metric: str) -> None:
    """Refuse a measure whose law is not that of the iterate: that may differ where Theorem 2.6 holds."""
    if metric in OF_MORE_THAN_THE_ITERATE:
        raise StatisticError(
            f"{metric} is no function of θ_n alone, and Theorem 2.6 is about those: {OF_MORE_THAN_THE_ITERATE[metric]}"
        )


def swap_test(forward: Floats, backward: Floats, permutations: int, rng: np.random.Generator) -> float:
    """Return the p-value of the energy distance under swaps within pairs; rows are seeds."""
    m = len(forward)
    both = np.concatenate([forward, backward])
    far = _distances(both)
    # With labels z = ±1, the energy distance is −zᵀDz / m², and a swap changes both signs of a pair.
    within = far[:m, :m] - far[:m, m:] - far[m:, :m] + far[m:, m:]
    signs = rng.choice([-1.0, 1.0], (permutations, m))
    return _p_value(-float(within.sum()), -np.einsum("ki,ki->k", signs @ within, signs))


def disjoint_test(forward: Floats, backward: Floats, permutations: int, rng: np.random.Generator) -> float:
    """Return the p-value of the energy distance of forward on even rows against backward on odd rows."""
    one, other = forward[0::2], backward[1::2]
    far = _distances(np.concatenate([one, other]))
    labels = np.concatenate([np.full(len(one), 1 / len(one)), np.full(len(other), -1 / len(other))])
    mixed = np.array([rng.permutation(labels) for _ in range(permutations)])
    return _p_value(-float(labels @ far @ labels), -np.einsum("ki,ki->k", mixed @ far, mixed))


def adjusted(p: Floats) -> Floats:
    """Return p-values corrected for their number by Holm's method.

    >>> adjusted(np.array([0.01, 0.04, 0.03])).tolist()
    [0.03, 0.06, 0.06]
    """
    flat = p.ravel()
    order = np.argsort(flat)
    steps = np.maximum.accumulate(flat[order] * (len(flat) - np.arange(len(flat))))
    out = np.empty_like(flat)
    out[order] = np.minimum(steps, 1.0)
    return np.asarray(out.reshape(p.shape))


def _p_value(seen: float, drawn: Floats) -> float:
    rounding = 1e-9 * max(abs(seen), float(np.abs(drawn).max()))
    return float((1 + (drawn >= seen - rounding).sum()) / (1 + len(drawn)))


def _distances(points: Floats) -> Floats:
    """Return all Euclidean distances, from sums of squared differences."""
    squares = np.zeros((len(points), len(points)))
    for column in points.T:
        squares += (column[:, None] - column) ** 2
    return np.sqrt(squares)


def _pairs(ds: xr.Dataset, metric: str, step: int) -> tuple[Floats, Floats]:
    """Return forward and backward at a step, (seed, coordinate)."""
    name = "sketch" if metric == PARAMETERS else metric
    if metric not in (known := [*metrics_of(ds), PARAMETERS]):
        raise NotFoundError(f"no metric {metric!r}; {choices(metric, known)}")
    if step not in ds["step"].values:
        raise NotFoundError(f"no step {step}; the last one is {int(ds['step'].values[-1])}")
    values = with_slabs(ds[name].sel(step=step))
    made = []
    for order in ("forward", "backward"):
        found = values.sel(order=order).values.astype(np.float64).reshape(ds.sizes["seed"], -1)
        bad = ~np.isfinite(found).all(axis=1)
        if bad.any():
            raise StatisticError(
                f"{metric}: order {order!r}, seed {ds['seed'].values[bad][0]} has no finite value at step {step}: it "
                "is not recorded, not measured, or training diverged; leave the seed out only if that does not bias "
                "the sample"
            )
        made.append(found)
    forward, backward = made
    scale = scale_of(np.append(forward, backward))
    return forward / scale, backward / scale


def _refuse_dependent(ds: xr.Dataset) -> None:
    """Refuse where Theorem 2.6 does not hold, or cannot be seen."""
    orders = [str(order) for order in np.atleast_1d(ds["order"].values)]
    if missing := [order for order in ("forward", "backward") if order not in orders]:
        raise StatisticError(f"the law compares 'forward' and 'backward'; there is no {missing[0]!r} here")
    seeds = ds.sizes.get("seed", 1)
    if seeds < _LEAST:
        raise StatisticError(f"{seeds} seeds are too few to compare laws; record {_LEAST} or, to see much, 100")
    if len(set(ds["init_seed"].values.tolist())) > 1:
        raise StatisticError(
            "the law is over batch streams from one θ₀, and these seeds start from several; record with one init seed"
        )
    attributes: Mapping[str, Any] = attributes_of(ds)
    config = attributes.get("config", {})
    operator = config.get("operator", {})
    if not config or maker_of(config) != "problem":
        raise StatisticError("how these iterates were made is not known, so the operators may not be independent")
    sampling = drawing_of(attributes).sampling
    if sampling is None:
        raise StatisticError(
            "how batches are drawn is not stored, so the operators may not be independent; if they are, have the "
            "problem say so in a field, sampling = 'iid', and record it again"
        )
    if sampling != "iid":
        raise StatisticError(
            f"batches are drawn by {sampling!r} and depend on each other, so the laws differ, except at whole epochs; "
            "record with sampling = 'iid'"
        )
    plain = operator.get("family") == "sgd" and operator.get("schedule", {}).get("family", "constant") == "constant"
    if operator.get("by") == "index" and not plain:
        raise StatisticError("the operators change with the batch index and have no one law; use by = 'position'")
    if "family" not in operator and operator.get("by") != "position":
        raise StatisticError(
            "whether the operators change with the batch index is not stored; if they do not, have the operator say so "
            "in a field, by = 'position', and record it again"
        )


def tables(stored: StoredExperiment, metrics: Sequence[str] = (PARAMETERS,), steps: Sequence[int] = ()) -> list[Table]:
    """Return what `trajstore analyze` shows."""
    found = law(stored.dataset(), metrics, steps or None)
    shown = ("p_swap", "p_disjoint", "p_swap_adjusted", "p_disjoint_adjusted", "rejected")
    seeds, drawn = found.attrs["seeds"], found.attrs["permutations"]
    title = f"equal law of forward and backward: {seeds} seeds, p-values from {drawn} permutations"
    return [Table(title, found, shown)]
