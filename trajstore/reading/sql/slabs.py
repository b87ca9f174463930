"""A slab as rows: what is committed of its metrics, and its commit records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from trajstore.errors import damage_told, slab_named
from trajstore.reading.handles import ExperimentHandle
from trajstore.reading.sql.files import copy
from trajstore.reading.sql.text import identifier
from trajstore.storage.format.commits import Commits
from trajstore.storage.writing.late_metrics import LateSeries
from trajstore.storage.writing.segment import array_of

__all__ = ["METRICS_COLUMNS", "SEGMENTS_COLUMNS", "SlabRows", "write_metrics", "write_segments", "write_slab"]

METRICS_COLUMNS = {
    "experiment": "VARCHAR", "order": "VARCHAR", "seed": "BIGINT", "step": "BIGINT", "leg": "BIGINT",
}  # fmt: skip
"""What `metrics` has beside a DOUBLE column a metric."""
SEGMENTS_COLUMNS = {
    "experiment": "VARCHAR", "order": "VARCHAR", "seed": "BIGINT", "segment": "BIGINT", "first_step": "BIGINT",
    "last_step": "BIGINT", "steps": "BIGINT", "states": "BIGINT", "digest": "VARCHAR",
}  # fmt: skip


@dataclass(frozen=True)
class SlabRows:
    """What is committed of one (order, seed), read when it is asked for."""

    experiment: ExperimentHandle
    i: int
    """Position of the order."""
    k: int
    """Position of the seed."""
    steps: NDArray[np.bool_]
    """(step): recorded and committed."""
    records: NDArray[np.int64]
    """(segment, field): the commit records."""

    @classmethod
    def of(cls, experiment: ExperimentHandle, i: int, k: int) -> SlabRows:
        """Read what counts, of this slab alone."""
        commits = Commits.of(experiment.group, experiment.schema, (i, k))
        return cls(experiment, i, k, commits.steps[0, 0], commits.records[0, 0])

    @property
    def last_step(self) -> int:
        """The last committed step, −1 where there is none."""
        there = np.flatnonzero(self.steps)
        return int(there[-1]) if len(there) else -1

    @property
    def unbroken(self) -> bool:
        """Whether every segment up to that of the last step counts."""
        last = self.last_step
        return last >= 0 and bool((self.records[: self.experiment.schema.segment_of(last), 0] >= 0).all())

    def metrics(self) -> dict[str, Any]:
        """Return the columns of `metrics`: NaN where a metric diverged, masked where it was not measured."""
        schema, steps = self.experiment.schema, self.steps
        measured = self._values("measured")
        columns: dict[str, Any] = {**self._labels, "step": np.flatnonzero(steps), "leg": self._values("leg")}
        for bit, metric in enumerate(schema.metrics):
            columns[metric] = np.ma.masked_array(self._values(metric), measured >> bit & 1 == 0)
        for metric in schema.late:
            known, values = LateSeries(self.experiment.group, schema, (self.i, self.k), metric).read()
            columns[metric] = np.ma.masked_array(values[steps], ~known[steps])
        return columns

    def segments(self) -> dict[str, Any]:
        """Return the columns of `segments`, a row for each that is committed."""
        starts = self.experiment.schema.segment_starts
        counting = np.flatnonzero(self.records[:, 0] >= 0)
        steps, states, *words = self.records[counting].T
        there = np.flatnonzero(self.steps)
        first = np.searchsorted(there, starts[counting])
        last = np.minimum(first + steps, len(there)) - 1
        digests = np.stack(words, axis=-1).astype("<i8") if len(counting) else np.zeros((0, 4), dtype="<i8")
        empty = steps == 0
        return {
            **self._labels,
            "segment": counting,
            "first_step": np.ma.masked_array(there[np.where(empty, 0, first)] if len(there) else steps, empty),
            "last_step": np.ma.masked_array(there[np.where(empty, 0, last)] if len(there) else steps, empty),
            "steps": steps,
            "states": states,
            "digest": np.array([row.tobytes().hex() for row in digests], dtype=object),
        }

    @cached_property
    def _labels(self) -> dict[str, Any]:
        schema = self.experiment.schema
        return {
            "experiment": self.experiment.name, "order": schema.orders[self.i], "seed": schema.seeds[self.k],
        }  # fmt: skip

    def _values(self, name: str) -> NDArray[Any]:
        schema = self.experiment.schema
        where = slab_named(self.experiment.name, schema.orders[self.i], schema.seeds[self.k])
        array = array_of(self.experiment.group, name)
        with damage_told(f"{where}: {name!r}"):
            return np.asarray(array[self.i, self.k, : len(self.steps)])[self.steps]


def write_slab(
    file: Path, experiment: ExperimentHandle, order: str, seed: int, i: int, k: int, steps: NDArray[np.bool_]
) -> None:
    """Write the metrics of some steps of a slab as Parquet."""
    nothing = np.empty((0, 0), dtype=np.int64)
    write_metrics(file, [SlabRows(experiment, i, k, steps, nothing).metrics()])


def write_metrics(file: Path, slabs: Iterable[Mapping[str, Any]]) -> None:
    """Write the columns of slabs below each other; a metric that only others have is NULL."""
    _write(file, slabs, METRICS_COLUMNS)


def write_segments(file: Path, slabs: Iterable[Mapping[str, Any]]) -> None:
    """Write the commit records of slabs below each other."""
    _write(file, slabs, SEGMENTS_COLUMNS)


def _write(file: Path, slabs: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Write rows as Parquet: the named columns and, of what else there is, columns of DOUBLE."""
    # SQL does not tell upper case from lower: the first spelling stands for all.
    spelling: dict[str, str] = {}
    tables: list[dict[str, Any]] = []
    for table in slabs:
        for name in table:
            spelling.setdefault(name.casefold(), name)
        tables.append({name.casefold(): values for name, values in table.items()})
    lengths = [max(len(values) for values in table.values() if isinstance(values, np.ndarray)) for table in tables]
    frame: dict[str, Any] = {}
    selected = []
    for number, (name, spelled) in enumerate(spelling.items()):
        kind, own = columns.get(spelled, "DOUBLE"), f"v{number}"
        parts = [table.get(name) for table in tables]
        value = f"{own}::{kind}"
        if isinstance(parts[0], str | int):  # a label
            labels, codes = np.unique(np.array(parts), return_inverse=True)
            frame[own] = pd.Categorical.from_codes(np.repeat(codes, lengths), pd.Index(labels.tolist()))
        else:
            filled = [
                np.ma.masked_array(np.zeros(n), True) if part is None else part
                for part, n in zip(parts, lengths, strict=True)
            ]
            there = np.concatenate([np.ma.getdata(part) for part in filled])
            hidden = np.concatenate([np.ma.getmaskarray(part) for part in filled])
            frame[own] = there
            # DuckDB takes NaN in a frame for NULL, so where there is either is told apart.
            if kind == "DOUBLE" and (diverged := np.isnan(there) & ~hidden).any():
                frame[f"n{number}"] = diverged
                value = f"CASE WHEN n{number} THEN 'NaN'::DOUBLE ELSE {value} END"
            if hidden.any():
                frame[f"m{number}"] = hidden
                value = f"CASE WHEN m{number} THEN NULL ELSE {value} END"
        selected.append(f"{value} AS {identifier(spelled)}")
    with duckdb.connect() as connection:
        connection.register("rows", pd.DataFrame(frame))
        copy(connection, f"SELECT {', '.join(selected)} FROM rows", file)
