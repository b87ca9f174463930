"""Several statistics of the parameters in one pass over them, here or on a cluster.

>>> from trajstore import analysis
>>> analysis.stream(ds, [analysis.Distance("last"), analysis.ParameterTailVariance(100)])   # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import xarray as xr

from trajstore.iterates import Layers
from trajstore.streaming import PerLayer, Statistic, streamed

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["stream"]


def stream(
    ds: xr.Dataset,
    statistics: Sequence[Statistic[Any] | PerLayer[Any]],
    *,
    layers: Layers = None,
    cluster: str | Client | None = None,
) -> xr.Dataset:
    """Compute statistics of the parameters of a dataset, or of a selection of it, in one pass.

    Parameters
    ----------
    ds
        An experiment's dataset; orders, seeds and snapshots may be selected.
    statistics
        What to compute: `Norm()`, `Distance("start")`, `Successive()`, `ParameterTailVariance(100)`, each also as
        `PerLayer(…)`, or declarations of your own (`trajstore.streaming.Statistic`).
    layers
        Names or globs of the parameters to take; by default all.
    cluster
        The address of a Dask scheduler, or a client, whose workers reach the store. By default threads do it here.

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
    if cluster is None:
        return lazy.compute(scheduler="threads")
    if isinstance(cluster, str):
        from trajstore.distributing import connected_to

        with connected_to(cluster) as client:
            return _on(client, lazy)
    return _on(cluster, lazy)


def _on(client: Client, lazy: xr.Dataset) -> xr.Dataset:
    found: xr.Dataset = client.compute(lazy, sync=True)  # type: ignore[no-untyped-call]
    return found
