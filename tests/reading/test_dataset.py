"""The dataset is what a user of xarray expects, and `.traj` answers for what is selected."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

import trajstore as ts
from tests.conftest import SMALL_NET, record_half
from trajstore.errors import ConfigurationError, NotFoundError, StatisticError

SPARSE = {**SMALL_NET, "record": {"snapshot_every": 3}}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("dataset") / "runs.zarr"
    for name, table in {"net": SMALL_NET, "sparse": SPARSE}.items():
        ts.run(ts.Experiment.of({**table, "name": name}), path, engine="reference", durability="none")
    return ts.open(path)


def test_a_layer_has_its_own_shape_over_order_seed_and_snapshot(stored):
    ds, params = stored["net"].dataset(), stored["net"].dataset().params.values
    weight = ds.traj.layer("2.weight")
    assert weight.chunks is not None
    assert weight.dims == ("order", "seed", "2.weight_dim_0", "2.weight_dim_1", "snapshot")
    for i, k, s in np.ndindex(2, 2, 13):
        arrays = stored["net"].arrays(order=ds.order.item(i), seed=k, step=s)
        assert np.array_equal(weight[i, k, ..., s], arrays["2.weight"])
    assert ds.traj.layer("0.bias").sel(seed=1, order="forward").dims == ("0.bias_dim_0", "snapshot")
    one = ds.sel(seed=1, order="backward", snapshot=[3, 5]).traj.layer("2.weight")
    assert one.dims == ("2.weight_dim_0", "2.weight_dim_1", "snapshot")
    assert np.array_equal(one, weight[1, 1, ..., [3, 5]])
    assert np.array_equal(ds.traj.layer("0.weight").values.reshape(2, 2, 8, 13), params[:, :, :8])
    assert ds.traj.layer("position").dims == ("order", "seed", "snapshot")
    with pytest.raises(NotFoundError, match=r"no tensor '2\.wieght'; did you mean '2\.weight'\?"):
        ds.traj.layer("2.wieght")
    with pytest.raises(ConfigurationError, match="only a part of the 97 numbers"):
        ds.isel(param=slice(5)).traj.layer("0.weight")


def test_a_state_is_what_the_store_gives_and_needs_no_more_than_is_open(stored):
    ds = stored["sparse"].dataset()
    truth = stored["sparse"].state_dict(order="backward", seed=1, step=6)
    for found in (
        ds.traj.state_dict(order="backward", seed=1, step=6),
        ds.sel(seed=1).traj.state_dict(order="backward", step=6),
        ds.sel(order="backward", seed=1, snapshot=6).traj.state_dict(),
        ds.isel(order=[1], seed=[1]).traj.state_dict(step=6),
    ):
        assert list(found) == list(truth)
        assert all(torch.equal(found[name], truth[name]) for name in truth)
    with pytest.raises(NotFoundError, match=r"no state is stored for step 5; the nearest is step 6"):
        ds.traj.state_dict(order="backward", seed=1, step=5)
    with pytest.raises(NotFoundError, match=r"no order 'bakward' here; did you mean 'backward'\?"):
        ds.traj.state_dict(order="bakward", seed=1, step=6)
    with pytest.raises(ConfigurationError, match="say which seed: there are 2 here"):
        ds.traj.state_dict(order="backward", step=6)


@pytest.mark.parametrize("to", ["start", "last", "previous", 6])
def test_distances_are_those_of_numpy_lazily_and_after_a_selection(stored, to):
    ds = stored["sparse"].dataset()
    x = ds.params.values.astype(np.float64)
    if to == "previous":
        difference = np.diff(x, axis=-1, prepend=np.nan)
    else:
        difference = x - x[..., [{"start": 0, "last": -1, 6: 2}[to]]]
    truth = np.sqrt((difference**2).sum(2))
    found = ds.traj.distances(to)
    assert found.chunks is not None
    assert found.dims == ("order", "seed", "snapshot")
    np.testing.assert_allclose(found, truth, rtol=1e-12)
    np.testing.assert_allclose(ds.sel(seed=1).traj.distances(to), truth[:, 1], rtol=1e-12)
    one = ds.sel(seed=1, order="backward").traj.distances(to, "2.*", per_layer=True)
    weight, bias = ds.traj.layer("2.weight")[1, 1].values, ds.traj.layer("2.bias")[1, 1].values
    assert one.layer.values.tolist() == ["2.weight", "2.bias"]
    if to == "last":
        each = weight.reshape(64, -1).astype(float), bias.astype(float)
        expected = [np.sqrt(((part - part[:, -1:]) ** 2).sum(0)) for part in each]
        np.testing.assert_allclose(one, expected, rtol=1e-12)


def test_distances_to_what_is_not_there_are_refused(stored):
    ds = stored["sparse"].dataset()
    message = r"^experiment 'sparse', order 'forward', seed 0: step 5 is not among .* the nearest is step 6"
    with pytest.raises(StatisticError, match=message):
        ds.traj.distances(5)
    with pytest.raises(ConfigurationError, match="to is 'first'; choose 'start', 'previous', 'last', or a step"):
        ds.traj.distances("first")


@pytest.mark.parametrize("to", ["start", "last", "previous", 5])
def test_distances_of_sketches_are_at_every_step_and_say_how_wrong_they_are(stored, to):
    whole, sparse = stored["net"].dataset(), stored["sparse"].dataset()
    found = sparse.traj.sketch_distances(to)
    assert found.chunks is not None
    assert found.dims == ("order", "seed", "step")
    assert found.attrs["relative_error"] == 0  # 97 parameters are their own sketch
    truth = whole.traj.distances(to).values
    np.testing.assert_allclose(found, truth, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(sparse.sel(seed=1).traj.sketch_distances(to), truth[:, 1], rtol=1e-6, atol=1e-12)
    if to != "previous":
        assert len(sparse.sel(step=slice(4, None)).traj.sketch_distances(to).step) == 9


def test_sketches_of_many_parameters_are_as_wrong_as_they_say(tmp_path):
    wide = {**SMALL_NET, "problem": {"family": "regression", "width": 60, "depth": 2, "points": 21}, "seeds": [0, 1, 2]}
    table = {**wide, "record": {"sketch": 64}}
    ds = ts.run(ts.Experiment.of(table), tmp_path / "s.zarr", engine="reference", durability="none").dataset()
    found = ds.traj.sketch_distances("previous")
    error = found.attrs["relative_error"]
    assert error == pytest.approx(np.sqrt(1 / 128))
    ratios = found.isel(step=slice(1, None)).values / ds.traj.distances("previous").isel(snapshot=slice(1, None)).values
    assert abs(np.sqrt(np.mean((ratios - 1) ** 2)) / error - 1) < 0.35


def test_steps_that_are_not_committed_are_nowhere(tmp_path):
    record_half(ts.Experiment.of(SMALL_NET), tmp_path / "s.zarr")
    ds = ts.open(tmp_path / "s.zarr")["net"].dataset()
    assert 0 < int(ds.stored.sum()) < 52
    found = ds.traj.distances("last")
    assert np.array_equal(found.notnull(), ds.stored)
    assert np.array_equal(ds.traj.sketch_distances("last").notnull(), ds.recorded)
    with pytest.raises(StatisticError, match=r"^experiment 'net', order '\w+', seed \d: step 12 is not recorded"):
        ds.sel(seed=int(ds.seed[-1]) if bool(ds.recorded[:, -1].any()) else 0).traj.sketch_distances(12)
    gone = next(zip(*np.nonzero(~ds.stored.values), strict=True))
    with pytest.raises(NotFoundError, match=r"no state is stored for step"):
        ds.traj.state_dict(order=ds.order.item(gone[0]), seed=int(gone[1]), step=int(gone[2]))


def test_xarray_opens_an_experiment_and_a_tree_of_them(stored):
    path = str(stored)
    truth = stored["net"].dataset()
    with pytest.raises(ConfigurationError, match=r"say which experiment with group=…; there is net, sparse"):
        xr.open_dataset(path, engine="trajstore")
    with pytest.raises(NotFoundError, match=r"no experiment 'nett' in .*; did you mean 'net'\?"):
        xr.open_dataset(path, engine="trajstore", group="nett")
    plain = xr.open_dataset(path, engine="trajstore", group="net")
    assert plain.params.chunks is None
    assert not plain.params.variable._in_memory
    xr.testing.assert_identical(plain.load(), truth.load())
    guessed = xr.open_dataset(path, group="net", chunks={})
    assert guessed.params.chunks == stored["net"].dataset().params.chunks
    np.testing.assert_allclose(guessed.traj.distances("last"), truth.traj.distances("last"), rtol=1e-12)
    tree = xr.open_datatree(path, engine="trajstore", chunks={})
    assert list(tree.children) == ["net", "sparse"]
    own = stored.datatree()
    for name in own.children:
        xr.testing.assert_identical(tree[name].to_dataset().load(), own[name].to_dataset().load())
    assert list(xr.open_groups(path, engine="trajstore", group="net")) == ["/", "/net"]


def test_xarray_takes_other_zarr_groups_for_what_they_are(tmp_path):
    from trajstore.reading.xarray_engine import TrajstoreBackend

    xr.Dataset({"a": ("x", [1, 2])}).to_zarr(tmp_path / "other.zarr", consolidated=False)
    assert not TrajstoreBackend().guess_can_open(tmp_path / "other.zarr")
    assert not TrajstoreBackend().guess_can_open(tmp_path / "nothing.zarr")
    assert not TrajstoreBackend().guess_can_open(b"bytes")


def test_blocks_are_those_of_the_store(tmp_path, monkeypatch):
    monkeypatch.setattr("trajstore.recording.schema.segment_length", lambda layout: 4)
    stored = ts.run(ts.Experiment.of(SMALL_NET), tmp_path / "s.zarr", engine="reference", durability="none")
    ds = stored.dataset()
    assert ds.params.chunks == ((1, 1), (1, 1), (97,), (4, 4, 4, 1))
    x = ds.params.values.astype(np.float64)
    np.testing.assert_allclose(ds.traj.distances("previous")[..., 1:], np.sqrt((np.diff(x) ** 2).sum(2)), rtol=1e-12)
