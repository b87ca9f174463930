"""The schema of one experiment: which arrays there are, their dimensions, chunks and attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray

from trajstore.errors import ConfigurationError, FormatError
from trajstore.storage.format.checking import MOST_METRICS, checked_schema, is_metric
from trajstore.storage.format.codecs import Codec, refuse_large_chunks
from trajstore.storage.format.digest import SegmentDigest
from trajstore.storage.format.layout import Layout
from trajstore.storage.format.metrics import MadeBy, about, maker_of, start_of

__all__ = [
    "APART",
    "COMMIT_FIELDS",
    "FORMAT",
    "LATE_SPAN",
    "LATE_WORDS",
    "ArraySpec",
    "Schema",
    "check_format",
    "check_metric_names",
    "late_records",
    "segment_length",
]

FORMAT = 1
"""Of a store, and of an experiment as it is declared."""
APART = 2
"""Of an experiment whose fills lie apart from its document, because there are many; see `storage.fills`."""
COMMIT_FIELDS = ("steps", "snapshots", *(f"digest_{k}" for k in range(SegmentDigest.WORDS)), "fence")

LATE_SPAN = 4_096
"""Steps that share a record of a late metric."""
LATE_WORDS = LATE_SPAN // 64 + SegmentDigest.WORDS + 1
"""A bit a step, the digest, the fence."""
_PARAM_CHUNK = 65_536
_SERIES_CHUNK = 4_096
_SEGMENT_CHUNK = 1_024
_SEGMENT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class ArraySpec:
    """One array of the schema."""

    name: str
    dims: tuple[str, ...]
    dtype: str
    chunks: tuple[int, ...]
    fill: float | int
    about: str
    attributes: Mapping[str, Any]
    kind: Literal["params", "plain"] = "plain"


@dataclass(frozen=True)
class Schema:
    """Everything that determines the arrays of an experiment."""

    orders: tuple[str, ...]
    seeds: tuple[int, ...]
    init_seeds: tuple[int, ...]
    data_seeds: tuple[int, ...]
    steps: int
    snapshots: tuple[int, ...]
    """The steps with a snapshot, increasing, from 0 to `steps`."""
    layout: Layout
    metrics: Mapping[str, int | None]
    """Metric → examples it averages, None where it is no average. The order is that of the bits."""
    components: int
    parameters: int
    """How many parameters the sketch is of, whether their states are stored or not."""
    batch_size: int
    codec: Codec
    snapshots_per_segment: int
    sketch_seed: int = 0
    late: tuple[str, ...] = ()
    """Metrics that come after their steps were recorded."""
    made_by: MadeBy = "problem"
    """What made the iterates, as the configuration says; descriptions of metrics depend on it."""

    def until(self, last: int) -> Schema:
        """Return what of it lies up to a step."""
        return replace(self, steps=last, snapshots=tuple(step for step in self.snapshots if step <= last))

    @property
    def segments(self) -> int:
        """How many segments a slab has."""
        return -(-len(self.snapshots) // self.snapshots_per_segment)

    @cached_property
    def segment_starts(self) -> NDArray[np.int64]:
        """The first step of each segment."""
        return np.array(self.snapshots[:: self.snapshots_per_segment], dtype=np.int64)

    @property
    def spans(self) -> int:
        """How many records a late metric has in a slab."""
        return -(-(self.steps + 1) // LATE_SPAN)

    def steps_of(self, segment: int) -> tuple[int, int]:
        """Return the first step of a segment, and the first one after it."""
        starts = self.segment_starts
        return int(starts[segment]), int(starts[segment + 1]) if segment + 1 < len(starts) else self.steps + 1

    def snapshots_of(self, segment: int) -> tuple[int, ...]:
        """Return the steps that have a place for a state in a segment."""
        first = segment * self.snapshots_per_segment
        return self.snapshots[first : first + self.snapshots_per_segment]

    def segment_of(self, step: int) -> int:
        """Return the segment that a step belongs to."""
        return int(np.searchsorted(self.segment_starts, step, side="right")) - 1

    @property
    def again(self) -> str:
        """What writes steps that are missing, as an error says it."""
        return {"problem": "--resume", "loop": "resume=True", "import": "importing again"}[self.made_by]

    def about(self, metric: str) -> str:
        """Say what a metric is."""
        if metric in self.late:
            if self.made_by == "problem":
                return "computed from the stored state, after the step was recorded"
            return "as the loop gave it, after the step was recorded"
        return about(metric, self.metrics[metric], self.made_by)

    def arrays(self) -> list[ArraySpec]:
        """Return the data arrays."""
        series, segment = ("order", "seed", "step"), self.snapshots_per_segment
        floats, counters = self.layout.size("params"), self.layout.size("counters")
        along = _SERIES_CHUNK
        specs = [
            ArraySpec(
                "params", ("order", "seed", "param", "snapshot"), self.layout.dtype.name,
                (1, 1, min(_PARAM_CHUNK, floats), segment), np.nan,
                "flat state vectors; the group attribute `layout` names the parts of `param`", {}, "params",
            ),
            ArraySpec(
                "counters", ("order", "seed", "counter", "snapshot"), "int64",
                (1, 1, max(1, counters), segment), -1, "integers of the state, laid out as `params` is", {},
            ),
            ArraySpec(
                "sketch", ("order", "seed", "step", "component"), "float64",
                (1, 1, 512, max(1, self.components)), np.nan,
                f"projection of the parameters' difference to {start_of(self.made_by)}",
                {"seed": self.sketch_seed, "identity": self.components == self.parameters},
            ),
            ArraySpec(
                "leg", series, "int64", (1, 1, along), -1,
                "start step of the leg that made the iterate; -1 where none was recorded", {},
            ),
            ArraySpec(
                "measured", series, "int64", (1, 1, along), 0,
                "which metrics were measured, one bit each: tells a diverged NaN from no value",
                {"flag_masks": [1 << k for k in range(len(self.metrics))], "flag_meanings": " ".join(self.metrics)},
            ),
            ArraySpec(
                "committed", ("order", "seed", "segment", "field"), "int64",
                (1, 1, _SEGMENT_CHUNK, len(COMMIT_FIELDS)), -1,
                "per segment, how many recorded steps and snapshots count, and their digest: the truth",
                {"fields": list(COMMIT_FIELDS)},
            ),
        ]  # fmt: skip
        for name, examples in self.metrics.items():
            more = {"examples": examples}
            specs.append(ArraySpec(name, series, "float64", (1, 1, along), np.nan, self.about(name), more))
        for name in self.late:
            more = {"late": True}
            specs.append(ArraySpec(name, series, "float64", (1, 1, LATE_SPAN), np.nan, self.about(name), more))
            dims, what = (
                ("order", "seed", "span", "word"),
                f"which steps have a {name} that counts, and the digest of these",
            )
            specs.append(ArraySpec(late_records(name), dims, "int64", (1, 1, 1, LATE_WORDS), 0, what, {}))
        if self.batch_size:
            specs.append(
                ArraySpec(
                    "batch_index", ("seed", "batch", "example"), "int64",
                    (1, max(1, 65_536 // self.batch_size), self.batch_size), -1, "the examples in batch B_i", {},
                )
            )  # fmt: skip
        return specs

    def coordinates(self) -> dict[str, tuple[str, NDArray[Any], str]]:
        """Return name → (dimension, values, what it is)."""
        coordinates: dict[str, tuple[str, NDArray[Any], str]] = {
            "order": ("order", np.array(self.orders, dtype=np.dtypes.StringDType()), "composition order"),
            "seed": ("seed", np.array(self.seeds, dtype=np.int64), "label of a run"),
            "init_seed": ("seed", np.array(self.init_seeds, dtype=np.int64), "seed of the start θ₀"),
            "data_seed": ("seed", np.array(self.data_seeds, dtype=np.int64), "seed of the batch stream"),
            "step": ("step", np.arange(self.steps + 1), "n of θ_n; for backward legs a chain length"),
            "snapshot": ("snapshot", np.array(self.snapshots, dtype=np.int64), "step of a stored state"),
        }
        if self.batch_size:
            coordinates["batch"] = ("batch", np.arange(1, self.steps + 1), "i of B_i")
        return coordinates

    def lengths(self) -> dict[str, int]:
        """Return the length of every dimension."""
        return {
            "order": len(self.orders), "seed": len(self.seeds), "step": self.steps + 1,
            "snapshot": len(self.snapshots), "param": self.layout.size("params"),
            "counter": self.layout.size("counters"), "component": self.components,
            "segment": self.segments, "field": len(COMMIT_FIELDS),
            "batch": self.steps, "example": self.batch_size, "span": self.spans, "word": LATE_WORDS,
        }  # fmt: skip

    def series_bytes(self, recorded: int) -> int:
        """Return the raw bytes of everything but states, for a number of recorded steps in each slab."""
        a_step = 8 * (len(self.metrics) + self.components + 2)
        return len(self.seeds) * (len(self.orders) * recorded * a_step + 8 * self.steps * self.batch_size)

    def to_json(self) -> dict[str, Any]:
        """Return the schema as the attribute that is stored."""
        return {
            "orders": list(self.orders),
            "seeds": list(self.seeds),
            "init_seeds": list(self.init_seeds),
            "data_seeds": list(self.data_seeds),
            "steps": self.steps,
            "snapshots": _runs(self.snapshots),
            "snapshots_per_segment": self.snapshots_per_segment,
            "metrics": dict(self.metrics),
            "late": list(self.late),
            "components": self.components,
            "parameters": self.parameters,
            "batch_size": self.batch_size,
            "codec": self.codec,
            "sketch_seed": self.sketch_seed,
            "layout": self.layout.to_json(),
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Schema:
        """Read the stored attribute, whose parts are checked first."""
        checked_schema(stored)
        ranges = (range(first, last + 1, step) for first, last, step in stored["snapshots"])
        schema = cls(
            **{
                **stored,
                **{name: tuple(stored[name]) for name in ("orders", "seeds", "init_seeds", "data_seeds", "late")},
                "snapshots": tuple(chain.from_iterable(ranges)),
                "layout": Layout.from_json(stored["layout"]),
            }
        )
        for spec in schema.arrays():
            refuse_large_chunks(spec.name, spec.chunks, np.dtype(spec.dtype).itemsize)
        return schema

    @classmethod
    def of(cls, group: zarr.Group) -> Schema:
        """Return the schema of a declared experiment. Its arrays may be longer, while they grow."""
        attributes: Any = group.attrs["trajstore"]
        return replace(cls.from_json(attributes["schema"]), made_by=maker_of(attributes["config"]))


def _runs(steps: Sequence[int]) -> list[list[int]]:
    """Return increasing numbers as evenly spaced runs: first, last, spacing.

    >>> _runs([0, 10, 20, 30, 31])
    [[0, 30, 10], [31, 31, 1]]
    """
    runs: list[list[int]] = []
    for step in steps:
        if runs and runs[-1][0] == runs[-1][1]:
            runs[-1][1:] = [step, step - runs[-1][0]]
        elif runs and step - runs[-1][1] == runs[-1][2]:
            runs[-1][1] = step
        else:
            runs.append([step, step, 1])
    return runs


def late_records(name: str) -> str:
    """Return the name of the array that says which values of a late metric count."""
    return f"{name}_committed"


def segment_length(layout: Layout) -> int:
    """Return how many snapshots make a segment.

    64; more for small states, up to a chunk of about 4 million numbers; fewer where they would pass 256 MB.
    """
    wanted = min(max(64, _PARAM_CHUNK * 64 // max(1, layout.size("params"))), 4_096)
    return max(1, min(wanted, _SEGMENT_BYTES // max(1, layout.row_bytes)))


_NAMES_TAKEN = ("experiment", "recorded", "stored", "resume", "batch_index")
"""By columns of tables and datasets, the group of resume states, and an array that not every experiment has."""


def check_metric_names(schema: Schema) -> None:
    """Refuse names that could not be an array, a flag and a column, and more than there are flags."""
    own = [spec.name for spec in replace(schema, metrics={}, late=()).arrays()]
    seen = {*own, *schema.coordinates(), *schema.lengths(), *_NAMES_TAKEN}
    if len(schema.metrics) > MOST_METRICS:
        raise ConfigurationError(
            f"{len(schema.metrics)} metrics, the last of them {[*schema.metrics][-1]!r}: an experiment has at most "
            f"{MOST_METRICS}, a bit of a number each; record fewer, or put some into an experiment of their own"
        )
    for name in (*schema.metrics, *schema.late):
        if not is_metric(name):
            raise ConfigurationError(f"metric {name!r}: use letters, digits and '_', beginning with a letter")
        if {name.casefold(), late_records(name).casefold()} & seen:
            raise ConfigurationError(f"metric {name!r}: an array or column has that name, upper case or lower")
        seen |= {name.casefold(), late_records(name).casefold()}


def check_format(attributes: Mapping[str, Any], where: str, latest: int = FORMAT) -> None:
    """Refuse a format that is later than the `latest` that this version knows."""
    if not isinstance(attributes, Mapping):
        raise FormatError(f"{where} is not a trajstore, or damaged: its attributes are no table")
    found = attributes.get("format")
    if not isinstance(found, int) or not FORMAT <= found <= latest:
        reads = " and ".join(map(str, range(FORMAT, latest + 1)))
        raise FormatError(
            f"{where} has store format {found!r}, this trajstore reads format {reads}; install a newer trajstore"
        )
