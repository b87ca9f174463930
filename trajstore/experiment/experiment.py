"""The experiment: problem + operator + steps + orders + seeds + what to record.

>>> experiment = Experiment.preset("quadratic", {"steps": 20})
>>> experiment.name, [str(order) for order in experiment.orders]
('quadratic', ['forward', 'backward'])
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from trajstore.engine.orders import Order
from trajstore.engine.refining import Wanted
from trajstore.errors import ConfigurationError, choices
from trajstore.experiment.configuration import check_fields, check_types, completed, defaults, describe, merge
from trajstore.experiment.grids import coarse, exactly, planned, tail
from trajstore.experiment.presets import FULL, Scale, family_of, preset_table
from trajstore.operators import Operator
from trajstore.operators.sgd import is_plain
from trajstore.problems import LiveProblem, Problem
from trajstore.storage.format.checking import is_name
from trajstore.storage.format.codecs import Codec
from trajstore.storage.format.metrics import maker_of

__all__ = ["Experiment", "Record", "check_name", "of_today", "read_toml"]


_MOST_STEPS = 100_000_000


@dataclass(frozen=True)
class Record:
    """What is recorded. Step 0 and the last step always are."""

    every: int = 1
    """Compute and measure every k-th iterate."""
    log_until: int | None = None
    """Up to this step, record at steps evenly spaced in the logarithm, ten a decade, instead."""
    steps: tuple[int, ...] | None = None
    """Record exactly these, instead of every k-th."""
    adaptive: str | None = None
    """A metric: begin with few of these steps, and bisect until its curve is known to the tolerance."""
    tolerance: float | None = None
    """How far the metric may be from a straight line between the steps that are computed."""
    dense_tail: int | None = None
    """Where the grid is adaptive: leave out none of the last so many of these steps of each leg."""
    snapshot_every: int | None = None
    """Store the state of every k-th step, where it is recorded; None: of every recorded step."""
    optimizer_state: bool = False
    """Store the optimizer's memory with each snapshot."""
    sketch: int = 128
    """Components of the sketch, a power of two."""
    codec: Codec = "pcodec"

    def __post_init__(self) -> None:
        check_types("record", self)
        if self.every < 1:
            raise ConfigurationError(f"record: every is {self.every}; it must be at least 1")
        if self.log_until is not None and self.log_until < 1:
            raise ConfigurationError(f"record: log_until is {self.log_until}; it must be at least 1")
        if self.steps is not None and (self.every != 1 or self.log_until is not None):
            raise ConfigurationError("record: steps is the whole grid; leave out every and log_until")
        if self.steps is not None and min(self.steps, default=-1) < 0:
            raise ConfigurationError(f"record: steps is {list(self.steps)}; it must hold steps from 0 on")
        if (self.adaptive is None) != (self.tolerance is None):
            raise ConfigurationError(
                "record: adaptive and tolerance go together: a metric, and how closely to follow it"
            )
        if self.adaptive is not None and (self.steps is not None or self.log_until is not None):
            raise ConfigurationError("record: adaptive chooses the steps; leave steps and log_until out")
        if self.dense_tail is not None and self.adaptive is None:
            raise ConfigurationError(
                "record: dense_tail is for adaptive grids, which leave steps out; any other has its last ones as well"
            )
        if self.dense_tail is not None and self.dense_tail < 1:
            raise ConfigurationError(f"record: dense_tail is {self.dense_tail}; it must be at least 1")
        if self.tolerance is not None and not 0 < self.tolerance < math.inf:
            raise ConfigurationError(f"record: tolerance is {self.tolerance}; it must be a number above 0")
        if self.snapshot_every is not None and (self.snapshot_every < 1 or self.snapshot_every % self.every):
            raise ConfigurationError(
                f"record: snapshot_every is {self.snapshot_every}; it must be a multiple of every = {self.every}, "
                "since only iterates that are computed can be stored"
            )
        if self.sketch < 1 or self.sketch & (self.sketch - 1):
            raise ConfigurationError(f"record: sketch is {self.sketch}; it must be a power of two")

    def described(self) -> dict[str, Any]:
        """Return it as plain data: without what later versions added, where that is not used, so that digests stay."""
        told = {f.name: describe(getattr(self, f.name)) for f in fields(self)}
        return {name: value for name, value in told.items() if name != "dense_tail" or value is not None}


@dataclass(frozen=True)
class Experiment:
    """A recording to be made, whole: equal experiments give equal bytes on one machine."""

    name: str
    problem: Problem
    operator: Operator
    steps: int
    orders: tuple[Order, ...] = (Order.parse("forward"), Order.parse("backward"))
    seeds: tuple[int, ...] = (0,)
    init_seed: int | None = None
    """One θ₀ for all seeds; None: each seed starts from its own."""
    stops: tuple[int, ...] = ()
    """The last steps of earlier declarations, before it was extended; they are recorded too."""
    variant_of: str | None = None
    """What it is a variant of: the name that the variants share, which comes before a dot in the name of each."""
    record: Record = field(default_factory=Record)

    def __post_init__(self) -> None:
        check_types("an experiment", self)
        check_name(self.name)
        if self.variant_of is not None and not re.match(f"{re.escape(self.variant_of)}[.].", self.name):
            raise ConfigurationError(
                f"experiment {self.name!r} cannot be a variant of {self.variant_of!r}: its name would begin with "
                f"{f'{self.variant_of}.'!r}"
            )
        if not 1 <= self.steps <= _MOST_STEPS:
            raise ConfigurationError(f"steps is {self.steps}; it must be from 1 to {_MOST_STEPS:,}")
        for what, values in (("orders", self.orders), ("seeds", self.seeds)):
            if not values or len(set(values)) != len(values):
                raise ConfigurationError(
                    f"{what} must be given, each once; got {', '.join(map(str, values)) or 'none'}"
                )
        for seed in (*self.seeds, self.init_seed or 0):
            if not 0 <= seed < 2**63:
                raise ConfigurationError(f"seed {seed} must be a whole number from 0 to 2^63 − 1")
        if self.record.steps and max(self.record.steps) > self.steps:
            raise ConfigurationError(f"record: step {max(self.record.steps)} is beyond the last step {self.steps}")
        if (self.record.log_until or 0) > self.steps:
            raise ConfigurationError(f"record: log_until is {self.record.log_until}, beyond the last step {self.steps}")
        if self.record.adaptive is not None and self.record.adaptive not in self.metrics:
            there = choices(self.record.adaptive, list(self.metrics))
            raise ConfigurationError(f"record: adaptive is {self.record.adaptive!r}, no metric of the problem; {there}")
        for order in self.orders:
            order.check(self.steps, list(self.metrics) if order.metrics else [])
            if any(leg.kind == "bracket" for leg in order.legs) and not is_plain(self.operator):
                raise ConfigurationError(
                    f"order {str(order)!r}: bracket legs are defined only for SGD with a constant learning rate"
                )

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Experiment:
        """Build an experiment from plain data, as a TOML file holds it.

        A ``preset`` in the table, at a ``scale``, is what the rest is laid over.
        """
        if "preset" in table:
            base = preset_table(table["preset"], table.get("scale", FULL))
            if table.get("name", base["name"]) != base["name"]:
                base.pop("variant_of", None)  # under a name of its own it is an experiment of its own
            table = merge(base, {k: v for k, v in table.items() if k not in ("preset", "scale")})
        given = {key: value for key, value in table.items() if key != "about"}
        if "orders" in given:
            given["orders"] = _orders(given["orders"])
        if not isinstance(given.get("record", {}), Record):
            given["record"] = _record(given.get("record", {}))
        return cls(**check_fields("an experiment", cls, given))

    @classmethod
    def preset(cls, name: str, changes: Mapping[str, Any] | None = None, scale: Scale = FULL) -> Experiment:
        """Return a preset with some fields changed; at ``scale="small"`` it takes minutes on two cores."""
        return cls.of({**(changes or {}), "preset": name, "scale": scale})

    def grown_from(self, config: Mapping[str, Any]) -> Experiment:
        """Return this experiment with what a stored one has of orders, seeds and steps, first."""
        if self.steps < config["steps"]:
            raise ConfigurationError(
                f"experiment {self.name!r} has {config['steps']} steps already; an experiment never shrinks, "
                f"so an extension needs at least {config['steps']} steps"
            )
        longer = (config["steps"],) if self.steps > config["steps"] else ()
        orders = tuple(map(Order.parse, config["orders"]))
        return replace(
            self,
            orders=tuple(dict.fromkeys((*orders, *self.orders))),
            seeds=tuple(dict.fromkeys((*config["seeds"], *self.seeds))),
            stops=tuple(dict.fromkeys((*config["stops"], *longer))),
        )

    @cached_property
    def grid(self) -> tuple[int, ...]:
        """The recorded steps; those that may be, where the grid is adaptive."""
        record = self.record
        return planned(self.steps, record.steps, record.log_until, record.every, self.stops)

    @cached_property
    def asked(self) -> tuple[int, ...]:
        """The steps that are computed in any case: all of the grid, unless it is adaptive."""
        if self.record.adaptive is None:
            return self.grid
        begun = coarse(self.grid, {0}.union(*(order.turns(self.steps) for order in self.orders)))
        return tuple(sorted({*begun, *self._tails}))

    @property
    def _tails(self) -> set[int]:
        """The last steps of each leg, of every order, which an adaptive grid is to have as well."""
        most = self.record.dense_tail or 0
        legs = {leg for order in self.orders for leg in pairwise(sorted({0, *order.turns(self.steps), self.steps}))}
        ended = {(0, stop) for stop in self.stops}  # what was asked for before an experiment was extended stays
        return {step for begin, end in legs | ended for step in tail(self.grid, begin, end, most)}

    @property
    def refinement(self) -> Wanted | None:
        """What decides which further steps are computed."""
        if self.record.adaptive is None or self.record.tolerance is None:
            return None
        return Wanted(self.record.adaptive, self.record.tolerance, self.grid)

    @cached_property
    def snapshots(self) -> tuple[int, ...]:
        """The steps whose state is stored."""
        k = self.record.snapshot_every or 1
        return exactly((n for n in self.grid if n % k == 0 or n in self.stops), self.steps)

    @property
    def run_seeds(self) -> list[tuple[int, int]]:
        """The (init seed, data seed) of each seed."""
        return list(zip(self.init_seeds, self.seeds, strict=True))

    @property
    def init_seeds(self) -> tuple[int, ...]:
        """The init seed of each seed."""
        return tuple(seed if self.init_seed is None else self.init_seed for seed in self.seeds)

    @cached_property
    def live(self) -> LiveProblem:
        """The problem on the CPU."""
        return self.problem.build(torch.device("cpu"))

    @property
    def metrics(self) -> Mapping[str, int | None]:
        """Metric → examples that it averages."""
        return self.live.examples

    def config(self) -> dict[str, Any]:
        """Return the experiment as the plain data that is stored with it."""
        return {
            "name": self.name,
            "problem": describe(self.problem),
            "operator": describe(self.operator),
            "steps": self.steps,
            "orders": [str(order) for order in self.orders],
            "seeds": list(self.seeds),
            "init_seed": self.init_seed,
            "stops": list(self.stops),
            "variant_of": self.variant_of,
            "record": self.record.described(),
        }


def of_today(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored configuration as it would be stored by now: with the fields that were added since."""
    tables = {kind: completed(kind, config[kind]) for kind in ("problem", "operator") if kind in config}
    variant = {"variant_of": family_of(str(config["name"])) if maker_of(config) == "problem" else None}
    return {**variant, **config, **tables, "record": defaults(Record) | dict(config["record"])}


def check_name(name: str) -> None:
    """Refuse an experiment name that could leave its place in the store."""
    if not is_name(name) or name == "zarr.json":
        raise ConfigurationError(
            f"experiment name {name!r}: use up to 100 letters, digits, '-', '_' and single '.', "
            "beginning with a letter or digit"
        )


def read_toml(path: Path) -> dict[str, Any]:
    """Read an experiment file; its name without the ending is the experiment's unless it says otherwise."""
    try:
        return {"name": path.stem} | tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from None


def _orders(given: Any) -> tuple[Order, ...]:  # noqa: ANN401
    labels = given.split(",") if isinstance(given, str) else given
    if not isinstance(labels, list | tuple) or not all(isinstance(label, str | Order) for label in labels):
        raise ConfigurationError(f"orders is {given!r}; it must be a list of labels such as 'backward'")
    return tuple(Order.parse(label.strip()) if isinstance(label, str) else label for label in labels)


def _record(given: Any) -> Record:  # noqa: ANN401
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"record is {given!r}; it must be a table such as {{ every = 10 }}")
    return Record(**check_fields("record", Record, given))
