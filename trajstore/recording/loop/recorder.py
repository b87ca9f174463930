"""The recorder: three lines in any training loop.

::

    with ts.record("runs.zarr", "mine", model, seed=0) as rec:
        for x, y in batches:
            ...
            rec.step(loss=loss.item())

What a step looks like is copied when `step` is called; norms, sketch, compression and writing happen in threads of the
recorder's own. Whatever goes wrong there is raised at the next call.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trajstore.errors import ConfigurationError, ConflictError, OrderError, ResumedWarning, damage_told, slab_named
from trajstore.experiment.configuration import differences, refuse_differences
from trajstore.experiment.experiment import check_name
from trajstore.experiment.steps import Policy, policy_of
from trajstore.reading.handles import (
    DECLARED,
    check_place,
    check_portable,
    open_root,
    refuse_alike,
    refuse_foreign,
    refuse_new,
    standing,
)
from trajstore.recording import resume_state
from trajstore.recording.fills import noted
from trajstore.recording.loop.watched import Watched, random_state
from trajstore.recording.provenance import provenance
from trajstore.storage.format.checking import is_new_label
from trajstore.storage.format.codecs import Codec
from trajstore.storage.format.layout import Layout
from trajstore.storage.format.metrics import MEASURES
from trajstore.storage.format.schema import Schema, check_metric_names, segment_length
from trajstore.storage.format.sketch import Sketch
from trajstore.storage.packing import open_to_write
from trajstore.storage.places.place import Durability, slab_folder, slab_lock
from trajstore.storage.writing.declaring import declare, grow
from trajstore.storage.writing.late_metrics import LateSeries
from trajstore.storage.writing.pipeline import Pipeline
from trajstore.storage.writing.segment import Observation
from trajstore.storage.writing.slab_writer import COMMIT_SECONDS, COMMIT_STEPS, Ledger, SlabWriter
from trajstore.store import Store, StoredExperiment

__all__ = ["Recorder", "record"]

_AHEAD = 8
"""So many steps may wait to be observed."""
_GROWTH = 4_096
_PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def record(
    path: str | Path,
    name: str,
    model: nn.Module,
    *,
    seed: int = 0,
    order: str = "forward",
    optimizer: Optimizer | None = None,
    also: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    steps: int | None = None,
    snapshots: Policy | int | None = None,
    layers: str | Sequence[str] | None = None,
    dtype: str | None = None,
    optimizer_state: bool = False,
    sketch: int = 128,
    codec: Codec = "pcodec",
    durability: Durability = "segment",
    resume: bool = False,
) -> Recorder:
    """Record what becomes of a model: a context manager, whose `step` is called after each step of the optimizer.

    The model's state is step 0. `snapshots` says at which steps the state is stored (every step, unless you choose
    `every(k)`, `log_then_every(k)`, `window(a, b)` or a combination by ``|`` and ``&``), `layers` which tensors, as
    globs of their names, `dtype` to what precision, `optimizer_state` whether with the optimizer's memory. Norms,
    distances, and a sketch of all parameters are recorded at every step. `config` holds hyperparameters to find the
    run by. `steps` is how many there will be, if that is known; a recording can be longer. Without it, the recording
    ends wherever the loop does.

    With ``resume=True`` a slab (an order and a seed of an experiment) that was begun goes on: the model, the
    `optimizer`, whatever `also` names (a scheduler, say) and the random generators are put back to where they were at
    `last`. To give the batches in the same order again is the loop's part.
    """
    globs = None if layers is None else [layers] if isinstance(layers, str) else list(layers)
    if dtype is not None and dtype not in _PRECISIONS:
        raise ConfigurationError(f"dtype is {dtype!r}; choose one of {', '.join(_PRECISIONS)}, or leave it out")
    if sketch < 1 or sketch & (sketch - 1):
        raise ConfigurationError(f"sketch is {sketch}; it must be a power of two")
    check_name(name)
    if not is_new_label(order):
        raise OrderError(f"order {order!r}: use up to 100 characters without spaces and commas, as in 'forward'")
    if not 0 <= seed < 2**63:
        raise ConfigurationError(f"seed {seed} must be a whole number from 0 to 2^63 − 1")
    watched = Watched(
        model, optimizer, also or {}, layers=globs, memory=optimizer_state,
        precision=None if dtype is None else _PRECISIONS[dtype],
    )  # fmt: skip
    store = Store(path)
    # It says that a loop made this, and what cannot be told of it; what was begun with another goes on as it is.
    if "family" in (config or {}) and standing(store.place, name) != "experiment":
        raise ConfigurationError("config: 'family' is how trajstore marks a loop; give it another name")
    policy = policy_of(snapshots)
    what = {"snapshots": str(policy), "layers": globs, "dtype": dtype, "optimizer_state": optimizer_state}
    table: dict[str, Any] = {
        "name": name,
        "problem": {"family": "loop", "model": type(model).__qualname__, **_plain("config", config or {})},
        "operator": _operator(optimizer),
        "init_seed": None,
        "stops": [],
        "record": {**what, "sketch": sketch, "codec": codec},
    }
    return Recorder(store, table, watched, policy, order, seed, steps, durability, resume)


@dataclass
class _Step:
    """What was copied of a step."""

    number: int
    weights: Tensor
    state: tuple[Tensor, Tensor] | None
    metrics: dict[str, float]
    resume: bytes | None


class Recorder:
    """Records one slab: the steps of one order and seed. Made by `record`."""

    last = -1
    """The last step that was recorded."""
    resumed = False
    """Whether it goes on from an earlier recording."""
    closed = False

    def __init__(
        self,
        store: Store,
        table: dict[str, Any],
        watched: Watched,
        policy: Policy,
        order: str,
        seed: int,
        steps: int | None,
        durability: Durability,
        resume: bool,
    ) -> None:
        self._store, self._table, self._watched, self._policy = store, table, watched, policy
        self._order, self._seed, self._asked, self._durability, self._resume = order, seed, steps, durability, resume
        self._held = ExitStack()
        self._begun = False
        self._late: dict[str, dict[int, float]] = {}
        self._pending: _Step | None = None

    def __enter__(self) -> Recorder:
        """Begin: declare what is to be recorded, and record θ₀, or go on."""
        if self._begun:
            raise ConflictError("this recorder has been used; make another with ts.record")
        self._begun = True
        try:
            self._begin()
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Commit everything that was recorded, also when the loop failed."""
        if self.closed:
            return
        self.closed = True
        try:
            self._flush()
        except BaseException as failure:
            if kind is None:  # otherwise the loop's own error is the one that matters
                kind, error, trace = type(failure), failure, failure.__traceback__
                raise
        finally:
            again: BaseException | None = None
            try:
                for pipeline in (self._observing, self._writing):
                    with suppress(Exception):
                        pipeline.close()
            except BaseException as failure:  # interrupted once more: something may still be on its way
                again, kind, error, trace = failure, type(failure), failure, failure.__traceback__
            with suppress(BaseException) if kind is not None else nullcontext():
                self._held.__exit__(kind, error, trace)
            if again is not None:
                raise again

    def close(self) -> None:
        """End the recording; leaving the `with` block does it."""
        self.__exit__(None, None, None)

    def step(self, step: int | None = None, *, batch: Any = None, **metrics: Any) -> None:  # noqa: ANN401
        """Record the model as it is now, after a step of its optimizer, with any scalars.

        Steps count by one unless a number is given. `batch` is the batch of this step, or what tells it from others
        (tensors or numbers, its indices for example); its hash is recorded as the metric `batch_id`.
        """
        self._check()
        number = self.last + 1 if step is None else step
        if number <= self.last:
            raise ConflictError(f"{self._named}: step {number} comes after step {self.last}; steps must increase")
        values = self._scalars(metrics)
        if batch is not None:
            values["batch_id"] = _batch_id(batch)
        self._see(number, values)

    def log(self, step: int | None = None, **metrics: Any) -> None:  # noqa: ANN401
        """Add scalars to the last recorded step, or to any step before it."""
        self._check()
        number = self.last if step is None else step
        if not 0 <= number <= self.last:
            raise ConflictError(f"{self._named}: step {number} is not recorded yet, so nothing can be logged for it")
        values = self._scalars(metrics)
        with_step = {k: v for k, v in values.items() if k not in self._ledger.schema.late}
        if self._pending is not None and number == self._pending.number:
            self._pending.metrics |= with_step
        else:
            self._comes_late(number, with_step)
        self._comes_late(number, {k: v for k, v in values.items() if k not in with_step})

    def _scalars(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Return scalars as numbers; refuse names that could not be stored before anything depends on them."""
        schema = self._ledger.schema
        if taken := [name for name in metrics if name in MEASURES]:
            raise ConfigurationError(
                f"metric {taken[0]!r}: every experiment has one of that name ({MEASURES[taken[0]]})"
            )
        begun = {**schema.metrics, **dict.fromkeys(self._pending.metrics if self._pending else ())}
        known = {*begun, *schema.late, *self._late}
        if new := [name for name in metrics if name not in known]:
            check_metric_names(replace(schema, metrics={**begun, **dict.fromkeys(new)}))
            for name in new:
                check_portable("metric", name)
        return {name: _scalar(name, value) for name, value in metrics.items()}

    def _comes_late(self, number: int, metrics: dict[str, float]) -> None:
        """Keep scalars of an earlier step, until they are written with the others."""
        for name, value in metrics.items():
            if name in self._ledger.schema.metrics:
                raise ConflictError(
                    f"{self._named}: metric {name!r} is given with its step, and step {number} is recorded already; "
                    "log later values under another name"
                )
            if self._late.setdefault(name, {}).setdefault(number, value) != value and not math.isnan(value):
                raise ConflictError(f"{self._named}: {name!r} already has another value at step {number}")

    def keep(self) -> None:
        """Have the last step be one to go on from, as when a checkpoint is written; it is committed with the next."""
        self._check()
        self._keep()

    def _keep(self) -> None:
        """Take the state to go on from, unless something has changed since the last step."""
        last = self._pending
        if last is not None and last.resume is None and self._marks == self._watched.marks():
            last.resume = self._state(self._randomness)

    @property
    def _named(self) -> str:
        return slab_named(self._table["name"], self._order, self._seed)

    def _check(self) -> None:
        if not self._begun or self.closed:
            raise ConflictError("record inside `with ts.record(...) as rec:`")
        self._observing.check()
        self._writing.check()

    def _begin(self) -> None:
        check_place(self._store)
        if standing(self._store.place, self._table["name"]) in ("nothing", "half declared"):
            refuse_new(self._store, self._table["name"])
        self._store.place.make()
        what = self._named
        lock = slab_lock(self._table["name"], self._order, self._seed)
        also = self._held.enter_context(self._store.place.lock(lock, what))
        schema = self._declared(self._asked or 0, ())
        corner = schema.orders.index(self._order), schema.seeds.index(self._seed)
        also(slab_folder(self._group.basename, corner))
        self._ledger = Ledger(self._group, schema, *corner)
        found = self._ledger.last_step
        if found >= 0 and not self._resume:
            raise ConflictError(
                f"{what} is recorded already, up to step {found}; give resume=True to continue, or another seed or name"
            )
        self._writing, self._observing = Pipeline(), Pipeline(threads=1, depth=_AHEAD)
        _at_exit(weakref.ref(self))
        threads = torch.get_num_threads()
        self._observing.submit([], _measure_alone)
        self._observing.drain()
        torch.set_num_threads(threads)  # else threads that start later would inherit the 1
        self._writer = SlabWriter(self._ledger, self._writing)
        self._sketch = Sketch(schema.parameters, self._table["record"]["sketch"], schema.sketch_seed)
        self._before: Tensor | None = None
        self._due = time.monotonic()
        self._since = 0
        self._marks: tuple[int, ...] = ()
        device = self._watched.parameters[0].device
        self._here, self._scratch = torch.empty(2, self._watched.size, dtype=torch.float64, device=device).unbind()
        self._held.enter_context(
            noted(StoredExperiment(self._store, self._group), [(self._order, self._seed)], provenance(device))
        )
        if found >= 0:
            self._go_on(found)
        else:
            self._start = self._watched.weights().double()
            self._see(0, {})

    def _go_on(self, found: int) -> None:
        stored = self._ledger.slots.latest(found)
        if stored is None:
            raise ConflictError(
                f"{self._named}: it was recorded up to step {found}, but no state to resume from can be read; "
                "record it again under another seed or name"
            )
        self.last, content = stored
        with damage_told(f"{self._named}: the state to resume from", "record it again under another seed or name"):
            tree = resume_state.unpack(content)
            loop, start = dict(tree["loop"]), tree["start"]
        self._watched.restore(loop, self._named)
        device = self._watched.parameters[0].device
        self._start = start.to(device)
        self._before = self._watched.weights().double()
        self.resumed = True
        again = f"; steps {self.last + 1} to {found} are recorded already and must come out the same"
        warnings.warn(
            f"{self._named}: resumed at step {self.last}. Your loop has to go on with the batches after that step: "
            f"their order is not restored{again if found > self.last else ''}",
            ResumedWarning,
            stacklevel=4,
        )

    def _see(self, number: int, metrics: dict[str, float]) -> None:
        """Copy what is to be recorded of a step."""
        self._send()
        schema = self._ledger.schema
        if number > schema.steps:
            schema = self._grow(max(number, schema.steps + max(_GROWTH, schema.steps // 4)), ())
        stored = number == 0 or number in self._policy
        state = self._watched.vectors(schema.layout) if stored else None
        weights = self._watched.weights(None if state is None else state[0])
        randomness = random_state()
        resume = None
        if number == 0 or self._is_due(schema, number):
            resume = self._state(randomness)
            self._write_late()
        self._pending = _Step(number, weights, state, metrics, resume)
        self.last, self._marks, self._randomness = number, self._watched.marks(), randomness

    def _write_late(self) -> None:
        """Declare and write what came late."""
        late, self._late = self._late, {}
        if new := [name for name in late if name not in self._ledger.schema.late]:
            self._grow(self._ledger.schema.steps, (), new)
        for name, values in late.items():
            series = LateSeries(self._group, self._ledger.schema, self._ledger.corner, name)
            steps = np.array(sorted(values), dtype=np.int64)
            series.put(steps, np.array([values[step] for step in steps.tolist()]))

    def _is_due(self, schema: Schema, number: int) -> bool:
        """Tell whether to commit after this step, and to store what it takes to go on from it."""
        self._since += 1
        ends = schema.snapshots_of(schema.segment_of(number))[-1] == number
        if ends or self._since >= COMMIT_STEPS or time.monotonic() - self._due > COMMIT_SECONDS / 2:
            self._since, self._due = 0, time.monotonic()
            return True
        return False

    def _state(self, randomness: Mapping[str, Any]) -> bytes:
        return resume_state.pack({"loop": self._watched.state(randomness), "start": self._start})

    def _send(self) -> None:
        """Hand the pending step over: nothing can be added to it any more."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        schema = self._ledger.schema
        if taken := [name for name in pending.metrics if name in schema.late or name in self._late]:
            raise ConflictError(
                f"{self._named}: metric {taken[0]!r} was first given to `log`; keep giving it to `log`, not to `step`"
            )
        if new := [name for name in pending.metrics if name not in schema.metrics]:
            self._grow(schema.steps, new)
        self._observing.submit([], partial(self._observe, pending))

    def _observe(self, step: _Step) -> None:
        """Measure and append a step, in the observing thread."""
        # In memory that is used again: fresh memory for each of these would take as long as all else together.
        here, before, scratch = self._here.copy_(step.weights), self._before, self._scratch
        moved = [] if before is None else [torch.sub(here, before, out=scratch).norm()]
        lengths = [here.norm(), torch.sub(here, self._start, out=scratch).norm(), *moved]
        sketch = self._sketch(scratch.numpy(force=True))
        self._before, self._here = here, torch.empty_like(here) if before is None else before
        names = ("param_norm", "start_distance", "step_distance")
        metrics = {**step.metrics, **dict(zip(names, torch.stack(lengths).tolist(), strict=False))}
        state = None if step.state is None else (step.state[0].numpy(force=True), step.state[1].numpy(force=True))
        resume = step.resume
        observed = Observation(step.number, 0, metrics, sketch, state)
        self._writer.append(observed, None if resume is None else lambda: resume)
        if resume is not None:
            self._writer.commit()

    def _flush(self) -> None:
        """Commit what was recorded; with the state to go on from, if nothing has changed since the last step."""
        self._keep()
        self._send()
        self._observing.drain()
        self._writer.commit()
        self._writing.drain()
        self._write_late()

    def _grow(self, steps: int, metrics: Sequence[str], late: Sequence[str] = ()) -> Schema:
        """Declare more steps or metrics, and go on writing with the arrays as they are then."""
        self._observing.drain()
        self._writer.commit()
        self._writing.drain()
        schema = self._declared(steps, metrics, late)
        self._ledger = Ledger(self._group, schema, schema.orders.index(self._order), schema.seeds.index(self._seed))
        self._writer = SlabWriter(self._ledger, self._writing)
        return schema

    def _declared(self, steps: int, metrics: Sequence[str], late: Sequence[str] = ()) -> Schema:
        """Declare the experiment, or let it grow by what it does not have yet."""
        name = self._table["name"]
        with self._store.declaring():
            root = open_root(self._store.place, self._durability)
            refuse_foreign(self._store, name)
            there = name in self._store
            stored = self._store[name] if there else None
            schema = self._merged(None if stored is None else stored.schema, steps, metrics, late)
            check_metric_names(schema)
            sizes = {"steps": schema.steps, "orders": list(schema.orders), "seeds": list(schema.seeds)}
            declared = max(stored.config.get(DECLARED) or 0 if stored else 0, self._asked or 0)
            sizes |= {DECLARED: declared} if declared else {}
            config = {**self._table, **sizes}
            if stored is None:
                refuse_alike(self._store, name)  # somebody may have made it in the meantime
                self._group = declare(root, name, schema, config, [])
                return schema
            found = differences({k: v for k, v in stored.config.items() if k not in (*sizes, DECLARED)}, self._table)
            found += _different(stored.schema.layout, self._watched.layout())
            refuse_differences(name, found)
            self._group = open_to_write(root.store, name)
            if schema != stored.schema or config.get(DECLARED) != stored.config.get(DECLARED):
                grow(self._group, schema, config, [])
            return schema

    def _merged(self, stored: Schema | None, steps: int, metrics: Sequence[str], late: Sequence[str]) -> Schema:
        record, size = self._table["record"], self._watched.size
        if stored is None:
            layout = self._watched.layout()
            stored = Schema(
                orders=(), seeds=(), init_seeds=(), data_seeds=(), steps=0, snapshots=(0,), layout=layout,
                metrics=dict.fromkeys(MEASURES), components=min(record["sketch"], size), parameters=size,
                batch_size=0, codec=record["codec"], snapshots_per_segment=segment_length(layout), made_by="loop",
            )  # fmt: skip
        seeds = tuple(dict.fromkeys((*stored.seeds, self._seed)))
        length = max(steps, stored.steps) or (_GROWTH - 1)
        grid = tuple(n for n in range(length + 1) if n == 0 or n in self._policy)
        return replace(
            stored,
            orders=tuple(dict.fromkeys((*stored.orders, self._order))),
            seeds=seeds, init_seeds=seeds, data_seeds=seeds,
            steps=length, snapshots=grid,
            metrics={**stored.metrics, **{name: None for name in metrics if name not in stored.metrics}},
            late=tuple(dict.fromkeys((*stored.late, *late))),
        )  # fmt: skip


def _measure_alone() -> None:
    """Have torch use no other threads for this one.

    Once OpenMP has more threads than there are cores, it puts those of the loop to sleep after each operation, and a
    training step takes twice as long, whether anything is measured or not.
    """
    torch.get_num_threads()  # a thread takes the number over at its first use
    torch.set_num_threads(1)


def _at_exit(made: weakref.ref[Recorder]) -> None:
    """Close a recorder that its program forgot, while its threads still run: `atexit` would come too late."""

    def close() -> None:
        recorder = made()
        if recorder is not None and not recorder.closed and os.getpid() == process:
            recorder.close()

    process = os.getpid()
    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        register(close)


def _different(stored: Layout, own: Layout) -> list[str]:
    """Return how the tensors of a model differ from those that are stored."""
    left, right = ({f"{e.role} {e.name}": (e.shape, e.dtype) for e in layout.entries} for layout in (stored, own))
    return differences(left, right)


def _scalar(name: str, value: Any) -> float:  # noqa: ANN401
    try:
        if isinstance(value, Tensor | np.ndarray):
            return float(value.item())
        if isinstance(value, str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
        raise ConfigurationError(f"metric {name!r} is a {type(value).__name__}{shape}; give one number") from None


def _batch_id(batch: Any) -> float:  # noqa: ANN401
    """Return 48 bits of a hash, which a float64 holds exactly."""
    digest = hashlib.blake2b(digest_size=6)
    pieces = batch if isinstance(batch, list | tuple) else [batch]
    for piece in pieces:
        array = piece.detach().cpu().numpy() if isinstance(piece, Tensor) else np.asarray(piece)
        digest.update(f"{array.dtype.str}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return float(int.from_bytes(digest.digest(), "little"))


def _operator(optimizer: Optimizer | None) -> dict[str, Any]:
    if optimizer is None:
        return {"family": "unknown"}
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in optimizer.defaults.items()}
    return {"family": type(optimizer).__name__.lower(), **{k: v for k, v in settings.items() if _is_plain(v)}}


def _plain(what: str, table: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in table.items():
        if not _is_plain(value):
            kind = type(value).__name__
            raise ConfigurationError(f"{what}: {key!r} is a {kind}; give numbers, text, or lists of them")
    return dict(table)


def _is_plain(value: Any) -> bool:  # noqa: ANN401
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
