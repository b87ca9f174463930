"""Revive: an experiment's problem and operators as functions again, and its stored states as states.

What is asked of a trajectory afterwards, a contraction factor or the sharpness of the loss, is computed with what it
was recorded with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor

from trajstore.engine.reference import gradient_of
from trajstore.errors import ConfigurationError, NotFoundError
from trajstore.experiment import Experiment
from trajstore.operators import Batch, Gradient
from trajstore.problems import Batches, LiveProblem
from trajstore.replaying import experiment_of, why_not
from trajstore.state import Memory, State, Tensors, beginning
from trajstore.storage.states import States
from trajstore.store import StoredExperiment

__all__ = ["Revived", "revive"]


@dataclass(frozen=True)
class Revived:
    """An experiment that can compute again, on the CPU."""

    stored: StoredExperiment
    experiment: Experiment
    live: LiveProblem

    @cached_property
    def _gradient(self) -> Gradient:
        return gradient_of(self.live)

    # Looked up once: a metric is asked of thousands of states.
    @cached_property
    def _there(self) -> NDArray[np.bool_]:
        """(order, seed, snapshot): what was committed when it was asked first."""
        return self.stored.commits().snapshots

    @cached_property
    def _arrays(self) -> tuple[States, zarr.Array[Any]]:
        specs = {spec.name: spec for spec in self.stored.schema.arrays()}
        params = self.stored.array(specs["params"])
        return States.of(self.stored.store.place, params, self.stored.schema.codec), self.stored.array(
            specs["counters"]
        )

    def train_loss(self, params: Tensors, buffers: Tensors) -> Tensor:
        """Return the loss over all training examples."""
        values = self.live.evaluate(params, buffers)
        if "train_loss" not in values:
            raise ConfigurationError(f"experiment {self.stored.name!r}: its problem has no train_loss")
        return values["train_loss"]

    def start(self, init_seed: int) -> State:
        """Return θ₀."""
        params, buffers = self.live.initial(init_seed)
        return beginning(params, buffers, self.experiment.operator.memory(params))

    def batches(self, seed: int) -> Batches:
        """Return the batch stream of a seed of the experiment."""
        schema = self.stored.schema
        return self.live.batches(schema.data_seeds[schema.seeds.index(seed)])

    def apply(self, state: State, batch: Batch, index: int) -> State:
        """Return T_index(state)."""
        with torch.no_grad():
            return self.experiment.operator.apply(self._gradient, state, batch, torch.tensor(index))

    def gradient(self, state: State, batch: Batch) -> Tensors:
        """Return the gradient of the loss on a batch."""
        return self._gradient(state.params, state.buffers, batch)[0]

    def states(self, order: str, seed: int, steps: Sequence[int]) -> list[State]:
        """Return stored states, whole."""
        schema = self.stored.schema
        for what, value, known in (("order", order, schema.orders), ("seed", seed, schema.seeds)):
            if value not in known:
                raise NotFoundError(f"experiment {self.stored.name!r} has no {what} {value!r}")
        i, k = schema.orders.index(order), schema.seeds.index(seed)
        places = {step: place for place, step in enumerate(schema.snapshots) if self._there[i, k, place]}
        if missing := [step for step in steps if step not in places]:
            raise NotFoundError(
                f"experiment {self.stored.name!r}, order {order!r}, seed {seed}: "
                f"no state is stored for step {missing[0]}"
            )
        params, counters = self._arrays
        return [
            self._state(params[i, k, :, places[s]], np.asarray(counters[i, k, :, places[s]]).astype(np.int64))
            for s in steps
        ]

    def _state(
        self,
        params: NDArray[Any],
        counters: NDArray[np.int64],
    ) -> State:
        vectors = {"params": params, "counters": counters}
        parts: dict[str, Tensors] = {"parameter": {}, "buffer": {}, "memory": {}, "position": {}}
        for e in self.stored.schema.layout.entries:
            flat = torch.from_numpy(np.ascontiguousarray(vectors[e.array][e.part]))
            parts[e.role][e.name] = flat.reshape(e.shape).to(getattr(torch, e.dtype))
        memory: Memory = {}
        for name, tensor in parts["memory"].items():
            slot, _, parameter = name.partition("/")
            memory.setdefault(slot, {})[parameter] = tensor
        return State(parts["parameter"], parts["buffer"], memory, parts["position"]["position"])


def revive(stored: StoredExperiment) -> Revived:
    """Make an experiment compute again; refuse one whose recipe is not stored."""
    if (reason := why_not(stored)) is not None:
        raise ConfigurationError(f"{reason.partition(':')[0]}: nothing can be computed with it afterwards")
    experiment = experiment_of(stored)
    live = experiment.problem.build(torch.device("cpu"))
    memory = experiment.operator.memory(live.initial(stored.schema.init_seeds[0])[0])
    if memory and not any(e.role == "memory" for e in stored.schema.layout.entries):
        raise ConfigurationError(
            f"experiment {stored.name!r}: its optimizer has a memory ({', '.join(memory)}) that was not stored, so no "
            "step can be made from its states; record with record.optimizer_state=true"
        )
    return Revived(stored, experiment, live)
