"""Claims about learning curves, seed by seed: Section 4, Section 5, Appendix A and Figure 3."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import xarray as xr
from trajstore.analysis.convergence import convergence
from trajstore.analysis.examining.finding import FAILS, HOLDS, OPEN, Finding, Verdict, by_interval, number_of
from trajstore.analysis.local import local_variance_ratio
from trajstore.analysis.longrun import ENOUGH, effective_size, quantile, standard_error
from trajstore.analysis.resets import resets
from trajstore.analysis.variance import Kind, pairs_of
from trajstore.analysis.windows import own_metrics, window_of

from trajstore.engine.orders import Order
from trajstore.errors import StatisticError
from trajstore.store import StoredExperiment

__all__ = ["converges", "elsewhere", "forward_wanders", "less_variance", "lower_loss", "oscillates", "windows"]

_FORWARD, _BACKWARD = "forward", "backward"
_KINDS: Mapping[Kind, str] = {"tail": "variance about lines", "step": "variance from step to step"}
"""In blocks of the last half."""


def less_variance(stored: StoredExperiment) -> Iterator[Finding]:
    """Section 4: a backward curve varies less from step to step than the forward one of the same seed."""
    yield from _ratios(stored, [order for order in _others(stored) if not _is_windowed(order)])


def windows(stored: StoredExperiment) -> Iterator[Finding]:
    """Section 5: backward with a reset every w steps varies less than forward, at a cost that w caps."""
    yield from _ratios(stored, [order for order in _others(stored) if _is_windowed(order)])


def _ratios(stored: StoredExperiment, orders: list[str]) -> Iterator[Finding]:
    ds = stored.dataset()
    for order in orders:
        costs = {seed: _cost(ds, order, seed) for seed in stored.schema.seeds}
        for metric, kind in product(own_metrics(ds), _KINDS):
            statistic = f"{_KINDS[kind]}, forward over {order}"
            ask = partial(local_variance_ratio, metric=metric, kind=kind, orders=(_FORWARD, order))
            for seed, one in _each_seed(ds.sel(order=[_FORWARD, order]), ask):
                about = f"seed {seed}, {metric}"
                if isinstance(one, str):
                    yield Finding(OPEN, about, statistic, evidence=one)
                    continue
                ratio, why = number_of(one, "ratio", "low", "high"), str(one["why"].item())
                finding, bound = by_interval(1.0, about, statistic, ratio, why), str(one["bound"].item())
                told = f"{finding.evidence}, {f'a {bound} bound: {why}' if bound else ''}".removesuffix(", ")
                yield replace(finding, evidence=f"{told}; {costs[seed]}")


def _each_seed(ds: xr.Dataset, ask: Callable[[xr.Dataset], xr.Dataset]) -> Iterator[tuple[int, xr.Dataset | str]]:
    """Yield what there is to say of each seed, or why there is nothing; one that lacks steps takes no other along."""
    seeds = ds["seed"].values.tolist()
    try:
        found = ask(ds)
    except StatisticError as error:
        if len(seeds) == 1:
            yield seeds[0], str(error)
            return
        for seed in seeds:
            yield from _each_seed(ds.sel(seed=[seed]), ask)
    else:
        yield from ((seed, found.sel(seed=seed)) for seed in seeds)


def converges(stored: StoredExperiment) -> Iterator[Finding]:
    """Theorem 2.2 and Section 4: backward iterates converge to a point, in the space of parameters."""
    if _BACKWARD in stored.schema.orders:
        yield from _verdicts(stored, _BACKWARD, {"point": HOLDS, "distribution": FAILS})


def forward_wanders(stored: StoredExperiment) -> Iterator[Finding]:
    """Section 2: forward iterates converge to a distribution, and to no point."""
    if _FORWARD in stored.schema.orders:
        yield from _verdicts(stored, _FORWARD, {"distribution": HOLDS, "point": FAILS})


def _verdicts(stored: StoredExperiment, order: str, means: Mapping[str, Verdict]) -> Iterator[Finding]:
    for seed, found in _each_seed(stored.dataset().sel(order=[order]), convergence):
        statistic = "how much moves shrink over the last half"
        if isinstance(found, str):
            yield Finding(OPEN, f"{order}, seed {seed}", statistic, evidence=found)
            continue
        one = found.sel(order=order)
        verdict, why = str(one["verdict"].item()), str(one["why"].item())
        evidence = f"{verdict}{f': {why}' if why else ''}"
        yield Finding(
            means.get(verdict, OPEN), f"{order}, seed {seed}", statistic, *number_of(one, "shrinks"), evidence
        )


def lower_loss(stored: StoredExperiment) -> Iterator[Finding]:
    """Section 4: the backward curve converges faster, so that its loss over the last half of the steps is lower."""
    ds = stored.dataset()
    losses = [metric for metric in own_metrics(ds) if metric.endswith("loss")]
    for order in (order for order in _others(stored) if not _is_windowed(order)):
        for metric in losses:
            statistic, ask = f"mean of forward less {order}", partial(_gaps, metric=metric, order=order)
            for seed, one in _each_seed(ds.sel(order=[_FORWARD, order]), ask):
                about = f"seed {seed}, {metric}"
                if isinstance(one, str):
                    yield Finding(OPEN, about, statistic, evidence=one)
                    continue
                gap = one["gap"].values
                if not np.isfinite(gap).all():
                    yield Finding(OPEN, about, statistic, evidence="diverged")
                    continue
                mean, size = float(gap.mean()), effective_size(gap)
                reach = quantile(0.95) * float(standard_error(gap - mean)) if size >= ENOUGH else np.nan
                why = f"the window is worth {size:.0f} independent values, and an interval takes {ENOUGH}"
                yield by_interval(0.0, about, statistic, (mean, mean - reach, mean + reach), why)


def _gaps(ds: xr.Dataset, metric: str, order: str) -> xr.Dataset:
    """Return by how much forward is above an order over the last half."""
    seen = window_of(ds, metric, None, least=ENOUGH)
    gaps = np.array([one - other for one, other in pairs_of(seen, (_FORWARD, order))])
    return xr.Dataset({"gap": (("seed", "step"), gaps)}, {"seed": seen.coords["seed"]})


def elsewhere(stored: StoredExperiment) -> Iterator[Finding]:
    """Figure 3: after a reset backward settles again, elsewhere."""
    for one in _resets(stored):
        about = f"{one['order']}, seed {one['seed']}, reset at {one['step']}, {one['metric']}"
        difference = (one["difference"], one["difference_low"], one["difference_high"])
        verdict = HOLDS if one["settles"] == "elsewhere" else OPEN
        evidence = ": ".join(filter(None, [one["settles"], one["why"]]))
        yield Finding(verdict, about, "level after less level before", *difference, evidence)


def oscillates(stored: StoredExperiment) -> Iterator[Finding]:
    """Figure 3: forward goes to and fro between the levels before and after the reset."""
    for one in _resets(stored):
        if one["settles"] != "elsewhere" or not np.isfinite(one["forward_between"]):
            continue
        before, after = one["forward_crosses_before"], one["forward_crosses_after"]
        about = f"{one['order']}, seed {one['seed']}, reset at {one['step']}, {one['metric']}"
        told = f"of 100 recorded steps it crosses the level before in {before:.2g}, that after in {after:.2g}"
        verdict = HOLDS if before > 1 and after > 1 else FAILS
        yield Finding(verdict, about, "share of forward between the levels", one["forward_between"], evidence=told)


def _resets(stored: StoredExperiment) -> Iterator[dict[str, Any]]:
    orders = [order for order in stored.schema.orders if "+" in order and not _is_windowed(order)]
    # A switch from forward to backward is no reset of a backward order.
    again = [order for order in orders if sum(leg.kind == _BACKWARD for leg in Order.parse(order).legs) > 1]
    if not again:
        return
    ds = stored.dataset()
    whole = [order for order in stored.schema.orders if order not in orders and not _is_windowed(order)]
    asked = ds.sel(order=[*again, *whole])  # the orders that are not reset tell what would have been
    for metric in own_metrics(ds):
        found: xr.Dataset = resets(asked, metric)
        for k in range(found.sizes["reset"]):
            row = {str(name): found[name].values[k].item() for name in found.data_vars}
            if row["order"] in again:
                yield {**row, "metric": metric}


def _others(stored: StoredExperiment) -> list[str]:
    """Return the orders with a backward leg that can be compared with forward."""
    if _FORWARD not in stored.schema.orders:
        return []
    return [order for order in stored.schema.orders if _BACKWARD in order]


def _is_windowed(order: str) -> bool:
    return any(leg.window for leg in Order.parse(order).legs)


def _cost(ds: xr.Dataset, order: str, seed: int) -> str:
    """Say how many operator applications the recorded steps of a slab took, those of one forward run being 1."""
    slab, legs = ds.sel(order=order, seed=seed), Order.parse(order).legs
    there = slab["recorded"].values
    if not there.any():
        return "nothing is recorded yet"
    steps, starts = slab["step"].values[there], slab["leg"].values[there]
    kinds = [max((leg for leg in legs if leg.start <= start), key=lambda leg: leg.start).kind for start in starts]
    chains = np.where(np.array(kinds) == _BACKWARD, steps - starts, np.diff(steps, prepend=0))
    return f"{chains.sum() / steps[-1]:.3g} times the applications of forward"
