"""Claims about what stands in for an order: brackets for backward legs (C.2), a regularizer for small batches (D.2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
import xarray as xr
from trajstore.analysis.comparing import compare
from trajstore.analysis.examining.finding import FAILS, HOLDS, OPEN, Finding, by_interval, number_of
from trajstore.analysis.seeds import DECIDES, FEWEST
from trajstore.analysis.windows import own_metrics

from trajstore.errors import StatisticError
from trajstore.store import StoredExperiment

__all__ = ["beats", "bracket_is_near", "stronger_is_better"]

_EARLY = 5
"""The step up to which nothing but the learning rate speaks against a bracket."""
_REGULARIZED, _GAIN = "order-regularized", "loss of the base less loss"


def bracket_is_near(stored: StoredExperiment) -> Iterator[Finding]:
    """Theorem C.2: for small n h the bracket's iterate is nearer to the backward one than the forward one is."""
    if not {"forward", "backward", "bracket"} <= set(stored.schema.orders):
        return
    ds = stored.dataset()
    for seed in stored.schema.seeds:
        sketch = ds["sketch"].sel(seed=seed).transpose("order", "step", "component")
        there = ds["recorded"].sel(seed=seed).values.all(0) & (ds["step"].values >= 2)  # they are equal until 1
        one, two, near = (sketch.sel(order=o).values[there].astype(float) for o in ("forward", "backward", "bracket"))
        steps, statistic = ds["step"].values[there], "nearer up to step"
        with np.errstate(over="ignore", invalid="ignore"):  # told as diverged
            of_bracket, of_forward = (np.linalg.norm(order - two, axis=1) for order in (near, one))
        known = np.isfinite(of_bracket) & np.isfinite(of_forward)
        if not len(steps) or not known[0]:
            told = "diverged" if len(steps) else "no step from 2 on is recorded of all three orders"
            yield Finding(OPEN, f"seed {seed}", statistic, evidence=told)
            continue
        if of_bracket[0] >= of_forward[0] and steps[0] > _EARLY:
            told = f"it is of small n h, and the first step that is recorded of all three orders is {steps[0]}"
            yield Finding(OPEN, f"seed {seed}", statistic, evidence=told)
            continue
        far = ~known | (of_bracket >= of_forward)
        until = float(steps[far.argmax() - 1] if far.any() else steps[-1]) if not far[0] else 0.0
        told = f"of the recorded steps {steps[0]} to {steps[-1]}, from the sketch"
        yield Finding(HOLDS if until else FAILS, f"seed {seed}", statistic, until, evidence=told)


def beats(variants: Mapping[str, StoredExperiment]) -> Iterator[Finding]:
    """D.2.1: the regularized large batch ends with a lower loss than the large and the small batch."""
    regularized = [name for name in variants if _strength(variants[name])]
    for base in variants if regularized else ():
        if base not in regularized:
            yield from _differences(variants, base, regularized)


def stronger_is_better(variants: Mapping[str, StoredExperiment]) -> Iterator[Finding]:
    """D.2.1: the larger λ, the lower the loss."""
    ranked = sorted(
        (name for name in variants if _strength(variants[name])), key=lambda name: _strength(variants[name])
    )
    for weaker, stronger in pairwise(ranked):
        yield from _differences(variants, weaker, [stronger])


def _differences(variants: Mapping[str, StoredExperiment], base: str, names: list[str]) -> Iterator[Finding]:
    datasets = {name: variants[name].dataset() for name in (base, *names)}
    for metric in own_metrics(datasets[base]):
        if not metric.endswith("loss"):
            continue
        try:
            found = compare(datasets, metric, base, DECIDES)
        except StatisticError as error:
            yield Finding(OPEN, f"{metric} against {base}", _GAIN, evidence=str(error))
            continue
        for name in names:
            one = found.sel(variant=name)
            mean, low, high = number_of(one, "mean", "low", "high")
            about = f"{name} against {base}, {metric}"
            seeds = f"{one.sizes['seed']} seeds"
            why = f"{seeds}, and an interval takes {FEWEST}" if np.isfinite(mean) else "diverged"
            gain = by_interval(0.0, about, _GAIN, (-mean, -high, -low), why)
            told = f"{gain.evidence} ({DECIDES:.0%}, {seeds})" if np.isfinite(low) else gain.evidence
            yield replace(gain, evidence=f"{told}, {_when(one)}") if np.isfinite(mean) else gain


def _when(found: xr.Dataset) -> str:
    """Say of which steps the mean difference is, and until when it had the other sign."""
    steps = f"over steps {found.attrs['from_step']:.12g} to {found.attrs['to_step']:.12g}"
    turned = float(found["turned"])
    return steps if np.isnan(turned) else f"{steps}; it had the other sign until step {turned:.12g}"


def _strength(stored: StoredExperiment) -> float:
    """Return λ / h², 0 of operators that are not regularized."""
    operator = stored.config["operator"]
    return float(operator["strength"]) if operator.get("family") == _REGULARIZED else 0.0
