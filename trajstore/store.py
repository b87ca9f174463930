"""A store and its experiments, as a reader sees them.

>>> store = open("runs.zarr")                  # doctest: +SKIP
>>> store["fig4"].dataset()                    # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import zarr

from trajstore._common.offers import offered
from trajstore.errors import FormatError
from trajstore.reading.handles import ExperimentHandle, StoreHandle

if TYPE_CHECKING:
    import duckdb
    import pandas as pd
    import xarray as xr

__all__ = ["Store", "StoredExperiment", "open"]


def open(path: str | Path, *, trust: bool = False) -> Store:
    """Open a store for reading: a folder, or the URL of one in an object store.

    With `trust`, whatever its experiments name (a problem of somebody's own as ``module:function``, a folder of images)
    may be called and read in this process where something is to be computed with them. What was recorded here may be
    in any case.
    """
    return Store.opened(path, trust=trust)


class Store(StoreHandle):
    """The experiments at a path or URL."""

    def __getitem__(self, name: str) -> StoredExperiment:
        return cast(StoredExperiment, super().__getitem__(name))

    def experiments(self) -> Iterator[tuple[str, StoredExperiment | FormatError]]:
        """Yield the experiments by name, each read once; of a damaged one, what is wrong with it."""
        return cast("Iterator[tuple[str, StoredExperiment | FormatError]]", super().experiments())

    def variants(self, name: str) -> dict[str, StoredExperiment]:
        """Return the experiments that are variants of this name, by their own names in it, or the one of this name."""
        return cast("dict[str, StoredExperiment]", super().variants(name))

    def _experiment(self, group: zarr.Group) -> StoredExperiment:
        return StoredExperiment(self, group)

    def __repr__(self) -> str:
        from trajstore.reading.display import store_text

        return store_text(self)

    def _repr_html_(self) -> str:
        from trajstore.reading.display import store_html

        return store_html(self)

    def datatree(self) -> xr.DataTree:
        """Return a lazy tree with a dataset an experiment."""
        from trajstore.reading.dataset import datatree

        return datatree(self)

    def copy(self, target: str | Path, names: Sequence[str] | None = None) -> Store:
        """Copy experiments, all by default, to another path or URL, also while they are recorded; return the copy.

        What is committed as the turn of a slab comes is copied, read back and compared. Into an earlier copy goes what
        it lacks; what both have must be the same.
        """
        copied = Store(target)
        offered("merge")(self, copied, names)
        return copied

    def sql(self, query: str, **tables: pd.DataFrame) -> duckdb.DuckDBPyRelation:
        """Ask the tables `experiments`, `runs`, `metrics` and `segments` with one SELECT statement.

        Data frames can be asked too, by the names that they are given by: ``sql("... claims ...", claims=frame)``.
        """
        from trajstore.reading.sql import query_store

        return query_store(self, query, tables)


class StoredExperiment(ExperimentHandle):
    """One experiment of a store."""

    store: Store

    def __init__(self, store: Store, group: zarr.Group) -> None:
        super().__init__(store, group)

    def dataset(self) -> xr.Dataset:
        """Return a lazy dataset of what is committed."""
        from trajstore.reading.dataset import dataset

        return dataset(self)

    def __repr__(self) -> str:
        from trajstore.reading.display import experiment_text

        return experiment_text(self)

    def _repr_html_(self) -> str:
        from trajstore.reading.display import experiment_html

        return experiment_html(self)
