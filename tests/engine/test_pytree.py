"""Nested tensors are taken by name: an operator may return its state in any order of entries."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tests.conftest import last_of
from trajstore._common.pytree import tree_leaves, tree_map
from trajstore.engine.orders import Leg
from trajstore.engine.reference import ReferenceEngine
from trajstore.engine.ticks import Eager, step_of
from trajstore.engine.wavefront import WavefrontEngine
from trajstore.operators.sgd import SGD
from trajstore.operators.state import State
from trajstore.problems.regression import Regression

CPU = torch.device("cpu")


def test_trees_are_taken_by_name_and_not_by_the_order_of_their_entries():
    one = ({"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, torch.tensor(3.0))
    other = ({"b": torch.tensor(20.0), "a": torch.tensor(10.0)}, torch.tensor(30.0))
    assert [*map(float, tree_leaves(one))] == [1.0, 2.0, 3.0]
    assert [*map(float, tree_leaves(other))] == [10.0, 20.0, 30.0]
    assert [*map(float, tree_leaves(tree_map(torch.add, one, other)))] == [11.0, 22.0, 33.0]
    with pytest.raises(ValueError, match="trees differ"):
        tree_map(torch.add, one, ({"a": torch.tensor(1.0)}, torch.tensor(3.0)))


@dataclass(frozen=True)
class Backwards(SGD):
    """SGD that returns its tensors from the last to the first."""

    def apply(self, gradient, state, batch, index):
        after = super().apply(gradient, state, batch, index)
        memory = {slot: dict(reversed(part.items())) for slot, part in after.memory.items()}
        return State(dict(reversed(after.params.items())), after.buffers, memory, after.position)


@pytest.mark.parametrize("lanes", [1, 3])
def test_an_operator_may_return_its_state_in_any_order(lanes):
    live, operator = Regression(width=3, depth=2, points=7, dtype="float64").build(CPU), Backwards(0.05, momentum=0.9)
    reference = ReferenceEngine(live, operator, [(0, 0)])
    wave = WavefrontEngine(live, operator, [(0, 0)], lanes, Eager(step_of(live, operator, lanes)))
    expected, found = (last_of(engine, Leg("backward"), 5).state for engine in (reference, wave))
    for name, tensor in expected.params.items():
        torch.testing.assert_close(found.params[name], tensor, rtol=1e-12, atol=1e-12)
    for name, tensor in expected.memory["momentum_buffer"].items():
        torch.testing.assert_close(found.memory["momentum_buffer"][name], tensor, rtol=1e-12, atol=1e-12)
