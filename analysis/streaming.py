"""Several statistics of the parameters in one pass over them, here or on a cluster.

>>> from trajstore import analysis
>>> analysis.stream(ds, [analysis.Distance("last"), analysis.ParameterTailVariance(100)])   # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import xarray as xr

from trajstore.reading.iterates import Layers
from trajstore.reading.streaming import PerLayer, Statistic, streamed

if TYPE_CHECKING:
    from trajstore.recording.workers import Scheduler

__all__ = ["stream"]


def stream(
    ds: xr.Dataset,
    statistics: Sequence[Statistic[Any] | PerLayer[Any]],
    *,
    layers: Layers = None,
    scheduler: Scheduler | None = None,
    cluster: Scheduler | None = None,
) -> xr.Dataset:
    """Compute statistics of the parameters of a dataset, or of a selection of it, in one pass.

    Parameters
    ----------
    ds
        An experiment's dataset; orders, seeds and snapshots may be selected.
    statistics
        What to compute: `Norm()`, `Distance("start")`, `Successive()`, `ParameterTailVariance(100)`, each also as
        `PerLayer(…)`, or declarations of your own (`trajstore.reading.streaming.Statistic`).
    layers
        Names or globs of the parameters to take; by default all.
    scheduler
        The address of a Dask scheduler, a `distributed.Client`, or a cluster such as a `distributed.LocalCluster`;
        its workers have to reach the store. By default threads do it here.
    cluster
        Its former name, deprecated.

    Returns
    -------
    xr.Dataset
        One variable a statistic: (order, seed), with `layer` and `snapshot` where it has them.

    Raises
    ------
    StatisticError
        If a slab does not have what a statistic needs: nothing is computed then.
    """
    lazy = streamed(ds, statistics, layers)
    if scheduler is None and cluster is None:
        return lazy.compute(scheduler="threads")
    from trajstore.recording.workers.cluster import connected_to, one_scheduler

    with connected_to(one_scheduler(scheduler, cluster)) as client:
        found: xr.Dataset = client.compute(lazy, sync=True)  # type: ignore[no-untyped-call]
    return found
