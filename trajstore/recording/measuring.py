"""What is recorded of an iterate: its metrics, norms and distances, the sketch, the flat state where it is stored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trajstore.engine import Iterate
from trajstore.experiment.experiment import Experiment
from trajstore.operators.state import State
from trajstore.recording.leaving import Leaving
from trajstore.recording.schema import Flatten
from trajstore.storage.format.schema import Schema
from trajstore.storage.format.sketch import Sketch
from trajstore.storage.writing.segment import Observation

__all__ = ["Observer", "parameters_of"]


class Observer:
    """Makes observations of the iterates of one experiment."""

    def __init__(self, experiment: Experiment, schema: Schema) -> None:
        self._flatten, self._leaving = Flatten(schema.layout), Leaving()
        self._sketch = Sketch(schema.layout.parameters, experiment.record.sketch, schema.sketch_seed)
        self._snapshots = frozenset(schema.snapshots)

    def __call__(self, iterate: Iterate, leg: int, here: Tensor, start: Tensor, before: Tensor | None) -> Observation:
        """Observe an iterate, given its parameters, those of θ₀, and those of the recorded iterate before."""
        return self.begin(iterate, leg, here, start, before)()

    def begin(
        self, iterate: Iterate, leg: int, here: Tensor, start: Tensor, before: Tensor | None
    ) -> Callable[[], Observation]:
        """Begin to observe; what is returned finishes it, when the numbers have left the device."""
        from_start = here - start
        distances = [here.norm(), from_start.norm(), *(() if before is None else ((here - before).norm(),))]
        names = ("param_norm", "start_distance", "step_distance")
        flat = self._flatten(iterate.state) if iterate.step in self._snapshots else ()
        sent = self._leaving.send([torch.stack(distances), from_start, *flat])
        step, measured = iterate.step, iterate.metrics

        def finish() -> Observation:
            lengths, difference, *state = sent()
            metrics = {**measured, **dict(zip(names, lengths.tolist(), strict=False))}
            snapshot = (state[0].numpy(force=True), state[1].numpy(force=True)) if state else None
            return Observation(step, leg, metrics, self._sketch(difference.numpy(force=True)), snapshot)

        return finish


def parameters_of(state: State) -> Tensor:
    """Return the parameters as one vector in float64, on their device."""
    return torch.cat([t.reshape(-1).double() for t in state.params.values()])
