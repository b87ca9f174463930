"""What is asked for: which checkpoints, what they hold, and the schema that it all goes into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trajstore.errors import ConfigurationError, ConflictError
from trajstore.exchange.importing.checkpoints import Structure, difference, read, shared, structure
from trajstore.exchange.importing.pattern import Slab, Source
from trajstore.experiment.configuration import differences, refuse_differences
from trajstore.reading.handles import standing
from trajstore.storage.format.layout import Entry, Layout, Role
from trajstore.storage.format.metrics import MEASURES
from trajstore.storage.format.schema import Schema, segment_length
from trajstore.store import Store, StoredExperiment

__all__ = ["COMPONENTS", "Import", "looked_through", "schema_of", "stored_as", "structure_of"]

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
"""A state dict does not tell buffers from parameters: these are what the floats among them are usually called."""
COMPONENTS = 128
"""Of the sketch."""


@dataclass(frozen=True)
class Import:
    """What is to be imported, as far as it can be known without reading numbers."""

    store: Store
    table: dict[str, Any]
    """The experiment's configuration, but for its sizes."""
    sources: Mapping[Slab, Mapping[int, Source]]
    """By step, increasing."""
    missing: Mapping[Slab, Sequence[int]]
    """The steps that are not stored yet."""
    layout: Layout
    pattern: str
    key: str | None
    keys: tuple[str, ...]
    """Where the state dicts were found, in files that hold other things, too."""

    @property
    def name(self) -> str:
        """The experiment's."""
        return str(self.table["name"])


def looked_through(sources: Sequence[Source], key: str | None) -> tuple[Layout, tuple[str, ...]]:
    """Refuse files that cannot be read or do not hold the same tensors; return how these will lie, and under what."""
    first = sources[0].file
    keys: dict[str, None] = {}
    common: Structure = {}
    ties: dict[str, str] = {}
    for source in sources:
        tensors, found = read(source.file, key)
        own = structure(tensors)
        if source.file == first:
            common, ties = own, shared(tensors)
            _layout(common, ties, first)
        elif told := difference(own, common, str(first)):
            raise ConfigurationError(
                f"{source.file}: {told}; all checkpoints of an experiment must have the same tensors"
            )
        else:
            ties = _both(ties, shared(tensors))
        if found is not None:
            keys[found] = None
    return _layout(common, ties, first), tuple(keys)


def _both(one: Mapping[str, str], other: Mapping[str, str]) -> dict[str, str]:
    """Return which tensors are tied in both of two files."""
    first: dict[tuple[str, str], str] = {}
    return {name: first.setdefault((one[name], other[name]), name) for name in one}


def _layout(tensors: Structure, ties: Mapping[str, str], file: Path) -> Layout:
    """Lay out tensors, parameters first, tied ones once."""
    roles: dict[str, Role] = {
        name: "buffer" if name.endswith(_BUFFERS) or not getattr(torch, dtype).is_floating_point else "parameter"
        for name, (_, dtype) in tensors.items()
        if ties[name] == name
    }
    names = sorted(roles, key=lambda name: roles[name] == "buffer")  # stable: otherwise in the file's order
    try:
        layout = Layout.of([Entry(name, roles[name], *tensors[name]) for name in names],
                           {name: one for name, one in ties.items() if name != one})  # fmt: skip
    except ConfigurationError as error:
        raise ConfigurationError(f"{file}: {error}") from None
    if not layout.parameters:
        raise ConfigurationError(f"{file} holds no parameters, at most the statistics of batch normalisation")
    return layout


def stored_as(asked: Import) -> StoredExperiment | None:
    """Return the experiment as it is stored, if it is."""
    there = standing(asked.store.place, asked.name) in ("experiment", "damaged")
    return Store(asked.store.place)[asked.name] if there else None


def schema_of(asked: Import, stored: StoredExperiment | None) -> Schema:
    """Return the schema that holds what is stored and what is asked for; refuse what cannot be added."""
    layout, record = asked.layout, asked.table["record"]
    if stored is None:
        before = Schema(
            orders=(), seeds=(), init_seeds=(), data_seeds=(), steps=0, snapshots=(0,), layout=layout,
            metrics=dict.fromkeys(MEASURES), components=min(COMPONENTS, layout.parameters),
            parameters=layout.parameters, batch_size=0, codec=record["codec"],
            snapshots_per_segment=segment_length(layout), made_by="import",
        )  # fmt: skip
    else:
        before = stored.schema
        _refuse_other_kind(asked, stored)
    seeds = tuple(dict.fromkeys((*before.seeds, *(seed for _, seed in asked.sources))))
    # Segments are cut from the steps that can have a state, and must begin with 0: it has a place, though no state.
    snapshots = tuple(sorted({*before.snapshots, *(step for slab in asked.sources.values() for step in slab)}))
    if stored is not None and snapshots[: len(before.snapshots)] != before.snapshots:
        step = min(set(snapshots[: len(before.snapshots)]) - set(before.snapshots))
        raise ConflictError(
            f"experiment {asked.name!r} was imported to step {before.steps}, and step {step} before that has no place "
            "in it; import everything again under another name"
        )
    return replace(
        before,
        orders=tuple(dict.fromkeys((*before.orders, *(order for order, _ in asked.sources)))),
        seeds=seeds, init_seeds=seeds, data_seeds=seeds, steps=snapshots[-1], snapshots=snapshots,
    )  # fmt: skip


def _refuse_other_kind(asked: Import, stored: StoredExperiment) -> None:
    """Refuse an experiment that was made otherwise, or of other tensors."""
    if stored.schema.made_by != "import":
        raise ConflictError(f"experiment {asked.name!r} exists already and was not imported; choose another name")
    sizes = ("steps", "orders", "seeds")
    refuse_differences(asked.name, differences({k: v for k, v in stored.config.items() if k not in sizes}, asked.table))
    first = next(iter(next(iter(asked.sources.values())).values())).file
    if told := difference(structure_of(asked.layout), structure_of(stored.schema.layout), "what is stored"):
        raise ConflictError(f"experiment {asked.name!r}: {first} does not fit: {told}; choose another name")


def structure_of(layout: Layout) -> Structure:
    """Return what a state dict of a layout looks like, tied tensors each by its name."""
    own = {entry.name: (entry.shape, entry.dtype) for entry in layout.entries}
    return own | {name: own[first] for name, first in layout.tied.items()}
