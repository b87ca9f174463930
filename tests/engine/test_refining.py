"""Adaptive grids: only what it takes to know a curve, and the same whatever is computed beside it."""

from __future__ import annotations

import numpy as np
import pytest

import trajstore as ts
from trajstore.engine import Iterate, Work
from trajstore.engine.orders import Leg
from trajstore.engine.refining import Refining, Wanted
from trajstore.errors import ConfigurationError, NotFoundError

QUADRATIC = {"name": "q", "problem": {"family": "quadratic"}, "operator": {"family": "sgd", "lr": 0.1}, "steps": 500,
             "orders": ["backward"]}  # fmt: skip
NETWORK = {
    "name": "n", "problem": {"family": "regression", "width": 8, "depth": 2, "points": 21, "dtype": "float64"},
    "operator": {"family": "sgd", "lr": 0.05}, "steps": 144, "seeds": [0, 1],
    "orders": ["forward", "backward", "backward+backward@97"],
    "record": {"adaptive": "test_loss", "tolerance": 5e-3},
}  # fmt: skip


class Known:
    """An engine whose iterates are the values of a function."""

    def __init__(self, function):
        self.function, self.computed = function, []

    def start(self, seed):
        return Iterate(0, None, {"f": self.function(0)})

    def run(self, works):
        for k, work in enumerate(works):
            for step in work.steps:
                self.computed.append(step)
                yield k, Iterate(step, None, {"f": self.function(step)})


def refined(function, tolerance, grid=range(1001), kind="backward", steps=(1, 500, 1000)):
    engine = Known(function)
    refining = Refining(engine, Wanted("f", tolerance, grid))
    return [it.step for _, it in refining.run([Work(0, Leg(kind), engine.start(0), list(steps))])], engine.computed


def test_a_straight_curve_takes_the_middles_and_theirs():
    steps, computed = refined(lambda n: 3.0 * n, 1e-9)
    assert steps == sorted(computed)
    assert len(steps) == 3 + 2 + 4


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4])
def test_a_smooth_curve_is_known_to_the_tolerance(tolerance):
    curve = lambda n: np.exp(-n / 40)  # noqa: E731
    steps, _ = refined(curve, tolerance)
    n = np.arange(1, 1001)
    assert np.abs(np.interp(n, steps, curve(np.array(steps))) - curve(n)).max() <= tolerance
    assert len(steps) < 250


def test_it_looks_where_the_curve_bends_and_only_on_the_grid():
    steps, _ = refined(lambda n: float(n > 300), 0.1, grid=range(0, 1001, 10), steps=(10, 500, 1000))
    assert {300, 310} <= set(steps)
    assert len(steps) < 40
    assert all(step % 10 == 0 for step in steps)


def test_where_a_curve_stops_being_finite_is_found():
    steps, _ = refined(lambda n: np.nan if n > 700 else 1.0, 0.1)
    assert {700, 701} <= set(steps)
    assert len(steps) < 40


def test_a_rough_curve_is_computed_whole_and_in_order():
    steps, computed = refined(lambda n: np.sin(n * n), 1e-6)
    assert steps == list(range(1, 1001))
    assert sorted(computed) == steps


def test_a_forward_leg_is_passed_through_twice_and_keeps_the_same_steps():
    curve = lambda n: np.exp(-n / 40)  # noqa: E731
    steps, computed = refined(curve, 1e-3, kind="forward")
    assert steps == refined(curve, 1e-3)[0]
    assert computed == [*range(1, 1001), *steps]


def test_a_recorded_curve_is_known_and_what_was_not_computed_is_visible(tmp_path):
    full = ts.run(ts.Experiment.of(QUADRATIC), tmp_path / "full.zarr", engine="wavefront", lanes=8)
    some = ts.Experiment.of({**QUADRATIC, "record": {"adaptive": "train_loss", "tolerance": 1e-3}})
    stored = ts.run(some, tmp_path / "some.zarr", engine="wavefront", lanes=8)
    whole, here = full.dataset().isel(order=0, seed=0), stored.dataset().isel(order=0, seed=0)
    steps = np.flatnonzero(here.recorded)
    assert len(steps) < 150
    assert {0, 500} <= set(steps.tolist())
    np.testing.assert_array_equal(here.step[here.recorded], here.snapshot[here.stored])
    np.testing.assert_allclose(here.params[:, here.stored], whole.params[:, here.stored], rtol=1e-12)
    known = np.interp(np.arange(501), steps, here.train_loss[steps])
    assert np.abs(known - whole.train_loss).max() <= 1e-3
    assert np.isnan(here.train_loss[~here.recorded]).all()
    assert np.isnan(here.params[:, ~here.stored]).all()
    # Distances are to the recorded iterate before.
    moved = np.linalg.norm(np.diff(here.params[: stored.schema.layout.parameters, here.stored], axis=1), axis=0)
    np.testing.assert_allclose(here.step_distance[steps[1:]], moved, rtol=1e-9)
    (slab,) = stored.slabs()
    assert (slab.complete, slab.recorded, slab.last_step) == (True, len(steps), 500)
    left_out = int(np.flatnonzero(~here.recorded)[0])
    with pytest.raises(NotFoundError, match=rf"step {left_out} was not computed; the nearest that was is step \d+"):
        stored.arrays(order="backward", seed=0, step=left_out)


def test_which_steps_are_computed_depends_on_nothing_else(tmp_path):
    experiment = ts.Experiment.of(NETWORK)
    stored = ts.run(experiment, tmp_path / "wave.zarr", engine="wavefront", lanes=8).dataset()
    recorded = stored.recorded.values
    plainly = ts.run(experiment, tmp_path / "plain.zarr", engine="reference").dataset()
    np.testing.assert_array_equal(plainly.recorded, recorded)
    spread = ts.run(experiment, tmp_path / "spread.zarr", lanes=8, workers=2).dataset()
    np.testing.assert_array_equal(spread.recorded, recorded)
    np.testing.assert_allclose(spread.params, stored.params, rtol=1e-10)
    np.testing.assert_allclose(spread.step_distance, stored.step_distance, rtol=1e-6)
    np.testing.assert_array_equal(spread.leg, stored.leg)
    # Before the reset both orders have come the same way, and one knows what the other does.
    np.testing.assert_array_equal(recorded[1, :, :98], recorded[2, :, :98])
    with pytest.raises(KeyboardInterrupt):
        ts.run(experiment, tmp_path / "cut.zarr", engine="reference", progress=_interrupt)
    again = ts.run(experiment, tmp_path / "cut.zarr", resume=True).dataset()
    np.testing.assert_array_equal(again.recorded, recorded)


def _interrupt(done: int, where: str) -> None:
    if where.startswith("seed 1"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"adaptive": "test_loss"}, "adaptive and tolerance go together"),
        ({"tolerance": 0.1}, "adaptive and tolerance go together"),
        ({"adaptive": "test_loss", "tolerance": 0.0}, "tolerance is 0.0"),
        ({"adaptive": "test_loss", "tolerance": float("nan")}, "tolerance is nan"),
        ({"adaptive": "test_los", "tolerance": 0.1}, "did you mean 'test_loss'"),
        ({"adaptive": "test_loss", "tolerance": 0.1, "steps": [3]}, "leave steps and log_until out"),
        ({"dense_tail": 50}, "dense_tail is for adaptive grids"),
        ({"adaptive": "test_loss", "tolerance": 0.1, "dense_tail": 0}, "dense_tail is 0; it must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(record, says):
    with pytest.raises(ConfigurationError, match=says):
        ts.Experiment.of({**NETWORK, "record": record})


TAILED = {**NETWORK, "record": {**NETWORK["record"], "dense_tail": 30}}


def _whole(ds, first, last):
    return bool(ds["recorded"].sel(step=slice(first, last)).all())


def test_of_a_dense_tail_the_last_steps_of_each_leg_are_all_there():
    experiment = ts.Experiment.of(TAILED)
    assert set(experiment.asked) == set(ts.Experiment.of(NETWORK).asked) | set(range(68, 98)) | set(range(115, 145))
    sparse = ts.Experiment.of({**TAILED, "record": {**TAILED["record"], "every": 10}, "orders": ["backward"]})
    assert set(range(0, 145, 10)) <= set(sparse.asked)  # it counts recorded steps: 30 of them are more than there are
    windowed = ts.Experiment.of({**TAILED, "orders": ["backward/60"], "record": {**TAILED["record"], "dense_tail": 5}})
    assert {56, 57, 58, 59, 60, 116, 117, 118, 119, 120, 140, 144} <= set(windowed.asked)
    assert 55 not in windowed.asked


def test_a_dense_tail_depends_on_nothing_else_and_is_that_of_a_dense_recording(tmp_path):
    experiment = ts.Experiment.of({**TAILED, "seeds": [0]})
    stored = ts.run(experiment, tmp_path / "wave.zarr", engine="wavefront", lanes=8)
    ds = stored.dataset()
    assert _whole(ds, 68, 97)
    assert _whole(ds, 115, 144)
    assert not _whole(ds.sel(order=["backward"]), 0, 144)
    spread = ts.run(experiment, tmp_path / "spread.zarr", lanes=8, workers=2).dataset()
    np.testing.assert_array_equal(spread.recorded, ds.recorded)
    with pytest.raises(KeyboardInterrupt):
        ts.run(experiment, tmp_path / "cut.zarr", engine="reference", progress=_interrupt_late)
    again = ts.run(experiment, tmp_path / "cut.zarr", resume=True).dataset()
    np.testing.assert_array_equal(again.recorded, ds.recorded)
    whole = {**NETWORK, "seeds": [0], "orders": ["forward"], "record": {}}
    dense = ts.run(ts.Experiment.of(whole), tmp_path / "dense.zarr", engine="reference").dataset()
    here = ds["test_loss"].sel(order="forward", seed=0, step=slice(115, 144))
    np.testing.assert_allclose(here, dense["test_loss"].sel(order="forward", seed=0, step=slice(115, 144)), rtol=1e-9)


def _interrupt_late(done: int, where: str) -> None:
    if where.endswith("backward to step 97"):
        raise KeyboardInterrupt


def test_extended_it_has_the_tails_of_both_ends(tmp_path):
    table = {**QUADRATIC, "steps": 200, "record": {"adaptive": "train_loss", "tolerance": 1e-3, "dense_tail": 20}}
    ts.run(ts.Experiment.of(table), tmp_path / "s.zarr", engine="reference")
    longer = ts.Experiment.of({**table, "steps": 300, "seeds": [0, 1]})
    ds = ts.run(longer, tmp_path / "s.zarr", extend=True).dataset()
    assert _whole(ds, 181, 200)
    assert _whole(ds, 281, 300)


def test_a_configuration_without_a_dense_tail_is_stored_as_before():
    assert "dense_tail" not in ts.Experiment.of(NETWORK).config()["record"]
    config = ts.Experiment.of(TAILED).config()
    assert config["record"]["dense_tail"] == 30
    assert ts.Experiment.of(config).config() == config
