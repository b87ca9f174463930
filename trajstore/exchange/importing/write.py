"""Writing: what is not stored yet, a slab after the other, measured while the next file is read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from trajstore.errors import ConfigurationError, ConflictError, WriteError
from trajstore.exchange.importing.pattern import Slab
from trajstore.exchange.importing.request import Import
from trajstore.exchange.importing.stored import (
    Progress,
    States,
    flat,
    measured_against,
    missing_steps,
    refuse_other_numbers,
)
from trajstore.recording.fills import noted
from trajstore.recording.provenance import provenance
from trajstore.storage.format.sketch import Sketch
from trajstore.storage.writing.pipeline import Pipeline
from trajstore.storage.writing.segment import Observation, Snapshot
from trajstore.storage.writing.slab_writer import Ledger, SlabWriter
from trajstore.store import StoredExperiment

__all__ = ["fill", "not_noted"]


def fill(asked: Import, stored: StoredExperiment, slab: Slab, sketch: Sketch, progress: Progress | None) -> None:
    """Write the missing steps of one slab; note the files of these, and those that an earlier import did not note."""
    order, seed = slab
    with stored.locked(order, seed):
        schema, sources = stored.schema, asked.sources[slab]
        ledger = Ledger(stored.group, schema, schema.orders.index(order), schema.seeds.index(seed))
        missing = missing_steps(asked, ledger, slab)
        # Somebody may have imported some of them since they were looked at.
        refuse_other_numbers(asked, ledger, slab, sorted({*asked.missing[slab]} - {*missing}), progress)
        unnoted = not_noted(asked, stored, slab)
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
                raise WriteError(f"{error}; what was imported before is kept; import again to continue") from None
            finally:  # of a file whose step is not there it would say nothing
                files |= {_plain(sources[n].name): digest for n, digest in digests.items() if ledger.committed[n]}


def not_noted(asked: Import, stored: StoredExperiment, slab: Slab) -> list[int] | None:
    """Return the steps whose files an import that was stopped did not note; None if each came to its end, with all."""
    fills = [fill for fill in stored.fills if [*slab] in fill["slabs"]]
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
    first, steps_before = measured_against(ledger, missing)
    start = None if first == missing[0] else weights_of(first)
    last, before = first, start
    for step in missing:
        if step != first and steps_before[step] != last:
            before = weights_of(steps_before[step])
        digests[step] = _digest(sources[step].file)
        weights, state = flat(asked, sources[step], ledger)
        start = weights if start is None else start
        yield _Read(step, weights, state, start, before)
        last, before = step, weights


class _Weights:
    """The parameters at steps that are stored already, exact: from their files, unless only what is stored is there."""

    def __init__(self, asked: Import, ledger: Ledger, slab: Slab) -> None:
        self._asked, self._ledger, self._sources, self._states = asked, ledger, asked.sources[slab], States(ledger)

    def __call__(self, step: int) -> Tensor:
        if step in self._sources:
            return flat(self._asked, self._sources[step], self._ledger)[0]
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
