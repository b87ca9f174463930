"""What a dataset says of where it comes from survives files of every format, and what asks it finds it again."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import trajstore as ts
from tests.conftest import SMALL_NET
from trajstore import analysis
from trajstore.errors import ConfigurationError
from trajstore.reading.origin import ORIGIN, attributes_of
from trajstore.replay.recipe import Recipe


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> ts.StoredExperiment:
    table = {**SMALL_NET, "steps": 120, "orders": ["forward", "backward", "backward/40"]}
    return ts.run(ts.Experiment.of(table), tmp_path_factory.mktemp("origin") / "runs.zarr", engine="reference")


def through_netcdf(ds: xr.Dataset, folder: Path) -> xr.Dataset:
    ds.to_netcdf(folder / "runs.nc")
    return xr.open_dataset(folder / "runs.nc")


def through_zarr(ds: xr.Dataset, folder: Path) -> xr.Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Zarr knows no strings of a fixed width, and says so
        ds.to_zarr(folder / "runs-again.zarr")
        return xr.open_zarr(folder / "runs-again.zarr")


def through_a_pickle(ds: xr.Dataset, folder: Path) -> xr.Dataset:
    return pickle.loads(pickle.dumps(ds))


@pytest.mark.parametrize("way", [through_netcdf, through_zarr, through_a_pickle])
def test_a_dataset_that_was_written_and_read_answers_as_before(stored, tmp_path, way):
    ds = stored.dataset()
    with way(ds, tmp_path) as back:
        xr.testing.assert_equal(back.load(), ds.load())
        assert attributes_of(back) == stored.attributes
        xr.testing.assert_equal(back.traj.distances("last").compute(), ds.traj.distances("last").compute())
        np.testing.assert_array_equal(back.traj.layer("0.weight"), ds.traj.layer("0.weight"))
        assert Recipe.of(back).experiment.config() == stored.config
        asked = {"metric": "train_loss", "window": 20}
        xr.testing.assert_equal(analysis.variance_ratio(back, **asked), analysis.variance_ratio(ds, **asked))


def test_attributes_are_short_texts(stored):
    ds = stored.dataset()
    assert list(ds.attrs) == [ORIGIN, "experiment"]
    folder = stored.store.place.address
    assert str(ds.attrs[ORIGIN]).startswith(f"net of {folder} (identity ")
    assert len(ds.attrs[ORIGIN]) < len(folder) + 50
    assert "schema" not in ds._repr_html_()
    assert ds.attrs[ORIGIN]["config"] == stored.config  # as it was asked when it was a table


def test_what_analyses_return_can_be_written_too(stored, tmp_path):
    ds = stored.dataset()
    for number, found in enumerate(
        (
            analysis.variance_ratio(ds, "train_loss", 20),
            analysis.convergence(ds, "train_loss"),
            analysis.resets(ds, "train_loss"),
            ds.traj.distances("start").to_dataset(name="distance"),
            ds.traj.sketch_distances("last").to_dataset(name="distance"),
        )
    ):
        found.to_netcdf(tmp_path / f"{number}.nc")
        with xr.open_dataset(tmp_path / f"{number}.nc") as back:
            xr.testing.assert_equal(back.load(), found.load())
            assert set(back.attrs) == set(found.attrs)


def test_a_grown_experiment_is_found_again_and_another_one_is_not_taken_for_it(tmp_path):
    small = {**SMALL_NET, "steps": 10, "seeds": [0]}
    ts.run(ts.Experiment.of(small), tmp_path / "s.zarr", engine="reference")
    back = through_netcdf(ts.open(tmp_path / "s.zarr")["net"].dataset(), tmp_path)
    ts.run(ts.Experiment.of({**small, "seeds": [1]}), tmp_path / "s.zarr", engine="reference", extend=True)
    assert attributes_of(back)["config"]["seeds"] == [0, 1]
    (tmp_path / "s.zarr").rename(tmp_path / "old.zarr")
    assert attributes_of(back) == {}
    other = {**small, "operator": {"family": "sgd", "lr": 0.1}}
    ts.run(ts.Experiment.of(other), tmp_path / "s.zarr", engine="reference")
    assert attributes_of(back) == {}
    with pytest.raises(ConfigurationError, match="the experiment is not any more where it was"):
        back.traj.distances()
    back.close()


@pytest.mark.parametrize("said", ["s3://somebody/else", "net of s3://a/b (identity 0123456789abcdef)", "net of x", 3])
def test_what_a_file_names_is_opened_only_where_it_is_a_folder_of_this_machine(said, monkeypatch):
    monkeypatch.setattr("trajstore.store.open", lambda path: pytest.fail(f"{path} was opened"))
    assert attributes_of(xr.Dataset(attrs={ORIGIN: said})) == {}


def test_a_table_as_earlier_releases_had_it_is_understood(stored):
    ds = stored.dataset().assign_attrs({ORIGIN: stored.attributes})
    assert attributes_of(ds) == stored.attributes
    xr.testing.assert_equal(ds.traj.distances().compute(), stored.dataset().traj.distances().compute())
