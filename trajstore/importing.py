"""Import: checkpoints that are there already become an experiment.

What can be known without reading numbers is looked at first, of all files: their names, whether they can be read
without running anything, and whether they hold the same tensors. Only then something is written. Steps that are stored
already must be what the files hold; so an import that was stopped goes on when it is called again, or only ends what it
had not noted, and one that is called with more files adds them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import zarr
from torch import Tensor

from trajstore.checkpoints import Structure, difference, read, same_numbers, shared, structure
from trajstore.configuration import differences
from trajstore.errors import ConfigurationError, ConflictError, WriteError
from trajstore.experiment import check_name
from trajstore.exporting import reading
from trajstore.filenames import Pattern, Slab, Source, told_apart
from trajstore.fills import noted
from trajstore.measures import MEASURES
from trajstore.provenance import provenance
from trajstore.storage.codecs import CODECS, Codec
from trajstore.storage.declaring import declare, grow
from trajstore.storage.layout import Entry, Layout, Role
from trajstore.storage.pipeline import Pipeline
from trajstore.storage.place import Durability
from trajstore.storage.schema import Schema, segment_length
from trajstore.storage.segment import Observation, Snapshot, array_of
from trajstore.storage.sketch import Sketch
from trajstore.storage.writer import Ledger, SlabWriter
from trajstore.store import Store, StoredExperiment, check_place, open_root, refuse_foreign, standing

__all__ = ["Import", "Precision", "carry_out", "import_checkpoints", "prepare"]

Precision = Literal["float32", "float16", "bfloat16"]
"""To what the numbers of a stored state may be rounded."""
Progress = Callable[[int, str], None]
"""Called with files read since the last call, and what they are imported into."""

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
"""A state dict does not tell buffers from parameters: these are what the floats among them are usually called."""
_COMPONENTS = 128


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


def import_checkpoints(
    store: str | Path,
    name: str,
    files: str | Path | Sequence[str | Path],
    pattern: str,
    *,
    order: str | None = None,
    seed: int | None = None,
    key: str | None = None,
    snapshot_dtype: Precision | None = None,
    codec: Codec = "pcodec",
    durability: Durability = "segment",
    progress: Progress | None = None,
) -> StoredExperiment:
    """Make an experiment of checkpoints, or add them to one that was made so.

    `pattern` says what the ends of their paths mean, as in ``seed{seed}/step{step}.pt``: ``{seed}`` and ``{step}`` are
    numbers, ``{order}`` is a word, ``*`` stands for anything within a name. An `order` ("forward") or a `seed` is given
    where the pattern has none. `key` is where in a file the state dict is (``trainer.model``), `snapshot_dtype` to what
    precision states are stored; norms, distances and sketches are those of the numbers in the files.
    """
    prepared = prepare(
        store, name, files, pattern, order=order, seed=seed, key=key, snapshot_dtype=snapshot_dtype, codec=codec
    )
    return carry_out(prepared, durability=durability, progress=progress)


def prepare(
    store: str | Path,
    name: str,
    files: str | Path | Sequence[str | Path],
    pattern: str,
    *,
    order: str | None = None,
    seed: int | None = None,
    key: str | None = None,
    snapshot_dtype: Precision | None = None,
    codec: Codec = "pcodec",
) -> Import:
    """Look at all files and at the store, and refuse what does not fit. Nothing is written."""
    check_name(name)
    for what, value, known in (("snapshot_dtype", snapshot_dtype, get_args(Precision)), ("codec", codec, CODECS)):
        if value is not None and value not in known:
            raise ConfigurationError(f"{what} is {value!r}; choose one of {', '.join(known)}")
    given = [files] if isinstance(files, str | Path) else files
    sources = told_apart([Path(file) for file in given], Pattern(pattern), order, seed)
    layout, keys = _looked_through([one for slab in sources.values() for one in slab.values()], key)
    table: dict[str, Any] = {
        "name": name,
        "problem": {"family": "import"},
        "operator": {"family": "unknown"},
        "init_seed": None,
        "stops": [],
        "record": {"dtype": snapshot_dtype, "sketch": _COMPONENTS, "codec": codec},
    }
    place = Store(store)
    check_place(place)
    asked = Import(place, table, sources, {slab: list(those) for slab, those in sources.items()}, layout,
                   pattern, key, keys)  # fmt: skip
    refuse_foreign(place, name)
    stored = _stored(asked)
    if stored is None:
        return asked
    _schema(asked, stored)
    _refuse_untied(asked, stored.schema.layout)
    ledgers = _ledgers(asked, stored)
    missing = {
        slab: _missing(asked, ledgers[slab], slab) if slab in ledgers else list(those)
        for slab, those in sources.items()
    }
    return replace(asked, missing=missing)


def carry_out(
    asked: Import, *, durability: Durability = "segment", progress: Progress | None = None
) -> StoredExperiment:
    """Do an import: first compare what is stored already, then write what is not."""
    stored = _stored(asked)
    for slab, ledger in {} if stored is None else _ledgers(asked, stored).items():
        missing = set(asked.missing[slab])
        there = [step for step in asked.sources[slab] if step not in missing]
        _refuse_other_numbers(asked, ledger, slab, there, progress)
    begun = [slab for slab in asked.sources if stored is not None and _unnoted(asked, stored, slab) is not None]
    if not begun and not any(asked.missing.values()):
        return asked.store[asked.name]
    asked.store.place.make()
    with asked.store.declaring():
        root = open_root(asked.store.place, durability)
        refuse_foreign(asked.store, asked.name)
        stored = _stored(asked)
        schema = _schema(asked, stored)
        sizes = {"steps": schema.steps, "orders": list(schema.orders), "seeds": list(schema.seeds)}
        if stored is None:
            group = declare(root, asked.name, schema, {**asked.table, **sizes}, [])
        else:
            group = zarr.open_group(root.store, path=asked.name, mode="r+", zarr_format=3)
            if schema != stored.schema:
                grow(group, schema, {**asked.table, **sizes}, [])
    sketch = Sketch(schema.parameters, _COMPONENTS, schema.sketch_seed)
    for slab in [slab for slab, steps in asked.missing.items() if steps or slab in begun]:
        _fill(asked, StoredExperiment(asked.store, group), slab, sketch, progress)
    return asked.store[asked.name]


def _looked_through(sources: Sequence[Source], key: str | None) -> tuple[Layout, tuple[str, ...]]:
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
            raise ConfigurationError(f"{source.file}: {told}; the checkpoints of an experiment have the same tensors")
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
        raise ConfigurationError(f"{file} holds no parameters: no floats but what batch normalisation counts")
    return layout


def _stored(asked: Import) -> StoredExperiment | None:
    """Return the experiment as it is stored, if it is."""
    there = standing(asked.store.place, asked.name) in ("experiment", "damaged")
    return Store(asked.store.place)[asked.name] if there else None


def _schema(asked: Import, stored: StoredExperiment | None) -> Schema:
    """Return the schema that holds what is stored and what is asked for; refuse what cannot be added."""
    layout, record = asked.layout, asked.table["record"]
    if stored is None:
        before = Schema(
            orders=(), seeds=(), init_seeds=(), data_seeds=(), steps=0, snapshots=(0,), layout=layout,
            metrics=dict.fromkeys(MEASURES), components=min(_COMPONENTS, layout.parameters),
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
            "in it; import everything anew under another name"
        )
    return replace(
        before,
        orders=tuple(dict.fromkeys((*before.orders, *(order for order, _ in asked.sources)))),
        seeds=seeds, init_seeds=seeds, data_seeds=seeds, steps=snapshots[-1], snapshots=snapshots,
    )  # fmt: skip


def _refuse_other_kind(asked: Import, stored: StoredExperiment) -> None:
    """Refuse an experiment that was made otherwise, or of other tensors."""
    if stored.schema.made_by != "import":
        raise ConflictError(f"experiment {asked.name!r} is stored already and was not imported; choose another name")
    sizes = ("steps", "orders", "seeds")
    if found := differences({k: v for k, v in stored.config.items() if k not in sizes}, asked.table):
        raise ConflictError(
            f"experiment {asked.name!r} is stored already and differs in {'; '.join(found)} (stored / asked for); "
            "choose another name"
        )
    first = next(iter(next(iter(asked.sources.values())).values())).file
    if told := difference(_structure_of(asked.layout), _structure_of(stored.schema.layout), "what is stored"):
        raise ConflictError(f"experiment {asked.name!r}: {first} does not fit: {told}; choose another name")


def _refuse_untied(asked: Import, layout: Layout) -> None:
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


def _structure_of(layout: Layout) -> Structure:
    own = {entry.name: (entry.shape, entry.dtype) for entry in layout.entries}
    return own | {name: own[first] for name, first in layout.tied.items()}


def _ledgers(asked: Import, stored: StoredExperiment) -> dict[Slab, Ledger]:
    """Open what says which steps are stored, of the slabs that are declared."""
    schema = stored.schema
    return {
        (order, seed): Ledger(stored.group, schema, schema.orders.index(order), schema.seeds.index(seed))
        for order, seed in asked.sources
        if order in schema.orders and seed in schema.seeds
    }


def _missing(asked: Import, ledger: Ledger, slab: Slab) -> list[int]:
    """Return the steps that are not stored yet: those after the last that is, and what a repair took out."""
    schema, last, steps = ledger.schema, ledger.last_step, asked.sources[slab]
    missing = [step for step in steps if step > schema.steps or not ledger.committed[step]]
    for step in missing:
        if step < last and ledger.records[schema.segment_of(step), 0] >= 0:
            raise ConflictError(
                f"{ledger.name}: step {step} ({steps[step].file}) comes before step {last}, which is stored already, "
                "and steps are only added after it; import everything anew under another name"
            )
    if missing and asked.table["record"]["dtype"] is not None:
        first, before = _measured_against(ledger, missing)
        if rounded := sorted({first, *before.values()} - {*steps}):
            raise ConflictError(
                f"{ledger.name}: step {missing[0]} is measured against step {rounded[0]}, which is stored rounded; "
                f"give the file of step {rounded[0]}, too"
            )
    return missing


def _measured_against(ledger: Ledger, missing: Sequence[int]) -> tuple[int, dict[int, int]]:
    """Return the first step that a slab will have, and for each missing one the step before it."""
    steps = sorted({*np.flatnonzero(ledger.committed).tolist(), *missing})
    wanted = set(missing)
    return steps[0], {step: before for before, step in pairwise(steps) if step in wanted}


def _unnoted(asked: Import, stored: StoredExperiment, slab: Slab) -> list[int] | None:
    """Return the steps whose files an import that was stopped did not note; None if each came to its end, with all."""
    fills = [fill for fill in stored.attributes["fills"] if [*slab] in fill["slabs"]]
    named = [pair for fill in fills for pair in fill["files"].items()]
    noted = {name for name, digest in named if digest is not None}
    ended = not fills or fills[-1]["ended"] is not None
    lost = {name for name, _ in named} - noted
    steps = []
    for step, source in asked.sources[slab].items():
        name = _plain(source.name)
        if name in lost or not (ended or name in noted):
            steps.append(step)
    return None if ended and not steps else steps


def _refuse_other_numbers(
    asked: Import, ledger: Ledger, slab: Slab, steps: Sequence[int], progress: Progress | None
) -> None:
    """Compare steps that are stored with their files, bit by bit."""
    states = _States(ledger)
    for step in steps:
        source = asked.sources[slab][step]
        _, own = _flat(asked, source, ledger)
        if any(a.tobytes() != b.tobytes() for a, b in zip(own, states[step], strict=True)):
            raise ConflictError(
                f"{ledger.name}: step {step} is stored already, and {source.file} holds other numbers; "
                "what is stored never changes: choose another name"
            )
        if progress is not None:
            progress(1, f"{ledger.name}: step {step} is stored already")


class _States:
    """The stored states of a slab, read a segment at a time."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._number = ledger, -1

    def __getitem__(self, step: int) -> Snapshot:
        ledger, schema = self._ledger, self._ledger.schema
        number = schema.segment_of(step)
        places = schema.snapshots_of(number)
        if number != self._number:
            first = number * schema.snapshots_per_segment
            at = (*ledger.corner, slice(None), slice(first, first + len(places)))
            with reading(f"{ledger.name}, step {step}"):
                self._params, self._counters = (
                    np.asarray(array_of(ledger.group, name)[at]) for name in ("params", "counters")
                )
            self._number = number
        place = places.index(step)
        return self._params[:, place], self._counters[:, place]


def _flat(asked: Import, source: Source, ledger: Ledger) -> tuple[Tensor, Snapshot]:
    """Read a file as its parameters in one vector, exact, and its state as it is stored."""
    layout, rounded = ledger.schema.layout, asked.table["record"]["dtype"]
    tensors, _ = read(source.file, asked.key)
    if told := difference(structure(tensors), _structure_of(layout), f"experiment {asked.name!r}"):
        raise ConfigurationError(f"{source.file}: {told}; it was changed, or does not belong to these")
    _refuse_other_than_tied(asked, source, tensors, layout)
    floats = torch.float64 if layout.dtype == np.float64 else torch.float32
    params = torch.empty(layout.size("params"), dtype=floats)
    counters = torch.empty(layout.size("counters"), dtype=torch.int64)
    for entry in layout.entries:
        vector = params if entry.array == "params" else counters
        vector[entry.offset : entry.offset + entry.size].copy_(tensors[entry.name].reshape(-1))
    kept = params if rounded is None else params.to(getattr(torch, rounded)).to(floats)
    return params[: layout.parameters], (kept.numpy(), counters.numpy())


def _fill(asked: Import, stored: StoredExperiment, slab: Slab, sketch: Sketch, progress: Progress | None) -> None:
    """Write the missing steps of one slab; note the files of these, and those that an earlier import did not note."""
    order, seed = slab
    with stored.locked(order, seed):
        schema, sources = stored.schema, asked.sources[slab]
        ledger = Ledger(stored.group, schema, schema.orders.index(order), schema.seeds.index(seed))
        missing = _missing(asked, ledger, slab)
        # Somebody may have imported some of them since they were looked at.
        _refuse_other_numbers(asked, ledger, slab, sorted({*asked.missing[slab]} - {*missing}), progress)
        unnoted = _unnoted(asked, stored, slab)
        if not missing and unnoted is None:
            return
        steps = sorted({*missing, *(unnoted or ())})
        files: dict[str, str | None] = {_plain(sources[step].name): None for step in steps}
        where = {"engine": "import", "pattern": asked.pattern, "keys": list(asked.keys), "files": files}
        with noted(stored, [slab], {**where, **provenance(torch.device("cpu"))}, when_stopped=True):
            digests = {step: _digest(sources[step].file) for step in steps if step not in missing}
            try:
                if missing:
                    _write(asked, ledger, slab, missing, digests, sketch, progress)
            except (ConfigurationError, ConflictError) as error:  # refusals, but by now something is written
                raise WriteError(f"{error}; what was imported before stays, and importing again goes on") from None
            finally:  # of a file whose step is not there it would say nothing
                files |= {_plain(sources[n].name): digest for n, digest in digests.items() if ledger.committed[n]}


def _write(
    asked: Import,
    ledger: Ledger,
    slab: Slab,
    missing: Sequence[int],
    digests: dict[int, str],
    sketch: Sketch,
    progress: Progress | None,
) -> None:
    """Write the missing steps of one slab, and tell the digests of their files."""
    with _writing(ledger) as (writer, measuring):
        for one in _read_in_turn(asked, ledger, slab, missing, digests):
            measuring.submit([], partial(_append, writer, sketch, one))
            if progress is not None:
                progress(1, f"{ledger.name}: step {one.step}")


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return f"sha256:{hashlib.file_digest(opened, 'sha256').hexdigest()}"


def _plain(name: str) -> str:
    """Return a file name as text that can be stored, whatever bytes it has."""
    return os.fsencode(name).decode(errors="replace")


@contextmanager
def _writing(ledger: Ledger) -> Iterator[tuple[SlabWriter, Pipeline]]:
    """Give a writer, and a thread to measure and append in; whatever happens, what is complete is committed.

    An interruption reaches the main thread only, so no step is appended by half.
    """
    writing, measuring = Pipeline(depth=2), Pipeline(threads=1, depth=1)  # what waits in them is large
    writer = SlabWriter(ledger, writing)

    def finish() -> None:
        measuring.drain()
        writer.commit()
        writing.drain()

    try:
        yield writer, measuring
        finish()
    except BaseException:
        with suppress(Exception):  # the first error is the one that matters
            finish()
        raise
    finally:
        for pipeline in (measuring, writing):
            with suppress(Exception):
                pipeline.close()


class _Read(NamedTuple):
    """A checkpoint, and what it is measured against."""

    step: int
    weights: Tensor
    """All parameters in one vector, exact."""
    state: Snapshot
    start: Tensor
    before: Tensor | None


def _read_in_turn(
    asked: Import, ledger: Ledger, slab: Slab, missing: Sequence[int], digests: dict[int, str]
) -> Iterator[_Read]:
    """Read the missing steps of a slab, and tell the digests of their files."""
    sources, weights_of = asked.sources[slab], _Weights(asked, ledger, slab)
    first, steps_before = _measured_against(ledger, missing)
    start = None if first == missing[0] else weights_of(first)
    last, before = first, start
    for step in missing:
        if step != first and steps_before[step] != last:
            before = weights_of(steps_before[step])
        digests[step] = _digest(sources[step].file)
        weights, state = _flat(asked, sources[step], ledger)
        start = weights if start is None else start
        yield _Read(step, weights, state, start, before)
        last, before = step, weights


class _Weights:
    """The parameters at steps that are stored already, exact: from their files, unless only what is stored is there."""

    def __init__(self, asked: Import, ledger: Ledger, slab: Slab) -> None:
        self._asked, self._ledger, self._sources, self._states = asked, ledger, asked.sources[slab], _States(ledger)

    def __call__(self, step: int) -> Tensor:
        if step in self._sources:
            return _flat(self._asked, self._sources[step], self._ledger)[0]
        vector = self._states[step][0][: self._ledger.schema.layout.parameters]
        return torch.from_numpy(vector.copy())


def _append(writer: SlabWriter, sketch: Sketch, read: _Read) -> None:
    """Measure a checkpoint and append it, in the measuring thread."""

    def away_from(other: Tensor) -> Tensor:
        return read.weights.to(torch.float64, copy=True).sub_(other)  # one such vector at a time: they are large

    metrics = {"param_norm": torch.linalg.vector_norm(read.weights, dtype=torch.float64).item()}
    if read.before is not None:
        metrics["step_distance"] = away_from(read.before).norm().item()
    difference = away_from(read.start)
    metrics["start_distance"] = difference.norm().item()
    writer.append(Observation(read.step, 0, metrics, sketch(difference.numpy()), read.state))
