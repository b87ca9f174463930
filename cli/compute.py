"""`trajstore compute`."""

from __future__ import annotations

from typing import Annotated

import typer
from trajstore.cli.console import counted, progress_bar, say
from trajstore.cli.options import ExperimentName, StateMetricName, StorePath, Trust

__all__ = ["compute"]


def compute(
    metric: StateMetricName,
    store: StorePath,
    exp: ExperimentName,
    every: Annotated[int, typer.Option(help="At stored states whose step this divides.")] = 1,
    samples: Annotated[int, typer.Option(help="Fresh batches, or random directions, an estimate takes.")] = 32,
    threads: Annotated[int | None, typer.Option(help="By default one a core.")] = None,
    trust: Trust = False,
) -> None:
    """Compute a metric from stored states, and keep it beside those that were recorded."""
    from trajstore.analysis import compute as measured

    import trajstore as ts

    stored = ts.open(store, trust=trust)[exp]
    total = int(stored.commits().snapshots[..., [s % max(1, every) == 0 for s in stored.schema.snapshots]].sum())
    with progress_bar(total, metric, "states") as progress:
        done = measured(stored, metric, every, samples, threads, progress)
    say(f"{stored.name}: {metric} of {counted(done, 'state')} computed, {total - done} were there")
