"""The engine "trajstore" of xarray.

>>> xr.open_dataset("runs.zarr", engine="trajstore", group="fig4")    # doctest: +SKIP
>>> xr.open_datatree("runs.zarr", engine="trajstore", chunks={})      # doctest: +SKIP

As with every engine, data are read when they are asked for, and with `chunks={}` they are dask arrays whose blocks are
those of the store. `trust` is that of `trajstore.open`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import xarray as xr
from xarray.backends import BackendEntrypoint

from trajstore.errors import ConfigurationError, OpenFilesError, TrajstoreError, choices
from trajstore.reading.dataset import opened
from trajstore.reading.handles import StoreHandle

__all__ = ["TrajstoreBackend"]


class TrajstoreBackend(BackendEntrypoint):
    """Opens stores, an experiment a group."""

    open_dataset_parameters: ClassVar[tuple[str, ...]] = ("filename_or_obj", "drop_variables", "group", "trust")
    description: ClassVar[str] = "trajectory stores of training dynamics"
    supports_groups: ClassVar[bool] = True

    def guess_can_open(self, filename_or_obj: Any) -> bool:  # noqa: ANN401
        """Tell whether there is a store of ours, and not just any Zarr."""
        if not isinstance(filename_or_obj, str | os.PathLike):
            return False
        try:
            return StoreHandle.opened(_path(filename_or_obj)) is not None
        except OpenFilesError:
            raise  # nothing is known of what is there
        except (TrajstoreError, OSError):
            return False

    def open_dataset(
        self,
        filename_or_obj: Any,  # noqa: ANN401
        *,
        drop_variables: str | Iterable[str] | None = None,
        group: str | None = None,
        trust: bool = False,
    ) -> xr.Dataset:
        """Open one experiment, which need not be named where it is the only one."""
        store = StoreHandle.opened(_path(filename_or_obj), trust=trust)
        names = list(store)
        if group is None and len(names) != 1:
            raise ConfigurationError(f"{store}: say which experiment with group=…; {choices('', names)}")
        return _without(opened(store[(names[0] if group is None else group).strip("/")]), drop_variables)

    def open_groups_as_dict(
        self,
        filename_or_obj: Any,  # noqa: ANN401
        *,
        drop_variables: str | Iterable[str] | None = None,
        group: str | None = None,
        trust: bool = False,
    ) -> dict[str, xr.Dataset]:
        """Open all experiments, or one, by their paths in the tree."""
        store: StoreHandle = StoreHandle.opened(_path(filename_or_obj), trust=trust)
        names = list(store) if group is None else [group.strip("/")]
        return {"/": xr.Dataset()} | {f"/{name}": _without(opened(store[name]), drop_variables) for name in names}

    def open_datatree(
        self,
        filename_or_obj: Any,  # noqa: ANN401
        *,
        drop_variables: str | Iterable[str] | None = None,
        group: str | None = None,
        trust: bool = False,
    ) -> xr.DataTree:
        """Open a store as a tree: a node an experiment."""
        groups = self.open_groups_as_dict(filename_or_obj, drop_variables=drop_variables, group=group, trust=trust)
        tree: xr.DataTree = xr.DataTree.from_dict(groups)
        return tree


def _path(given: str | os.PathLike[str]) -> str | Path:
    return given if isinstance(given, str) else Path(given)


def _without(ds: xr.Dataset, dropped: str | Iterable[str] | None) -> xr.Dataset:
    return ds.drop_vars([] if dropped is None else dropped, errors="ignore")
