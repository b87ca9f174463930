"""Statistics are the same wherever dask computes them; `make clustered` runs all tests of the analysis so."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
from distributed import Client, LocalCluster
from trajstore.analysis import Norm, distance_matrix, stream
from trajstore.analysis.figures import draw

import trajstore as ts
from tests.conftest import SMALL_NET
from trajstore import analysis
from trajstore.errors import ConfigurationError, UnreachableError
from trajstore.reading.handles import open_root
from trajstore.storage.places.opening import place_of


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> ts.StoredExperiment:
    table = {**SMALL_NET, "steps": 60, "orders": ["forward", "backward"]}
    return ts.run(ts.Experiment.of(table), tmp_path_factory.mktemp("clusters") / "runs.zarr", engine="reference")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(1, threads_per_worker=1, dashboard_address="127.0.0.1:0", memory_limit=0) as made:
        yield made


ASKED: dict[str, Callable[[ts.StoredExperiment], Any]] = {
    "selected": lambda stored: stored.dataset()["params"][..., 3].compute(),
    "variance": lambda stored: analysis.variance_ratio(stored.dataset(), "train_loss"),
    "convergence": lambda stored: analysis.convergence(stored.dataset(), "train_loss"),
    "parameters": lambda stored: analysis.convergence(stored.dataset()),
    "distances": lambda stored: stored.dataset().traj.distances("last").compute(),
    "averages": lambda stored: analysis.rolling_variance(stored.dataset(), "train_loss", 10).compute(),
}


@pytest.mark.parametrize("how", ["client", "processes"])
def test_what_is_computed_elsewhere_is_the_same(stored, cluster, how):
    expected = {name: ask(stored) for name, ask in ASKED.items()}
    if how == "client":
        with Client(cluster):  # which is then what computes everything
            found = {name: ask(stored) for name, ask in ASKED.items()}
    else:
        with dask.config.set(scheduler="processes", num_workers=1):
            found = {name: ASKED[name](stored) for name in ("selected", "distances")}
    for name, value in found.items():
        xr.testing.assert_identical(value, expected[name].assign_attrs(value.attrs))


def test_figures_and_claims_are_made_with_a_client(stored, cluster, trajstore):
    with Client(cluster):
        assert draw("learning-curves", stored).axes
        code, out, err = trajstore("claims", str(stored.store), "--claim", "less-variance")
    assert (code, err) == (0, "")
    assert "variance" in out


def test_a_cluster_is_given_as_a_client_a_cluster_or_an_address(stored, cluster, tmp_path):
    ds = stored.dataset()
    here = stream(ds, [Norm()])
    table = ts.Experiment.of({**SMALL_NET, "seeds": [0]})
    alone = ts.run(table, tmp_path / "here.zarr", engine="reference", workers=0).dataset()
    with Client(cluster, set_as_default=False) as client:
        for number, scheduler in enumerate((client, cluster, cluster.scheduler_address)):
            xr.testing.assert_identical(stream(ds, [Norm()], scheduler=scheduler), here)
            there = ts.run(table, tmp_path / f"{number}.zarr", engine="reference", scheduler=scheduler)
            np.testing.assert_array_equal(there.dataset()["params"], alone["params"])
        assert client.status == "running"  # what was lent is not closed
        some = ds.isel(snapshot=slice(3))
        xr.testing.assert_identical(distance_matrix(some, scheduler=client), distance_matrix(some))


def test_the_former_name_of_a_scheduler_is_understood_with_a_warning(stored, cluster):
    ds = stored.dataset().isel(snapshot=slice(3))
    for ask in (lambda **how: stream(ds, [Norm()], **how), lambda **how: distance_matrix(ds, **how)):
        with pytest.warns(DeprecationWarning, match="cluster= is now scheduler=") as told:
            xr.testing.assert_identical(ask(cluster=cluster), ask())
        assert told[0].filename == __file__
        with pytest.raises(ConfigurationError, match="give scheduler alone"):
            ask(cluster=cluster, scheduler=cluster)


@pytest.mark.parametrize("scheduler", [3, "", object()])
def test_what_is_no_scheduler_is_refused(stored, scheduler):
    with pytest.raises(ConfigurationError, match="give the address of a Dask scheduler"):
        stream(stored.dataset(), [Norm()], scheduler=scheduler)


def test_a_client_that_is_closed_is_refused(stored, cluster):
    with Client(cluster, set_as_default=False) as client:
        pass
    with pytest.raises(ConfigurationError, match="the client is closed"):
        stream(stored.dataset(), [Norm()], scheduler=client)


def test_what_was_handed_to_a_client_is_taken_back_when_the_recording_ends(cluster, tmp_path):
    """A client that goes on would go on computing: its locks are free, and another recording may have begun."""
    from tests.conftest import stop_after

    table = ts.Experiment.of({**SMALL_NET, "steps": 200})
    with Client(cluster, set_as_default=False) as client:
        with pytest.raises(KeyboardInterrupt):
            ts.run(table, tmp_path / "s.zarr", engine="reference", scheduler=client, progress=stop_after(1))
        there = ts.run(table, tmp_path / "s.zarr", engine="reference", scheduler=client, resume=True)
    assert there.commits().complete.all()


def test_datasets_stores_and_experiments_travel(stored):
    for thing in (stored.dataset(), stored, stored.store, stored.store.datatree()):
        pickle.loads(pickle.dumps(thing))
    xr.testing.assert_identical(pickle.loads(pickle.dumps(stored.dataset())).load(), stored.dataset().load())
    xr.testing.assert_identical(stored.dataset().copy(deep=True).load(), stored.dataset().load())


def test_a_writer_does_not_travel(tmp_path):
    keeper = place_of(tmp_path / "s.zarr").keeper(read_only=False)
    for thing in (keeper, open_root(tmp_path / "s.zarr")):
        with pytest.raises(ConfigurationError, match="open for writing in this process, and a copy of it would be"):
            pickle.dumps(thing)
    reader = pickle.loads(pickle.dumps(place_of(tmp_path / "s.zarr").keeper(read_only=True)))
    assert reader.read_only


def test_a_folder_that_is_not_seen_is_not_taken_for_missing_steps(stored, tmp_path):
    """Missing chunks read as NaN: a worker without the folder would answer with NaN, and nobody would notice."""
    packed = pickle.dumps(stored.dataset()["train_loss"])
    folder = Path(stored.store.place.address)
    folder.rename(tmp_path / "moved")
    try:
        with pytest.raises(UnreachableError, match=f"sees no store at {folder}"):
            pickle.loads(packed)
    finally:
        (tmp_path / "moved").rename(folder)
