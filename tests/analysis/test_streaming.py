"""Statistics of the parameters in one pass are what NumPy finds with everything in memory, however it is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from trajstore.analysis import (
    Distance,
    Norm,
    ParameterLevelVariance,
    ParameterTailVariance,
    PerLayer,
    Successive,
    stream,
)

from tests.conftest import SMALL_NET
from trajstore import analysis
from trajstore.errors import ConfigurationError, NotFoundError, StatisticError
from trajstore.reading.streaming import Block, streamed
from trajstore.storage.format.layout import Entry, Layout

LAYERS = {"a.weight": (3, 4), "a.bias": (4,), "b.weight": (7, 3)}
SIZES = {name: int(np.prod(shape)) for name, shape in LAYERS.items()}
P = sum(SIZES.values())
WINDOW = 5
EVERYTHING = [
    Norm(),
    Distance("start"),
    Distance("last"),
    Distance(20),
    Successive(),
    ParameterLevelVariance(WINDOW),
    ParameterTailVariance(WINDOW),
]


def dataset(values: np.ndarray, stored: np.ndarray, chunks: Sequence[tuple[int, ...]] | None = None) -> xr.Dataset:
    """A dataset as an experiment gives it, of (order, seed, param, snapshot); one buffer comes after the parameters."""
    entries = [Entry(name, "parameter", shape, "float32") for name, shape in LAYERS.items()]
    layout = Layout.of([*entries, Entry("buffer", "buffer", (2,), "float32")], {"tied": "b.weight"})
    values = np.where(stored[:, :, None], values, np.nan)
    data = values if chunks is None else da.from_array(values, chunks=tuple(chunks))
    o, s, _, n = values.shape
    return xr.Dataset(
        {"params": (("order", "seed", "param", "snapshot"), data)},
        {
            "order": ["forward", "backward"][:o],
            "seed": np.arange(s) + 3,
            "snapshot": np.arange(n) * 10,
            "stored": (("order", "seed", "snapshot"), stored),
        },
        {"trajstore": {"schema": {"layout": layout.to_json()}}, "experiment": "made"},
    )


def iterates(n: int, shape: tuple[int, int] = (2, 2), seed: int = 0) -> np.ndarray:
    """Close to each other and far from zero, as late iterates are: norms and products would lose everything."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(*shape, P + 2, 1))
    return (base + np.cumsum(1e-4 * rng.normal(size=(*shape, P + 2, n)), axis=-1)).astype(np.float32)


def expected(values: np.ndarray, stored: np.ndarray, part: slice = slice(0, P)) -> dict[str, np.ndarray]:
    """The plain definitions, one slab at a time."""
    o, s, _, n = values.shape
    found = {name: np.full((o, s, n), np.nan) for name in
             ("norm", "distance_to_start", "distance_to_last", "distance_to_20", "distance_to_previous")}  # fmt: skip
    found |= {name: np.full((o, s), np.nan) for name in ("parameter_level_variance", "parameter_tail_variance")}
    for i, k in np.ndindex(o, s):
        at = np.flatnonzero(stored[i, k])
        x = values[i, k, part][:, at].astype(np.float64)
        t = at * 10.0
        found["norm"][i, k, at] = np.sqrt((x**2).sum(0))
        for name, column in (("start", 0), ("last", -1), ("20", list(at).index(2))):
            found[f"distance_to_{name}"][i, k, at] = np.sqrt(((x - x[:, [column]]) ** 2).sum(0))
        found["distance_to_previous"][i, k, at[1:]] = np.sqrt((np.diff(x, axis=1) ** 2).sum(0))
        w, u = x[:, -WINDOW:], t[-WINDOW:]
        found["parameter_level_variance"][i, k] = w.var(axis=1, ddof=1).mean()
        rest = [row - np.polynomial.Polynomial.fit(u, row, 1)(u) for row in w]
        found["parameter_tail_variance"][i, k] = (np.square(rest).sum(1) / (WINDOW - 2)).mean()
    return found


def agrees(found: xr.Dataset, truth: dict[str, np.ndarray]) -> None:
    for name, values in truth.items():
        np.testing.assert_allclose(found[name].values, values, rtol=1e-10, atol=0, err_msg=name)


def cuts(length: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Ways to cut a length into chunks."""
    inner = st.sets(st.integers(1, length - 1)) if length > 1 else st.just(set())
    return inner.map(lambda at: tuple(np.diff([0, *sorted(at), length]).tolist()))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(7, 23))
def test_streaming_is_what_numpy_finds_for_any_chunks(data, n):
    values, stored = iterates(n), np.ones((2, 2, n), dtype=bool)
    # Holes where every slab has them, as in adaptive grids; the start, step 20 and enough of a tail are there.
    holes = data.draw(st.sets(st.sampled_from([k for k in range(n) if k not in (0, 2)]), max_size=n - WINDOW - 2))
    stored[..., sorted(holes)] = False
    chunks = [data.draw(cuts(length)) for length in values.shape]
    agrees(stream(dataset(values, stored, chunks), EVERYTHING), expected(values, stored))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), statistic=st.sampled_from(EVERYTHING))
def test_merging_is_associative(data, statistic):
    n = 12
    x = iterates(n, (1, 1))[0, 0].T.astype(np.float64)
    steps = np.cumsum(data.draw(st.lists(st.integers(1, 50), min_size=n, max_size=n))).astype(np.float64)
    ends = np.cumsum(data.draw(cuts(n))).tolist()
    parts = [
        statistic.block(Block(steps[a:b], x[a:b], x[2].copy(), np.empty_like(x[a:b])))
        for a, b in zip([0, *ends], ends, strict=False)
    ]
    whole = statistic.block(Block(steps, x, x[2].copy(), np.empty_like(x)))
    while len(parts) > 1:
        at = data.draw(st.integers(0, len(parts) - 2))
        parts[at : at + 2] = [statistic.merge(parts[at], parts[at + 1])]
    np.testing.assert_allclose(statistic.close(parts[0]), statistic.close(whole), rtol=1e-10)


def test_a_line_is_taken_out_to_the_last_digit_though_it_is_a_million_times_larger():
    n, rng = 40, np.random.default_rng(1)
    noise = 1e-6 * rng.normal(size=(1, 1, P + 2, n))
    values = noise + np.arange(n) * 10.0
    ds = dataset(values, np.ones((1, 1, n), dtype=bool), [(1,), (1,), (10, P + 2 - 10), (3, 17, 20)])
    u = np.arange(n) - (n - 1) / 2
    rest = noise - noise.mean(-1, keepdims=True)
    rest = rest - (rest @ u / (u @ u))[..., None] * u
    truth = (rest[0, 0, :P] ** 2).sum(-1).mean() / (n - 2)
    found = stream(ds, [ParameterTailVariance(n)]).parameter_tail_variance.item()
    assert abs(found / truth - 1) < 1e-6  # what float64 holds of the values themselves: 400 · 2⁻⁵³ against 1e-6


def test_each_layer_by_itself_and_some_of_them():
    values, stored = iterates(9), np.ones((2, 2, 9), dtype=bool)
    ds = dataset(values, stored, [(1, 1), (1, 1), (20, 19), (4, 5)])
    each = stream(ds, [PerLayer(statistic) for statistic in EVERYTHING] + EVERYTHING)
    assert each.layer.values.tolist() == list(LAYERS)
    assert each["size"].values.tolist() == list(SIZES.values())
    begin = 0
    for layer, size in SIZES.items():
        truth = expected(values, stored, slice(begin, begin + size))
        agrees(each.sel(layer=layer), {f"{name}_per_layer": v for name, v in truth.items()})
        agrees(stream(ds, EVERYTHING, layers=layer), truth)
        begin += size
    agrees(each, expected(values, stored))
    truth = expected(np.delete(values, slice(12, 16), axis=2), stored, slice(0, P - 4))
    agrees(stream(ds, EVERYTHING, layers="*.weight"), truth)
    agrees(stream(ds, EVERYTHING, layers=["a.weight", "tied"]), truth)
    with pytest.raises(NotFoundError, match=r"no parameter 'a\.wieght'; did you mean 'a\.weight'\?"):
        stream(ds, EVERYTHING, layers="a.wieght")


def test_what_is_selected_is_what_counts():
    values, stored = iterates(12), np.ones((2, 2, 12), dtype=bool)
    ds = dataset(values, stored, [(1, 1), (1, 1), (20, 19), (5, 7)])
    whole = stream(ds, EVERYTHING)
    for part in ({"seed": 1}, {"order": 0, "seed": [1]}, {"order": [1, 0]}, {"order": 1, "seed": 0}):
        xr.testing.assert_allclose(stream(ds.isel(part), EVERYTHING), whole.isel(part), rtol=1e-13)
    some = [0, 2, 3, 5, 8, 9, 11]
    truth = expected(values[..., some], stored[..., some])
    found = stream(ds.isel(snapshot=some), [Distance("start"), Distance("last"), Successive()])
    for name in ("distance_to_start", "distance_to_last", "distance_to_previous"):
        np.testing.assert_allclose(found[name], truth[name], rtol=1e-12)
    assert stream(ds.isel(snapshot=4), [Norm()]).norm.dims == ("order", "seed")


def test_an_array_in_memory_streams_too():
    values, stored = iterates(9), np.ones((2, 2, 9), dtype=bool)
    agrees(stream(dataset(values, stored), EVERYTHING), expected(values, stored))


@pytest.mark.parametrize("n", [1, 2, 9, 150])
def test_a_matrix_has_the_distances_of_all_pairs(n):
    values, stored = iterates(n, (1, 2)), np.ones((1, 2, n), dtype=bool)
    stored[0, 1, n // 3 : n // 2] = False
    ds = dataset(values, stored, [(1,), (1, 1), (20, 19), tuple(np.diff([0, n // 3, n]))] if n > 2 else None)
    found = analysis.distance_matrix(ds, layers="*.weight")
    assert found.dims == ("order", "seed", "snapshot", "other")
    assert np.array_equal(found.other, ds.snapshot)
    x = np.where(stored[:, :, None], np.delete(values, slice(12, 16), axis=2)[:, :, : P - 4].astype(np.float64), np.nan)
    truth = np.sqrt(((x[..., None] - x[..., None, :]) ** 2).sum(2))
    np.testing.assert_allclose(found, truth, rtol=1e-10, atol=0)


def test_a_slab_of_which_nothing_is_stored_has_no_distances_and_no_variance():
    values, stored = iterates(9), np.ones((2, 2, 9), dtype=bool)
    stored[1, 0] = False
    ds = dataset(values, stored, [(1, 1), (1, 1), (39,), (4, 5)])
    found = stream(ds, [Norm(), Distance("last"), Distance(20), PerLayer(Successive())])
    assert bool(analysis.distance_matrix(ds).isel(order=1, seed=0).isnull().all())
    for variable in found.data_vars.values():
        assert bool(variable.isel(order=1, seed=0).isnull().all())
        assert bool(variable.isel(order=0, snapshot=slice(1, None)).notnull().all())
    message = r"^experiment 'made', order 'backward', seed 3: no iterate of step 40 is stored; finish the recording"
    with pytest.raises(StatisticError, match=message):
        stream(ds, [ParameterTailVariance(WINDOW)])
    assert stream(ds.sel(seed=4), [ParameterTailVariance(WINDOW)]).parameter_tail_variance.notnull().all()


def test_what_a_slab_cannot_stand_for_is_one_line():
    values, stored = iterates(9), np.ones((2, 2, 9), dtype=bool)
    stored[0, 1, 4:] = False
    ds = dataset(values, stored, [(1, 1), (1, 1), (39,), (4, 5)])
    with pytest.raises(StatisticError, match=r"seed 4: no iterate of step 40 is stored"):
        stream(ds, [ParameterLevelVariance(WINDOW)])
    with pytest.raises(StatisticError, match=r"seed 4: step 50 is not among .*; the nearest is step 30"):
        stream(ds, [Distance(50)])
    with pytest.raises(StatisticError, match=r"the start, step 0, is not among .*; the nearest is step 10"):
        stream(ds.isel(snapshot=slice(1, None)), [Distance("start")])
    with pytest.raises(StatisticError, match=r"9 iterates are stored, fewer than the window of 100"):
        stream(ds, [ParameterTailVariance()])
    with pytest.raises(StatisticError, match=r"window is 2; this variance needs at least 3"):
        stream(ds, [ParameterTailVariance(2)])
    with pytest.raises(ConfigurationError, match=r"two statistics are called 'parameter_tail_variance'"):
        stream(ds, [ParameterTailVariance(3), ParameterTailVariance(4)])
    with pytest.raises(ConfigurationError, match=r"the dataset has 7 of the 39 numbers"):
        stream(ds.isel(param=slice(7)), [Norm()])
    with pytest.raises(ConfigurationError, match=r"does not say how its states are laid out"):
        stream(ds.drop_attrs(), [Norm()])


class Counted:
    """An array that knows what was read of it."""

    reads: ClassVar[list[tuple[int, ...]]] = []

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.shape, self.dtype, self.ndim = values, values.shape, values.dtype, values.ndim
        self.reads.clear()

    def __getitem__(self, where):
        found = self.values[where]
        if found.size:
            self.reads.append(found.shape[-2:])
        return found


def test_nothing_is_read_before_it_is_computed_and_one_block_at_a_time():
    values = iterates(12, (1, 1))
    counted, reads = Counted(values), Counted.reads
    ds = dataset(values, np.ones((1, 1, 12), dtype=bool))
    ds["params"] = ds["params"].copy(data=da.from_array(counted, chunks=(1, 1, 13, 4), asarray=False))
    lazy = streamed(ds, EVERYTHING)
    assert reads == []
    lazy.compute(scheduler="sync")
    assert sorted(reads) == [(13, 4)] * 9  # three ranges of three blocks; what is read ahead is used again
    reads.clear()
    streamed(ds, [ParameterLevelVariance(3)], "a.bias").compute(scheduler="sync")
    assert reads == [(13, 4), (13, 4)]  # a.bias lies in two ranges; the window is in the last block


def test_a_recorded_store_streams_by_threads_and_on_a_cluster(record):
    from distributed import Client, LocalCluster

    ds = record(SMALL_NET, seeds=[0]).dataset()
    here = stream(ds, EVERYTHING[:3] + EVERYTHING[4:])
    x = ds.params.values.astype(np.float64)
    np.testing.assert_allclose(here.distance_to_start, np.sqrt(((x - x[..., :1]) ** 2).sum(2)), rtol=1e-12)
    assert here.stored.all()
    with LocalCluster(1, processes=False, dashboard_address=None, threads_per_worker=1) as cluster:
        with Client(cluster, set_as_default=False) as client:
            xr.testing.assert_identical(stream(ds, EVERYTHING[:3] + EVERYTHING[4:], scheduler=client), here)
        xr.testing.assert_identical(
            stream(ds, EVERYTHING[:3] + EVERYTHING[4:], scheduler=cluster.scheduler_address), here
        )
    with pytest.raises(ConfigurationError, match="no Dask scheduler answers"):
        stream(ds, [Norm()], scheduler="nowhere:port")
    assert analysis.stream is stream


def test_statistics_of_metrics_touch_no_parameters(record, monkeypatch):
    from trajstore.storage.states import States

    class Read(BaseException):
        """Something that nothing takes for damage."""

    def refuse(self, where):
        raise Read

    ds = record(SMALL_NET).dataset()
    monkeypatch.setattr(States, "_read", refuse)
    assert analysis.tail_variance(ds, "test_loss", 5).notnull().all()
    assert ds.traj.sketch_distances("last").notnull().all()
    with pytest.raises(Read):
        stream(ds, [Norm()])
