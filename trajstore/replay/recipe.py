"""Recipe: an experiment's problem and operators as functions again, from what is stored with its iterates.

A stored experiment has its recipe, and so has a dataset of it, in its attributes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from trajstore.engine.proving import disproof
from trajstore.engine.reference import gradient_of
from trajstore.engine.ticks import functional_gradient
from trajstore.errors import ConfigurationError, ConflictError, NotFoundError, RefusedWarning
from trajstore.experiment.configuration import completed, differences
from trajstore.experiment.experiment import Experiment
from trajstore.experiment.trust import refuse_untrusted
from trajstore.operators import Batch, Gradient, Pushes
from trajstore.operators.state import Memory, State, Tensors, beginning
from trajstore.problems import Batches, LiveProblem, Predicts
from trajstore.reading.origin import UNKNOWN_ORIGIN, attributes_of
from trajstore.recording.acceptance import refuse_other_data
from trajstore.storage.format.metrics import maker_of
from trajstore.storage.format.schema import Schema
from trajstore.store import StoredExperiment

__all__ = ["Recipe", "Source", "experiment_of", "why_not"]

Source = StoredExperiment | xr.Dataset
"""What has a recipe."""


@dataclass(frozen=True)
class Recipe:
    """An experiment that can compute again, on the CPU."""

    name: str
    schema: Schema
    experiment: Experiment
    live: LiveProblem

    @classmethod
    def of(cls, source: Source) -> Recipe:
        """Make a problem and its operators from their configuration; refuse where that is not stored."""
        if (reason := why_not(source)) is not None:
            raise ConfigurationError(f"{reason.partition(':')[0]}: nothing can be computed with it afterwards")
        name, attributes = _attributes(source)
        experiment, schema = experiment_of(source), Schema.from_json(attributes["schema"])
        live = experiment.problem.build(torch.device("cpu"))
        refuse_other_data(*_attributes(source), live)
        return cls(name, schema, experiment, live)

    @cached_property
    def _gradient(self) -> Gradient:
        return gradient_of(self.live)

    def start(self, seed: int) -> State:
        """Return θ₀ of a seed of the experiment."""
        params, buffers = self.live.initial(self.schema.init_seeds[self._place(seed)])
        return beginning(params, buffers, self.experiment.operator.memory(params))

    def batches(self, seed: int) -> Batches:
        """Return the batch stream of a seed of the experiment."""
        return self.live.batches(self.schema.data_seeds[self._place(seed)])

    def apply(self, state: State, batch: Batch, index: int) -> State:
        """Return T_index(state)."""
        with torch.no_grad():
            return self.experiment.operator.apply(self._gradient, state, batch, torch.tensor(index))

    def pushed(
        self, state: State, tangents: Sequence[Tensors], batch: Batch, index: int
    ) -> tuple[State, list[Tensors]]:
        """Return T_index(state), and what becomes of infinitely small differences of the parameters."""
        operator, i = self.experiment.operator, torch.tensor(index)
        if not isinstance(operator, Pushes) or self._pushing == [False]:
            return self._derived(state, tangents, batch, i)
        with torch.no_grad():
            moved = [operator.push(self._gradient, state, tangent, batch, i) for tangent in tangents]
        if not self._pushing:  # what an operator says of itself is compared with what it does, once
            told = disproof(moved, lambda *given: self._derived(*given)[1], state, tangents, batch, i)
            self._pushing.append(not told)
            if told:
                what = f"operator {type(operator).__name__}: its `push` is not the derivative of its `apply`: {told}"
                warnings.warn(f"{what}; torch's derivative is used", RefusedWarning, stacklevel=2)
                return self._derived(state, tangents, batch, i)
        return self.apply(state, batch, index), moved

    @cached_property
    def _pushing(self) -> list[bool]:
        """Whether the operator's own derivative may be used, once that is known."""
        return []

    def _derived(
        self, state: State, tangents: Sequence[Tensors], batch: Batch, index: Tensor
    ) -> tuple[State, list[Tensors]]:
        """Return the same by torch's derivatives."""
        operator, gradient = self.experiment.operator, functional_gradient(self.live)

        def step(params: Tensors) -> tuple[Tensors, State]:
            after = operator.apply(gradient, state._replace(params=params), batch, index)
            return after.params, after

        # Twice backwards instead of once forwards: not all that torch can do backwards it can do forwards.
        _, pull, after = torch.func.vjp(step, state.params, has_aux=True)  # type: ignore[misc]
        push = torch.func.vjp(lambda cotangent: pull(cotangent)[0], tangents[0])[1]
        return after, [push(tangent)[0] for tangent in tangents]

    def gradient(self, state: State, batch: Batch) -> Tensors:
        """Return the gradient of the loss on a batch."""
        return self._gradient(state.params, state.buffers, batch)[0]

    def train_loss(self, params: Tensors, buffers: Tensors) -> Tensor:
        """Return the loss over all training examples."""
        values = self.live.evaluate(params, buffers)
        if "train_loss" not in values:
            raise ConfigurationError(f"experiment {self.name!r}: its problem has no train_loss")
        return values["train_loss"]

    def outputs(self, state: State) -> NDArray[np.float64]:
        """Return what the model says of the probe, (example, output)."""
        if not isinstance(self.live, Predicts):
            raise ConfigurationError(f"experiment {self.name!r}: its problem has no outputs")
        with torch.no_grad():
            outputs: Any = self.live.outputs(state.params, state.buffers)
        if not isinstance(outputs, Tensor):
            raise ConfigurationError(
                f"experiment {self.name!r}: its module returns a {type(outputs).__name__}; outputs need one "
                "that returns a tensor"
            )
        return np.asarray(outputs.reshape(len(outputs), -1).double().numpy())

    def state(self, params: NDArray[Any], counters: NDArray[np.int64]) -> State:
        """Return a state from the vectors that are stored of it."""
        vectors = {"params": params, "counters": counters}
        parts: dict[str, Tensors] = {"parameter": {}, "buffer": {}, "memory": {}, "position": {}}
        for e in self.schema.layout.entries:
            flat = torch.from_numpy(np.array(vectors[e.array][e.part]))  # a copy: what was read may not be writable
            parts[e.role][e.name] = flat.reshape(e.shape).to(getattr(torch, e.dtype))
        memory: Memory = {}
        for name, tensor in parts["memory"].items():
            slot, _, parameter = name.partition("/")
            memory.setdefault(slot, {})[parameter] = tensor
        return State(parts["parameter"], parts["buffer"], memory, parts["position"]["position"])

    def _place(self, seed: int) -> int:
        if seed not in self.schema.seeds:
            raise NotFoundError(f"experiment {self.name!r} has no seed {seed}")
        return self.schema.seeds.index(seed)


def why_not(source: Source) -> str | None:
    """Say why an experiment can never be computed again, if it cannot: it has no recipe."""
    name, attributes = _attributes(source)
    how = {"loop": "was recorded by a training loop", "import": "was imported"}.get(maker_of(attributes["config"]))
    return how and f"experiment {name!r} {how}, and how to compute it is not stored: it cannot be replayed"


def experiment_of(source: Source) -> Experiment:
    """Return the experiment that was recorded."""
    name, attributes = _attributes(source)
    config = attributes["config"]
    address = source.store.place.address if isinstance(source, StoredExperiment) else None
    refuse_untrusted(name, config["problem"], [fill["id"] for fill in attributes["fills"]], address)
    # A factory's table also tells what the function made then; what it makes now is compared with that.
    problem = {key: value for key, value in config["problem"].items() if key != "made"}
    try:
        experiment = Experiment.of({**config, "problem": problem})
        made = experiment.config()["problem"]
    except ConfigurationError as error:
        raise ConfigurationError(
            f"experiment {name!r} cannot be replayed: its problem cannot be made from what is stored ({error})"
        ) from None
    if other := differences(completed("problem", config["problem"]), made):
        raise ConflictError(
            f"experiment {name!r}: its problem has changed since it was recorded (stored / now): {other[0][:200]}"
        )
    return experiment


def _attributes(source: Source) -> tuple[str, Mapping[str, Any]]:
    if isinstance(source, StoredExperiment):
        return source.name, source.attributes
    if not (attributes := attributes_of(source)):
        raise ConfigurationError(f"this dataset does not say how it was made: {UNKNOWN_ORIGIN}")
    return str(source.attrs.get("experiment", "")), attributes
