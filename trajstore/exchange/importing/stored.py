"""What is stored already: which steps are, and whether the files hold what they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from trajstore.errors import ConfigurationError, ConflictError, damage_told
from trajstore.exchange.importing.checkpoints import difference, read, same_numbers, structure
from trajstore.exchange.importing.pattern import Slab, Source
from trajstore.exchange.importing.request import Import, structure_of
from trajstore.storage.format.layout import Layout
from trajstore.storage.writing.segment import Snapshot
from trajstore.storage.writing.slab_writer import Ledger
from trajstore.store import StoredExperiment

__all__ = [
    "Progress",
    "States",
    "flat",
    "ledgers_of",
    "measured_against",
    "missing_steps",
    "refuse_other_numbers",
    "refuse_untied",
]

Progress = Callable[[int, str], None]
"""Called with files read since the last call, and what they are imported into."""


def ledgers_of(asked: Import, stored: StoredExperiment) -> dict[Slab, Ledger]:
    """Open what says which steps are stored, of the slabs that are declared."""
    schema = stored.schema
    return {
        (order, seed): Ledger(stored.group, schema, schema.orders.index(order), schema.seeds.index(seed))
        for order, seed in asked.sources
        if order in schema.orders and seed in schema.seeds
    }


def missing_steps(asked: Import, ledger: Ledger, slab: Slab) -> list[int]:
    """Return the steps that are not stored yet: those after the last that is, and what a repair took out."""
    schema, last, steps = ledger.schema, ledger.last_step, asked.sources[slab]
    missing = [step for step in steps if step > schema.steps or not ledger.committed[step]]
    for step in missing:
        if step < last and ledger.records[schema.segment_of(step), 0] >= 0:
            raise ConflictError(
                f"{ledger.name}: step {step} ({steps[step].file}) comes before step {last}, which is stored already; "
                "steps can only be added after it: import everything again under another name"
            )
    if missing and asked.table["record"]["dtype"] is not None:
        first, before = measured_against(ledger, missing)
        if rounded := sorted({first, *before.values()} - {*steps}):
            raise ConflictError(
                f"{ledger.name}: step {missing[0]} is measured against step {rounded[0]}, which is stored rounded; "
                f"give the file of step {rounded[0]}, too"
            )
    return missing


def measured_against(ledger: Ledger, missing: Sequence[int]) -> tuple[int, dict[int, int]]:
    """Return the first step that a slab will have, and for each missing one the step before it."""
    steps = sorted({*np.flatnonzero(ledger.committed).tolist(), *missing})
    wanted = set(missing)
    return steps[0], {step: before for before, step in pairwise(steps) if step in wanted}


def refuse_untied(asked: Import, layout: Layout) -> None:
    """Refuse files in which tensors differ that are stored as one."""
    tied = asked.layout.tied
    if all(tied.get(name, name) == tied.get(first, first) for name, first in layout.tied.items()):
        return
    for slab in asked.sources.values():
        for source in slab.values():
            _refuse_other_than_tied(asked, source, read(source.file, asked.key).tensors, layout)


def _refuse_other_than_tied(asked: Import, source: Source, tensors: Mapping[str, Tensor], layout: Layout) -> None:
    for name, first in layout.tied.items():
        if not same_numbers(tensors[name], tensors[first]):
            raise ConflictError(
                f"{source.file}: tensors {name!r} and {first!r} are one in experiment {asked.name!r}, and differ here; "
                "choose another name"
            )


def refuse_other_numbers(
    asked: Import, ledger: Ledger, slab: Slab, steps: Sequence[int], progress: Progress | None
) -> None:
    """Compare steps that are stored with their files, bit by bit."""
    states = States(ledger)
    for step in steps:
        source = asked.sources[slab][step]
        _, own = flat(asked, source, ledger)
        if any(a.tobytes() != b.tobytes() for a, b in zip(own, states[step], strict=True)):
            raise ConflictError(
                f"{ledger.name}: step {step} is stored already, and {source.file} holds other numbers; "
                "what is stored never changes: choose another name"
            )
        if progress is not None:
            progress(1, f"{ledger.name}: step {step} is stored already")


class States:
    """The stored states of a slab, read a segment at a time."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._number = ledger, -1

    def __getitem__(self, step: int) -> Snapshot:
        ledger, schema = self._ledger, self._ledger.schema
        number = schema.segment_of(step)
        if number != self._number:
            with damage_told(f"{ledger.name}, step {step}"):
                self._params, self._counters = ledger.states(number)
            self._number = number
        place = schema.snapshots_of(number).index(step)
        return self._params[:, place], self._counters[:, place]


def flat(asked: Import, source: Source, ledger: Ledger) -> tuple[Tensor, Snapshot]:
    """Read a file as its parameters in one vector, exact, and its state as it is stored."""
    layout, rounded = ledger.schema.layout, asked.table["record"]["dtype"]
    tensors, _ = read(source.file, asked.key)
    if told := difference(structure(tensors), structure_of(layout), f"experiment {asked.name!r}"):
        raise ConfigurationError(f"{source.file}: {told}; it was changed, or does not belong to this series")
    _refuse_other_than_tied(asked, source, tensors, layout)
    floats = torch.float64 if layout.dtype == np.float64 else torch.float32
    params = torch.empty(layout.size("params"), dtype=floats)
    counters = torch.empty(layout.size("counters"), dtype=torch.int64)
    for entry in layout.entries:
        vector = params if entry.array == "params" else counters
        vector[entry.offset : entry.offset + entry.size].copy_(tensors[entry.name].reshape(-1))
    kept = params if rounded is None else params.to(getattr(torch, rounded)).to(floats)
    return params[: layout.parameters], (kept.numpy(), counters.numpy())
