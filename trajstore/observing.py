"""What is recorded of an iterate: its metrics, norms and distances, the sketch, the flat state where it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trajstore.engine import Iterate
from trajstore.experiment import Experiment
from trajstore.flattening import Flatten
from trajstore.state import State
from trajstore.storage.schema import Schema
from trajstore.storage.sketch import Sketch

__all__ = ["Observation", "Observer", "parameters_of"]


class Observation(NamedTuple):
    """One recorded step, as a slab's writer wants it."""

    step: int
    leg: int
    metrics: Mapping[str, float]
    sketch: NDArray[np.float64]
    snapshot: tuple[NDArray[Any], NDArray[np.int64]] | None


class Observer:
    """Makes observations of the iterates of one experiment."""

    def __init__(self, experiment: Experiment, schema: Schema) -> None:
        self._flatten = Flatten(schema.layout)
        self._sketch = Sketch(schema.layout.parameters, experiment.record.sketch, schema.sketch_seed)
        self._snapshots = frozenset(schema.snapshots)

    def __call__(self, iterate: Iterate, leg: int, here: Tensor, start: Tensor, before: Tensor | None) -> Observation:
        """Observe an iterate, given its parameters, those of θ₀, and those of the recorded iterate before."""
        from_start = here - start
        distances = [here.norm(), from_start.norm(), *(() if before is None else ((here - before).norm(),))]
        names = ("param_norm", "start_distance", "step_distance")
        metrics = {**iterate.metrics, **dict(zip(names, torch.stack(distances).tolist(), strict=False))}
        snapshot = self._flatten(iterate.state) if iterate.step in self._snapshots else None
        return Observation(iterate.step, leg, metrics, self._sketch(from_start.numpy(force=True)), snapshot)


def parameters_of(state: State) -> Tensor:
    """Return the parameters as one vector in float64, on their device."""
    return torch.cat([t.reshape(-1).double() for t in state.params.values()])
