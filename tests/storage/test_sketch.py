"""Sketches keep distances in expectation, exactly where there is room."""

from __future__ import annotations

import numpy as np
import pytest

from trajstore.storage.format.sketch import Sketch


def test_it_is_the_identity_where_there_are_few_parameters():
    difference = np.arange(64.0)
    assert np.array_equal(Sketch(64, 64, 0)(difference), difference)
    assert Sketch(5, 64, 0).components == 5


def test_it_is_linear():
    rng, sketch = np.random.default_rng(0), Sketch(1000, 64, 0)
    a, b = rng.standard_normal((2, 1000))
    np.testing.assert_allclose(sketch(2 * a - b), 2 * sketch(a) - sketch(b), atol=1e-12)


def test_squared_norms_are_unbiased_with_the_stated_spread():
    x = np.random.default_rng(1).standard_normal(2000)
    ratios = np.array([np.sum(Sketch(2000, 128, seed)(x) ** 2) / np.sum(x**2) for seed in range(400)])
    spread = np.sqrt(2 / 128)
    assert ratios.mean() == pytest.approx(1, abs=4 * spread / 20)
    assert ratios.std() == pytest.approx(spread, rel=0.2)


def test_it_is_fixed_by_its_seed_for_ever():
    """The stored format depends on this stream: a change here breaks old stores."""
    found = Sketch(10, 4, 0)(np.arange(1.0, 11.0))
    assert found.tolist() == FIRST_SKETCH


FIRST_SKETCH = [-12.0, 18.0, 12.0, -11.0]
