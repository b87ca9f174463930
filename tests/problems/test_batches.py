"""The batch stream: random access, determinism, independence."""

from __future__ import annotations

import numpy as np
import pytest

from trajstore.errors import ConfigurationError
from trajstore.problems.batches import draws, generator


@pytest.mark.parametrize("sampling", ["iid", "shuffle"])
def test_any_batch_can_be_had_without_the_ones_before_it(sampling):
    in_turn = [draws(sampling, 10, 3, 7)(i) for i in range(1, 40)]
    stream = draws(sampling, 10, 3, 7)
    for i in (39, 1, 20, 20, 5):
        assert np.array_equal(stream(i), in_turn[i - 1])


def test_an_epoch_holds_every_example_once():
    stream = draws("shuffle", 12, 3, 0)
    epochs = [np.concatenate([stream(i) for i in range(4 * e + 1, 4 * e + 5)]) for e in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])


def test_an_incomplete_last_batch_is_dropped():
    stream = draws("shuffle", 10, 4, 0)
    first_epoch = np.concatenate([stream(1), stream(2)])
    assert len(set(first_epoch)) == 8
    assert [len(stream(i)) for i in range(1, 9)] == [4] * 8


def test_iid_draws_are_uniform():
    stream = draws("iid", 5, 4, 3)
    counts = np.bincount(np.concatenate([stream(i) for i in range(1, 5001)]), minlength=5)
    expected = 20_000 / 5
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 18.5  # 99.9% of χ² with 4 degrees of freedom


def test_seeds_and_purposes_and_indices_give_different_streams():
    keys = [(0, "noise", 1), (1, "noise", 1), (0, "noise", 2), (0, "start", 1), (0, "examples", 1)]
    numbers = [generator(*key).standard_normal() for key in keys]
    assert len(set(numbers)) == len(keys)
    assert generator(0, "noise", 1).standard_normal() == numbers[0]


@pytest.mark.parametrize("sampling", ["iid", "shuffle"])
def test_batches_that_are_drawn_together_are_the_parts_of_larger_ones(sampling):
    large, small = draws(sampling, 50, 12, 3), draws(sampling, 50, 4, 3, together=3)
    for i in range(1, 11):
        assert np.concatenate([small(3 * i - 2), small(3 * i - 1), small(3 * i)]).tolist() == large(i).tolist()
    with pytest.raises(ConfigurationError, match="drawn_together is 0"):
        draws(sampling, 50, 4, 3, together=0)


def test_a_batch_that_cannot_be_drawn_is_refused():
    with pytest.raises(ConfigurationError, match="at least 1"):
        draws("iid", 10, 0, 0)
    with pytest.raises(ConfigurationError, match="larger than an epoch"):
        draws("shuffle", 10, 11, 0)
