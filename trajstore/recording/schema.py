"""States and stores: which shapes an experiment's states give, and how a state becomes flat vectors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from trajstore.errors import ConfigurationError
from trajstore.experiment.experiment import Experiment
from trajstore.operators import ChecksBatches
from trajstore.operators.state import State, beginning
from trajstore.problems import LiveProblem, NamesOfModule
from trajstore.storage.format.layout import Entry, Layout, Role
from trajstore.storage.format.metrics import MEASURES
from trajstore.storage.format.schema import Schema, check_metric_names, segment_length

__all__ = ["Flatten", "schema_of", "tensors_of"]


class Flatten:
    """States to the flat vectors of a layout."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._dtype = torch.float64 if layout.dtype == np.float64 else torch.float32

    def __call__(self, state: State) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (params, counters), on the state's device."""
        parts: dict[str, list[torch.Tensor]] = {"params": [], "counters": []}
        tensors = {(role, name): tensor for role, name, tensor in tensors_of(state, memory=True)}
        for entry in self._layout.entries:
            parts[entry.array].append(tensors[entry.role, entry.name].reshape(-1))
        params = torch.cat([t.to(self._dtype) for t in parts["params"]])
        counters = torch.cat([t.to(torch.int64) for t in parts["counters"]])
        return params, counters


def tensors_of(state: State, memory: bool) -> Iterator[tuple[Role, str, torch.Tensor]]:
    """Yield the tensors of a state in the order of the format."""
    for name, tensor in state.params.items():
        yield "parameter", name, tensor
    for name, tensor in state.buffers.items():
        yield "buffer", name, tensor
    for slot, tensors in state.memory.items() if memory else ():
        for name, tensor in tensors.items():
            yield "memory", f"{slot}/{name}", tensor
    yield "position", "position", state.position


def schema_of(experiment: Experiment, live: LiveProblem) -> Schema:
    """Return the schema of an experiment, and refuse what could not be stored."""
    params, buffers = live.initial(experiment.init_seeds[0])
    start = beginning(params, buffers, experiment.operator.memory(params))
    tied, transient = (live.tied, live.transient) if isinstance(live, NamesOfModule) else ({}, frozenset())
    entries = [
        Entry(
            name,
            role,
            tuple(t.shape),
            str(t.dtype).removeprefix("torch."),
            in_state_dict=name not in transient,
        )
        for role, name, t in tensors_of(start, experiment.record.optimizer_state)
    ]
    layout, stream = Layout.of(entries, tied), live.batches(experiment.seeds[0])
    if isinstance(experiment.operator, ChecksBatches):
        # A number that is not one per example is a key of random draws.
        experiment.operator.check(stream.batch_size, draws=any(t.ndim == 0 for t in stream[1]))
    if taken := [name for name in live.examples if name in MEASURES]:
        raise ConfigurationError(f"metric {taken[0]!r}: every experiment has one of that name ({MEASURES[taken[0]]})")
    metrics = {**live.examples, **dict.fromkeys(MEASURES), "batch_loss": stream.batch_size or None}
    schema = Schema(
        orders=tuple(map(str, experiment.orders)),
        seeds=experiment.seeds,
        init_seeds=experiment.init_seeds,
        data_seeds=experiment.seeds,
        steps=experiment.steps,
        snapshots=experiment.snapshots,
        layout=layout,
        metrics=metrics,
        components=min(experiment.record.sketch, layout.parameters),
        parameters=layout.parameters,
        batch_size=stream.batch_size,
        codec=experiment.record.codec,
        snapshots_per_segment=segment_length(layout),
    )
    check_metric_names(schema)
    return schema
