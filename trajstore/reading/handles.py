"""What every floor needs of a store and of an experiment: documents, arrays, locks, what counts, and what is missing.

`trajstore.store` has the same with the views on top. What lies below it takes these.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.errors import GroupNotFoundError

from trajstore._common.system import refuse_too_many, system_told
from trajstore.errors import (
    ConfigurationError,
    ConflictError,
    DamageError,
    FormatError,
    NotFoundError,
    TrajstoreError,
    choices,
    damage_told,
    slab_named,
)
from trajstore.experiment.grids import planned
from trajstore.experiment.trust import allow
from trajstore.storage.format.checking import checked, is_name
from trajstore.storage.format.commits import Commits, blocks, refuse_to_hold
from trajstore.storage.format.metrics import maker_of
from trajstore.storage.format.schema import APART, FORMAT, ArraySpec, Schema, check_format
from trajstore.storage.places.identity import opened, version_of
from trajstore.storage.places.opening import place_of
from trajstore.storage.places.place import DECLARING, DOCUMENT, PARTIAL, Durability, Place, slab_folder, slab_lock
from trajstore.storage.states import States
from trajstore.storage.writing.fills import stored_fills
from trajstore.storage.writing.late_metrics import LateSeries
from trajstore.storage.writing.segment import array_of

if TYPE_CHECKING:
    import torch

__all__ = [
    "DECLARED",
    "ExperimentHandle",
    "Progress",
    "SlabStatus",
    "Standing",
    "StoreHandle",
    "check_place",
    "check_portable",
    "open_root",
    "refuse_alike",
    "refuse_foreign",
    "refuse_new",
    "standing",
    "unreadable_told",
]


def check_place(store: StoreHandle) -> None:
    """Refuse a path at which something else than a store is."""
    place = store.place
    place.check()
    if not store.is_missing():
        if not place.exists(DOCUMENT):
            raise FormatError(f"{place} is a folder with other contents, not a trajstore; choose another path")
        _ = store.root


def open_root(path: str | Path | Place, durability: Durability = "segment") -> zarr.Group:
    """Open the root group for writing, creating the store where there is nothing yet."""
    place = place_of(path)
    keeper: Any = place.keeper(read_only=False, durability=durability)
    if not place.exists(DOCUMENT):
        # In one write: whoever looks meanwhile sees no store yet, or a whole one.
        zarr.create_group(keeper, zarr_format=3, attributes={"trajstore": {"format": FORMAT}})
        keeper.flush()
    return zarr.open_group(keeper, mode="r+", zarr_format=3)


_RESERVED = re.compile(r"(?i)con|prn|aux|nul|com[0-9]|lpt[0-9]")
"""Names that Windows keeps for devices, whatever they end in."""
Standing = Literal["nothing", "foreign", "half declared", "experiment", "damaged"]


DECLARED = "declared_steps"
"""Of a training loop's configuration: how many steps there will be, as it said. Its `steps` are room for more."""


@dataclass(frozen=True)
class Progress:
    """How far an experiment goes, and how much of it there is. Everything that shows a count asks for this."""

    steps: int
    """The last step: as declared, and of a training loop the last one that is committed in any slab."""
    places: int
    """How many of the steps up to there have a place for a state."""
    recorded: NDArray[np.int64]
    """(order, seed): how many steps are committed."""
    wanted: NDArray[np.int64]
    """(order, seed): how many were to be recorded; −1 where that is not known before the end."""
    complete: NDArray[np.bool_]
    """(order, seed)"""

    def of(self, i: int, k: int) -> str:
        """Say how far a slab is."""
        recorded, wanted = int(self.recorded[i, k]), int(self.wanted[i, k])
        counts = f"{recorded:,}" if wanted < 0 else f"{recorded:,} of {wanted:,}"
        return counts if self.complete[i, k] else f"{counts}, not complete"


@dataclass(frozen=True)
class SlabStatus:
    """How far one (order, seed) is."""

    order: str
    seed: int
    last_step: int
    """−1 where nothing is committed."""
    recorded: int
    """How many steps are committed."""
    complete: bool
    diverged_at: int | None
    """The first committed step with a metric that is not finite."""


class StoreHandle:
    """The experiments at a path or URL."""

    def __init__(self, path: str | Path | Place, *, trust: bool = False) -> None:
        self.place, self.trusted = place_of(path), trust

    @classmethod
    def opened(cls, path: str | Path, *, trust: bool = False) -> Self:
        """Return one that is there; raise where none is."""
        store = cls(path, trust=trust)
        _ = store.root
        return store

    def __str__(self) -> str:
        return str(self.place)

    @contextmanager
    def declaring(self) -> Iterator[None]:
        """Hold the lock of whoever changes shapes or attributes."""
        self.place.sweep()  # first of all: what is to be written may need the room
        with self.place.lock(DECLARING, f"store {self}", patience=60):
            yield

    def is_missing(self) -> bool:
        """Tell whether no store is there, and nothing else either."""
        return not self.place.exists(DOCUMENT) and self.place.is_empty()

    @cached_property
    def root(self) -> zarr.Group:
        """The root group, read-only."""
        if self.is_missing():
            raise NotFoundError(f"there is no store at {self}; record one, or check the path")
        try:
            group = zarr.open_group(self.place.keeper(read_only=True), mode="r", zarr_format=3)
        except (GroupNotFoundError, NotADirectoryError, FileNotFoundError):
            raise FormatError(f"{self} is not a trajstore (it has no Zarr v3 group)") from None
        except TrajstoreError:
            raise
        except OSError as error:
            refuse_too_many(error, self.place.address)
            raise
        except (ValueError, TypeError, LookupError, AttributeError, AssertionError, RuntimeError) as error:
            raise DamageError(f"{self}: zarr.json is damaged ({' '.join(str(error).split())})") from None
        if "trajstore" not in group.attrs:
            raise FormatError(f"{self} is a Zarr group, but not a trajstore")
        attributes: Any = group.attrs["trajstore"]
        check_format(attributes, str(self))
        return group

    def __iter__(self) -> Iterator[str]:
        """Yield the names of the experiments, damaged ones too: a store that hides them would look sound."""
        _ = self.root
        return iter(self.names())

    def names(self) -> list[str]:
        """Return the names of the experiments, whatever the root document says."""
        return [name for name in self.place.folders() if self._is_one(name)]

    def experiments(self) -> Iterator[tuple[str, ExperimentHandle | FormatError]]:
        """Yield the experiments by name, each read once; of a damaged one, what is wrong with it."""
        _ = self.root
        for name in self.place.folders():
            left_out, one = dict[str, str](), None
            with unreadable_told(name, left_out):  # the others can be read all the same
                one = self._opened(name) if self._is_one(name) else None
            if left_out:
                yield name, DamageError(left_out[name])
            elif one is not None:
                yield name, one

    def _is_one(self, name: str) -> bool:
        try:
            return is_name(name) and standing(self.place, name) in ("experiment", "damaged")
        except TrajstoreError:
            raise
        except OSError as error:
            refuse_too_many(error, name)
            return True  # it may be one, and hides no other: whoever opens it is told

    def __contains__(self, name: object) -> bool:
        _ = self.root
        return isinstance(name, str) and self._is_one(name)

    def __getitem__(self, name: str) -> ExperimentHandle:
        if name not in self:
            raise NotFoundError(f"no experiment {name!r} in {self}; {choices(name, self)}")
        return self._opened(name)

    def _opened(self, name: str) -> ExperimentHandle:
        where = f"experiment {name!r} in {self}"
        with _reading(where):
            keeper: Any = self.place.keeper(read_only=True)  # its own, which knows what was opened
            version = version_of(self.place, name)
            try:
                group = zarr.open_group(keeper, path=name, mode="r", zarr_format=3)
            except GroupNotFoundError:
                lost = f"{where} has lost its zarr.json; restore it from a copy, or move the folder away"
                raise DamageError(lost) from None
            attributes: Any = group.attrs["trajstore"]
            check_format(attributes, where, APART)
            checked(attributes)
            keeper.expected.identities[name] = opened(self.place, name, attributes, version)
            experiment = self._experiment(group)
            _ = experiment.schema  # refuses what could not be read
        if self.trusted:
            ids = [fill["id"] for fill in experiment.fills]
            allow(attributes["config"]["problem"], ids, self.place.address)
        return experiment

    def _experiment(self, group: zarr.Group) -> ExperimentHandle:
        """Return an experiment of this store, by its group."""
        return ExperimentHandle(self, group)

    def variants(self, name: str) -> Mapping[str, ExperimentHandle]:
        """Return the experiments that are variants of this name, by their own names in it, or the one of this name."""
        found = {one.removeprefix(f"{name}."): self[one] for one, of in self.families().items() if of == name}
        return found or {name: self[name]}  # which says what there is

    def families(self) -> dict[str, str]:
        """Return which experiments are variants, and of what: name → the name that they share."""
        # A damaged one says so itself where it is asked.
        found = {name: None if isinstance(one, FormatError) else one.variant_of for name, one in self.experiments()}
        return {name: of for name, of in found.items() if of is not None}


class ExperimentHandle:
    """One experiment of a store."""

    def __init__(self, store: StoreHandle, group: zarr.Group) -> None:
        self.store = store
        self.group = group
        self.name = group.basename

    @property
    def attributes(self) -> dict[str, Any]:
        """What is stored beside the arrays: configuration, schema, provenance of every fill."""
        return {**self.document, "fills": self.fills}

    @property
    def document(self) -> dict[str, Any]:
        """What is stored beside the arrays, but for fills that lie apart; in attributes they are, too."""
        stored: Any = self.group.attrs["trajstore"]
        return dict(stored)

    @cached_property
    def fills(self) -> list[dict[str, Any]]:
        """Who recorded which slabs, where and with what: as it was noted when this was opened, or asked for first."""
        with _reading(f"experiment {self.name!r} in {self.store}"):
            return stored_fills(self.group)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration."""
        return dict(self.document["config"])

    @property
    def variant_of(self) -> str | None:
        """The name that this experiment shares with other variants; None where it is no variant."""
        config = self.config
        if "variant_of" in config:
            return str(config["variant_of"]) if config["variant_of"] is not None else None
        from trajstore.experiment.presets import family_of

        return family_of(self.name) if maker_of(config) == "problem" else None

    @property
    def problem(self) -> str:
        """The name of the problem: its family, or the function that makes it."""
        return _name_of(self.config["problem"])

    @property
    def operator(self) -> str:
        """The name of the operator's family."""
        return _name_of(self.config["operator"])

    @cached_property
    def schema(self) -> Schema:
        """The shapes, labels and layout."""
        with _reading(f"experiment {self.name!r} in {self.store}"):
            return Schema.of(self.group)

    def commits(self, slab: tuple[int, int] | None = None) -> Commits:
        """Read the commit records as they are now, all or those of a slab, by the positions of its order and seed."""
        if slab is None and self.schema.made_by != "problem":
            _ = self.fills  # before the records: of what ended by then, they tell all
        with _reading(f"experiment {self.name!r} in {self.store}"):
            return Commits.of(self.group, self.schema, slab)

    def complete(self, commits: Commits) -> NDArray[np.bool_]:
        """Return (order, seed): everything that was to be recorded is; for a training loop, that it came to its end."""
        ended = self.ended()
        if ended is None:
            return commits.complete
        schema, last = self.schema, commits.last_step
        finished = np.zeros_like(last, dtype=bool)
        for i, k in np.ndindex(*finished.shape):
            step = int(last[i, k])
            came = (schema.orders[i], schema.seeds[k]) in ended and step >= 0
            # A repair may have taken something out since.
            finished[i, k] = came and bool((commits.records[i, k][: schema.segment_of(step), 0] >= 0).all())
        return finished

    def progress(self, commits: Commits | None = None) -> Progress:
        """Tell how far the experiment is, by its commit records as they are now."""
        commits = commits or self.commits()
        steps, complete = self.ends_at(commits.last_step.ravel().tolist()), self.complete(commits)
        recorded = commits.steps.sum(axis=-1)
        wanted = np.full_like(recorded, -1)
        config, record = self.config, self.config["record"]
        if self.schema.made_by == "loop" and config.get(DECLARED):
            wanted[recorded == commits.last_step + 1] = steps + 1  # it records every step, so far
        elif self.schema.made_by == "problem" and record.get("adaptive") is None and not complete.all():
            listed = (record.get("steps"), record.get("log_until"), record.get("every", 1))
            wanted[:] = len(planned(steps, *listed, stops=config.get("stops", ())))
        places = sum(step <= steps for step in self.schema.snapshots)
        return Progress(steps, places, recorded, np.where(complete, recorded, wanted), complete)

    def ends_at(self, committed: Iterable[int]) -> int:
        """Return the last step: as declared, and of a training loop at least the last one that is committed.

        `committed` is the last committed step of each slab, −1 for none. A loop that did not say how long it will be
        has room for more steps than it takes.
        """
        if self.schema.made_by != "loop":
            return self.schema.steps
        return min(self.schema.steps, max(0, self.config.get(DECLARED) or 0, *committed))

    def ended(self) -> set[tuple[str, int]] | None:
        """Return the slabs whose loop or import came to its end; None where a number of steps decides instead."""
        if self.schema.made_by == "problem":
            return None
        latest = {(order, seed): fill["ended"] for fill in self.fills for order, seed in fill["slabs"]}
        return {slab for slab, ended in latest.items() if ended is not None}

    def slabs(self, commits: Commits | None = None) -> list[SlabStatus]:
        """Return the status of every (order, seed), by its commit records as they are now."""
        commits = commits or self.commits()
        last, complete = commits.last_step, self.complete(commits)
        infinite = np.zeros_like(commits.steps)
        for some in blocks((len(self.schema.orders), len(self.schema.seeds)), self.schema.steps + 1):
            measured, counts = self._values("measured", some), commits.steps[some]
            for bit, metric in enumerate(self.schema.metrics):
                infinite[some] |= counts & (measured >> bit & 1 > 0) & ~np.isfinite(self._values(metric, some))
        return [
            SlabStatus(
                order,
                seed,
                int(last[i, k]),
                int(commits.steps[i, k].sum()),
                bool(complete[i, k]),
                int(np.argmax(infinite[i, k])) if infinite[i, k].any() else None,
            )
            for i, order in enumerate(self.schema.orders)
            for k, seed in enumerate(self.schema.seeds)
        ]

    def late(self) -> dict[str, tuple[NDArray[np.bool_], NDArray[np.float64]]]:
        """Return the late metrics: for which (order, seed, step) there is a value, and the values."""
        schema, found = self.schema, {}
        numbers = len(schema.late) * math.prod(self._shape)  # each with a yes or no
        refuse_to_hold(self.group, 9 * numbers, f"{len(schema.late):,} metrics that came later")
        for name in schema.late:
            slabs = product(range(len(schema.orders)), range(len(schema.seeds)))
            series = [LateSeries(self.group, schema, slab, name).read() for slab in slabs]
            known, values = (np.stack(part).reshape(self._shape) for part in zip(*series, strict=True))
            found[name] = known, values
        return found

    def array(self, spec: ArraySpec) -> zarr.Array[Any]:
        """Return an array, which is as long as was declared, or longer where the experiment is just growing."""
        with _reading(f"experiment {self.name!r} in {self.store}"):
            return array_of(self.group, spec.name, self.schema)

    def _values(self, name: str, where: tuple[slice, slice, slice]) -> np.ndarray[Any, Any]:
        spec = next(spec for spec in self.schema.arrays() if spec.name == name)
        array = self.array(spec)
        with _reading(f"experiment {self.name!r} in {self.store}"):
            return np.asarray(array[where])

    @property
    def _shape(self) -> tuple[int, int, int]:
        return len(self.schema.orders), len(self.schema.seeds), self.schema.steps + 1

    @contextmanager
    def locked(self, order: str, seed: int) -> Iterator[None]:
        """Hold the lock of a slab."""
        what = slab_named(self.name, order, seed)
        with self.store.place.lock(slab_lock(self.name, order, seed), what) as also:
            also(self.slab_folder(order, seed))
            yield

    def slab_folder(self, order: str, seed: int) -> str:
        """Return the folder of a slab's commit records, as a key of the store."""
        corner = self.schema.orders.index(order), self.schema.seeds.index(seed)
        return slab_folder(self.name, corner)

    def arrays(self, *, order: str, seed: int, step: int) -> dict[str, np.ndarray[Any, Any]]:
        """Return one stored state as named NumPy arrays."""
        return self.schema.layout.unflatten(*self._state(order=order, seed=seed, step=step))

    def _state(self, *, order: str, seed: int, step: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return one stored state as flat vectors."""
        schema = self.schema
        i = _position(self.name, "order", order, schema.orders)
        k = _position(self.name, "seed", seed, schema.seeds)
        at = slab_named(self.name, order, seed)
        there = np.array(schema.snapshots)[self.commits((i, k)).snapshots[0, 0]].tolist()
        if step not in there:
            commits = self.commits()  # where an experiment ends, all of its slabs say
            complete = bool(self.complete(commits)[i, k])
            ends = self.ends_at(commits.last_step.ravel().tolist())
            raise NotFoundError(f"{at}: {self._why_not(step, there, ends, complete=complete)}")
        s = schema.snapshots.index(step)
        arrays = {spec.name: spec for spec in schema.arrays()}
        params, counters = self.array(arrays["params"]), self.array(arrays["counters"])
        with _reading(at):
            states = States.of(self.store.place, params, schema.codec)
            return states[i, k, :, s], np.asarray(counters[i, k, :, s]).astype(np.int64)

    def _why_not(self, step: int, there: Sequence[int], ends: int, complete: bool) -> str:
        """Say why there is no state of a step in a slab that has some others, and what to do."""

        def nearest(steps: Sequence[int]) -> int:
            return min(steps, key=lambda other: abs(other - step))

        if self.schema.made_by == "import" and there:
            how = self.go_on if step > there[-1] else "for others, import everything again under another name"
            return f"step {step} was not imported; the nearest that was is step {nearest(there)}; {how}"
        if self.schema.made_by != "import" and step not in self.schema.snapshots:
            places = [place for place in self.schema.snapshots if place <= ends]
            return f"no state is stored for step {step}; the nearest is step {nearest(places)}"
        if complete:
            return f"step {step} was not computed; the nearest that was is step {nearest(there)}"
        return f"step {step} is not recorded yet; {self.go_on}"

    @property
    def go_on(self) -> str:
        """What to do about steps that are not there yet, as an error says it."""
        return "import checkpoints of it" if self.schema.made_by == "import" else f"go on with {self.schema.again}"

    def state_dict(self, *, order: str, seed: int, step: int) -> dict[str, torch.Tensor]:
        """Return one stored state for `module.load_state_dict`, strict."""
        from trajstore.storage.tensors import state_dict

        return state_dict(self.schema.layout, *self._state(order=order, seed=seed, step=step))

    def bytes_on_disk(self) -> int:
        """Return the size of the experiment's files: what they hold."""
        return sum(size for _, size in self.store.place.files(self.name))

    def bytes_taken(self) -> int:
        """Return what the disk takes for the experiment: small files and folders take whole blocks."""
        return self.store.place.taken(self.name)


def _reading(where: str) -> AbstractContextManager[None]:
    return damage_told(where, "move its folder away, or restore it", FileNotFoundError)


@contextmanager
def unreadable_told(name: str, left_out: dict[str, str]) -> Iterator[None]:
    """Go on where an experiment cannot be read, and put down why; not where nothing could be."""
    try:
        yield
    except FormatError as error:
        left_out[name] = str(error) if f"experiment {name!r}" in str(error) else f"experiment {name!r}: {error}"
    except TrajstoreError:
        raise
    except OSError as error:
        refuse_too_many(error, name)
        left_out[name] = f"experiment {name!r} cannot be read: {system_told(error)}"


def standing(place: Place, name: str) -> Standing:
    """Tell what is at an experiment's place."""
    try:
        document = place.read(f"{name}/{DOCUMENT}")
    except FormatError:
        return "damaged"  # a link: whoever opens it is told
    if document is None:
        there = [key for key, _ in place.files(name) if not key.endswith(PARTIAL)]
        if f"{name}/committed/{DOCUMENT}" in there:
            return "damaged"  # it was an experiment, and lost its document
        return "foreign" if there else "nothing"
    try:
        mark = json.loads(document).get("attributes", {}).get("trajstore")
    except (ValueError, AttributeError, RecursionError):
        return "damaged"
    if not isinstance(mark, dict):
        return "foreign"
    return "half declared" if "declaring" in mark else "experiment"


def refuse_foreign(store: StoreHandle, name: str) -> None:
    """Refuse to write where something else is."""
    if standing(store.place, name) == "foreign":
        raise ConflictError(
            f"{store}/{name} exists but is not an experiment, or has lost its zarr.json; "
            "move it away, or choose another name"
        )


def refuse_new(store: StoreHandle, name: str, metrics: Iterable[str] = ()) -> None:
    """Refuse names of a new experiment, and of its metrics, that could not be copied to every file system."""
    check_portable("experiment", name)
    for metric in metrics:
        check_portable("metric", metric)
    refuse_alike(store, name)


def check_portable(what: str, name: str) -> None:
    """Refuse a name that no folder can have on Windows."""
    if name.endswith(".") or _RESERVED.fullmatch(name.partition(".")[0]):
        raise ConfigurationError(
            f"{what} name {name!r}: no folder on Windows can have it, so the store could not be copied there; "
            "choose another name"
        )


def refuse_alike(store: StoreHandle, name: str) -> None:
    """Refuse a name that differs from another one in the store, or from a lock's, only by upper and lower case."""
    if name.casefold() == DECLARING:
        raise ConfigurationError(f"experiment name {name!r}: a lock of the store has that name; choose another name")
    there = [DOCUMENT, *([] if store.is_missing() else store.place.folders())]
    for other in there:
        if other != name and other.casefold() == name.casefold():
            raise ConflictError(
                f"experiment name {name!r}: {store} has {other!r} already, and to Windows and macOS that is the same; "
                "choose another name"
            )


def _name_of(table: dict[str, Any]) -> str:
    return str(table.get("function") or table.get("family") or table.get("object"))


def _position(experiment: str, what: str, value: str | int, known: tuple[str, ...] | tuple[int, ...]) -> int:
    try:
        return list(known).index(value)
    except ValueError:
        hint = choices(str(value), map(str, known))
        raise NotFoundError(f"experiment {experiment!r} has no {what} {value!r}; {hint}") from None
