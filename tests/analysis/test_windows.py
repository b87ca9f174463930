"""Windows of grids that leave steps out: all of an even tail, or an error that says how long the longest is."""

from __future__ import annotations

import numpy as np
import pytest
from trajstore.analysis import convergence, resets, step_variance, variance
from trajstore.analysis.windows import even_tail, window_of

from tests.analysis.processes import runs_of
from trajstore.errors import StatisticError

RNG = np.random.default_rng(0)
FORWARD, BACKWARD = RNG.standard_normal((1, 400)), RNG.standard_normal((1, 400))


def adaptive(tail=None, whole=80):
    """Forward at every step; backward at every 16th and, at its end, at as many as are said."""
    ds = runs_of(FORWARD, BACKWARD)
    there = np.ones((2, 1, 400), dtype=bool)
    there[1, 0] = (np.arange(400) % 16 == 0) | (np.arange(400) >= 400 - whole)
    config = {"record": {"adaptive": "loss", **({"dense_tail": tail} if tail else {})}}
    ds = ds.assign(loss=ds["loss"].where(there), measured=ds["measured"].copy(data=there.astype(int)))
    return ds.assign_coords(recorded=(("order", "seed", "step"), there)).assign_attrs(
        adaptive="loss", trajstore={"config": config}
    )


@pytest.mark.parametrize("order", [["forward", "backward"], ["backward"]])
def test_an_uneven_window_is_refused_with_the_longest_even_one(order):
    ds = adaptive().sel(order=order)
    with pytest.raises(StatisticError, match="the longest even window is 80, from step 320 on"):
        window_of(ds, "loss", 81)
    assert window_of(ds, "loss", 80).steps.tolist() == list(range(320, 400))
    assert step_variance(ds, "loss", 50).sel(order="backward").item() == pytest.approx(
        0.5 * np.diff(BACKWARD[0, -50:]).var(ddof=0) + 0.5 * np.diff(BACKWARD[0, -50:]).mean() ** 2, rel=0.03
    )


def test_by_default_it_is_the_dense_tail_that_was_asked_for():
    for ask, begin in ((variance, 280), (convergence, 340)):  # a verdict looks at steps before the window where it can
        found = ask(adaptive(tail=60), "loss")
        assert (found.attrs["window"], found.attrs["from_step"]) == (60, 340)
        dense = ask(runs_of(FORWARD, BACKWARD).isel(step=slice(begin, None)), "loss", window=60)
        for name in found.data_vars:
            np.testing.assert_array_equal(found[name].values, dense[name].values)
    with pytest.raises(
        StatisticError, match="the longest even window is 80"
    ):  # without one, nobody knows which to take
        variance(adaptive(), "loss")


def test_a_tail_that_is_longer_than_the_last_half_is_no_reason_for_more():
    assert len(window_of(adaptive(tail=300, whole=320), "loss")) == 200


def test_a_slab_that_is_not_finished_is_told_as_such():
    ds = adaptive(tail=60)
    there = ds["recorded"].values.copy()
    there[1, 0, 390:] = False
    ds = ds.assign(measured=ds["measured"].copy(data=there.astype(int))).assign_coords(
        recorded=(("order", "seed", "step"), there)
    )
    with pytest.raises(StatisticError, match="order 'backward', seed 0 has no step 390; finish the recording"):
        window_of(ds, "loss", 60)


def test_what_an_adaptive_grid_leaves_out_has_not_diverged():
    legs = np.zeros((2, 1, 400), dtype=int)
    legs[1, 0, 201:] = 200
    says = r"leg from step 200: steps 208 to 399 are recorded at uneven distances where loss changes most"
    with pytest.raises(StatisticError, match=says):
        resets(adaptive(tail=60).assign(leg=(("order", "seed", "step"), legs)), "loss", 100)


def test_even_tails():
    assert even_tail(np.array([0, 4, 6, 7, 8, 9])) == 4
    assert even_tail(np.arange(10), np.arange(10) != 6) == 3
    assert even_tail(np.arange(10), np.arange(10) != 9) == 0
    assert even_tail(np.array([5])) == 1
    assert even_tail(np.array([5, 4])) == 1
    assert even_tail(np.array([], dtype=int)) == 0
