"""Revive: a stored experiment that computes again, with its stored states.

What is asked of a trajectory afterwards, a contraction factor or the sharpness of the loss, is computed with what it
was recorded with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from trajstore.errors import ConfigurationError, NotFoundError, slab_named
from trajstore.operators.state import State
from trajstore.replay.recipe import Recipe
from trajstore.storage.states import States
from trajstore.store import StoredExperiment

__all__ = ["Revived", "revive"]


@dataclass(frozen=True)
class Revived(Recipe):
    """A recipe, and the states that came of it."""

    stored: StoredExperiment

    def again(self) -> Revived:
        """Return another one with a problem of its own, for another thread: modules cannot be called by two at once."""
        return replace(self, live=self.experiment.problem.build(torch.device("cpu")))

    # Looked up once: a metric is asked of thousands of states.
    @cached_property
    def _there(self) -> NDArray[np.bool_]:
        """(order, seed, snapshot): what was committed when it was asked first."""
        return self.stored.commits().snapshots

    @cached_property
    def _arrays(self) -> tuple[States, zarr.Array[Any]]:
        specs = {spec.name: spec for spec in self.schema.arrays()}
        params = self.stored.array(specs["params"])
        return States.of(self.stored.store.place, params, self.schema.codec), self.stored.array(specs["counters"])

    def states(self, order: str, seed: int, steps: Sequence[int]) -> list[State]:
        """Return stored states, whole."""
        schema = self.schema
        if order not in schema.orders:
            raise NotFoundError(f"experiment {self.name!r} has no order {order!r}")
        i, k = schema.orders.index(order), self._place(seed)
        places = {step: place for place, step in enumerate(schema.snapshots) if self._there[i, k, place]}
        if missing := [step for step in steps if step not in places]:
            raise NotFoundError(f"{slab_named(self.name, order, seed)}: no state is stored for step {missing[0]}")
        params, counters = self._arrays
        return [
            self.state(params[i, k, :, places[s]], np.asarray(counters[i, k, :, places[s]]).astype(np.int64))
            for s in steps
        ]


def revive(stored: StoredExperiment) -> Revived:
    """Make an experiment compute again; refuse one whose recipe or memory is not stored."""
    if not isinstance(stored, StoredExperiment):
        raise ConfigurationError(
            f"this takes the stored experiment, store['NAME'], not a {type(stored).__name__} of it"
        )
    recipe = Recipe.of(stored)
    memory = recipe.start(recipe.schema.seeds[0]).memory
    if memory and not any(e.role == "memory" for e in recipe.schema.layout.entries):
        raise ConfigurationError(
            f"experiment {stored.name!r}: its optimizer keeps a state ({', '.join(memory)}) that was not stored, so no "
            "step can be taken from its snapshots; record with record.optimizer_state=true"
        )
    return Revived(recipe.name, recipe.schema, recipe.experiment, recipe.live, stored)
