"""Theorem 2.6: over batch streams from one θ₀, forward and backward iterates of the same step have the same law."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from trajstore.analysis.examining.finding import FAILS, HOLDS, OPEN, Finding
from trajstore.analysis.law import law
from trajstore.analysis.spaces import PARAMETERS
from trajstore.analysis.windows import own_metrics

from trajstore.storage.format.metrics import OF_MORE_THAN_THE_ITERATE
from trajstore.store import StoredExperiment

__all__ = ["same_law"]

_TELLING = 100
"""Seeds: with fewer, half a standard deviation would often be missed."""
_SOME = 10
"""Fewer are a few runs to look at, and no sample of a law."""


def same_law(stored: StoredExperiment) -> Iterator[Finding]:
    """Test the parameters and the experiment's own metrics at an early, a middle and the last step, together."""
    schema = stored.schema
    if (
        not {"forward", "backward"} <= set(schema.orders)
        or len(schema.seeds) < _SOME
        or len(set(schema.init_seeds)) > 1
    ):
        return
    ds = stored.dataset()
    recorded = ds["step"].values[ds["recorded"].values.all((0, 1))]
    recorded = recorded[recorded > 1]  # they are equal at 0 and 1
    if not len(recorded):
        yield Finding(OPEN, "", "", evidence="no step from 2 on is recorded of all orders and seeds")
        return
    steps = sorted({int(recorded[np.abs(recorded - at).argmin()]) for at in (5, recorded[-1] // 2, recorded[-1])})
    own = [metric for metric in own_metrics(ds) if metric not in OF_MORE_THAN_THE_ITERATE]
    found = law(ds, [PARAMETERS, *own], steps)
    seeds = len(schema.seeds)
    for metric in found["metric"].values.tolist():
        for step in steps:
            one = found.sel(metric=metric, step=step)
            told = ", ".join(f"{test} p = {float(one[f'p_{test}']):.3g}" for test in ("swap", "disjoint"))
            worst = min(float(one[f"p_{test}_adjusted"]) for test in ("swap", "disjoint"))
            verdict = FAILS if bool(one["rejected"]) else HOLDS if seeds >= _TELLING else OPEN
            said = "" if verdict != OPEN else f", but {seeds} seeds see little"
            evidence = f"{'rejected' if verdict == FAILS else 'not rejected'} with {seeds} seeds{said}; {told}"
            yield Finding(verdict, f"step {step}, {metric}", "smaller adjusted p-value", worst, evidence=evidence)
