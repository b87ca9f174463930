"""Verify: is everything that was committed still there, bit for bit?

Everything is read: documents are compared with those that a declaration would write, chunks with their checksums,
steps with the digest in their commit record. What is found names the experiment, the slab, the steps and the file.
Repairing takes out what is wrong, so that it counts no more and a recording writes it again; it never guesses. Wrong is
only what is read twice, and is wrong both times: a disk that fails to read says nothing of what it holds. What is
taken out is moved aside, into a folder that nothing reads.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from itertools import product
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
import zarr
from zarr.abc.buffer import Buffer as AnyBuffer
from zarr.buffer.cpu import Buffer
from zarr.storage import MemoryStore

from trajstore._common.system import refuse_too_many, system_told
from trajstore.errors import (
    ConfigurationError,
    DamageError,
    NotFoundError,
    OpenFilesError,
    TrajstoreError,
    UnreachableError,
    choices,
)
from trajstore.reading.handles import ExperimentHandle, Standing, StoreHandle, open_root, standing
from trajstore.storage.format.checking import checked, is_name
from trajstore.storage.format.schema import FORMAT, LATE_SPAN, Schema, late_records
from trajstore.storage.packing import doubled, is_packed, lay_out, unreadable
from trajstore.storage.places.place import DOCUMENT, PARTIAL, TAKEN_OUT, Place, Stray, keeper_of
from trajstore.storage.states import States
from trajstore.storage.writing import fills
from trajstore.storage.writing.declaring import ATTRIBUTE, declare, sound_attributes, stored_batches
from trajstore.storage.writing.late_metrics import LateSeries, unnoted
from trajstore.storage.writing.resume_slots import GROUP, ResumeSlots, create_slot
from trajstore.storage.writing.segment import Corner, array_of
from trajstore.storage.writing.slab_writer import Ledger, discard_slab

__all__ = ["Finding", "verify"]

T = TypeVar("T")
_DECODING = (ValueError, RuntimeError, LookupError, TypeError, ArithmeticError)
"""What zarr and its codecs raise on bytes that are not what was written."""
_TRIES = 2
"""Whatever is found wrong is read again."""
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
"""How a system says that nothing may be written, or that nothing more fits."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or worth knowing."""

    experiment: str | None
    what: str
    file: str | None = None
    """Relative to the store."""
    order: str | None = None
    seed: int | None = None
    steps: tuple[int, int] | None = None
    """First and last."""
    harmless: bool = False
    """Nothing that was committed is touched."""
    repaired: bool = False

    def __str__(self) -> str:
        slab = "" if self.order is None else f", order {self.order!r}, seed {self.seed}"
        steps = "" if self.steps is None else f", steps {self.steps[0]} to {self.steps[1]}"
        where = "the store" if self.experiment is None else f"experiment {self.experiment!r}{slab}{steps}"
        file = "" if self.file is None else f" ({self.file})"
        return f"{where}: {self.what}{file}{'; taken out' if self.repaired else ''}"


def verify(store: StoreHandle, name: str | None = None, *, repair: bool = False) -> Iterator[Finding]:
    """Yield what is found in a store, or in one of its experiments; repair what can be repaired."""
    place = store.place
    place.check()
    if store.is_missing() or not store.names():
        _ = store.root  # says what is there instead of a store
    names = store.names()
    if name is not None and name not in names:
        raise NotFoundError(f"no experiment {name!r} in {store}; {choices(name, names)}")
    if repair:
        place.make()  # refuses where nothing can be repaired
    yield from _root(store, repair)
    if name is None:
        yield from _beside_experiments(store, repair)
    for experiment in [name] if name is not None else names:
        yield from _Verifying(store, experiment, repair).everything()
    if name is None:
        yield from _index(store, repair)


def _index(store: StoreHandle, repair: bool) -> Iterator[Finding]:
    """Compare the index for SQL, if there is one, with the store."""
    from trajstore.reading.sql.comparing import differences, discard

    if _read_document(store.place, DOCUMENT) is None:
        return  # nothing can be asked
    for found in [*differences(store)]:
        if repair:
            discard(store)
        yield Finding(None, found.what, str(found.path), harmless=not found.wrong, repaired=repair)


def _root(store: StoreHandle, repair: bool) -> Iterator[Finding]:
    expected = {"attributes": {ATTRIBUTE: {"format": FORMAT}}, "zarr_format": 3, "node_type": "group"}
    if _read_document(store.place, DOCUMENT) != expected:
        if repair:
            with store.declaring():
                store.place.delete(DOCUMENT)
                open_root(store.place)
        yield Finding(None, "the root document is damaged", DOCUMENT, repaired=repair)


_STRAYS: Mapping[Stray, tuple[str, bool]] = {
    "file": ("this file is not the store's, and is not read; move it away", True),
    "link to a file": ("a symbolic link is not the store's, and nothing is read through it; remove it", True),
    "link to nothing": (
        "a symbolic link leads nowhere; if it led to an experiment, put that here, or remove it",
        False,
    ),
    "device": ("this is neither a file nor a folder, and is not read; remove it", True),
}
"""What else lies where experiments do → what to say of it, and whether that is harmless."""


def _beside_experiments(store: StoreHandle, repair: bool) -> Iterator[Finding]:
    """Name what lies where experiments do, and is none."""
    place = store.place
    left = place.leftovers()
    if left and repair:
        place.sweep()
    still = place.leftovers() if repair else left
    for folder in left:
        told = "left of something that was removed; the next recording, or `verify --repair`, deletes it"
        name = folder.removeprefix(f"{place.address}/")
        yield Finding(None, told, name, harmless=True, repaired=folder not in still)
    for folder in place.folders():
        if f"{place.address}/{folder}" in left:
            continue
        if not is_name(folder) or _stands(place, folder) == "foreign":
            told = "this is no experiment, or its document is damaged; restore that, or move the folder away"
            yield Finding(None, told, folder)
        elif _stands(place, folder) == "half declared":
            if repair:
                with store.declaring():  # whoever declares it is waited for
                    if _stands(place, folder) == "half declared":
                        place.remove(folder)
            told = "it is declared half, or removed half, and nothing of it counts; `verify --repair` deletes it"
            yield Finding(None, told, folder, harmless=True, repaired=repair)
    for name, kind in place.strays():
        if name.endswith(PARTIAL) and kind == "file":
            if repair:
                place.delete(name)
            yield Finding(None, "left by a writer that was killed", name, harmless=True, repaired=repair)
            continue
        told, harmless = _STRAYS[kind]
        yield Finding(None, told, name, harmless=harmless)


def _stands(place: Place, folder: str) -> Standing | None:
    """Tell what is in a folder; None where that cannot be read, which is told with what is in it."""
    try:
        return standing(place, folder)
    except TrajstoreError:
        raise
    except OSError:
        return None


class _Verifying:
    """One experiment under examination."""

    def __init__(self, store: StoreHandle, name: str, repair: bool) -> None:
        self.store, self.place, self.name, self.repair = store, store.place, name, repair
        self._told: set[str] = set()
        self._ended: dict[tuple[str, int], bool] = {}
        """Slab that a fill names → whether one of them came to its end."""
        self._mark = f"{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}-{uuid4().hex[:6]}"
        """Where what this repair takes out is kept."""

    def everything(self) -> Iterator[Finding]:
        try:
            yield from self._everything()
        except DamageError as error:
            yield Finding(self.name, str(error), f"{self.name}/{DOCUMENT}")
        except TrajstoreError:
            raise
        except OSError as error:
            refuse_too_many(error, self.store.place.address)
            if self.repair and error.errno in _REFUSED:
                # not what is there is wrong, but what was to be written
                raise ConfigurationError(f"cannot repair {self.store}: {system_told(error)}") from None
            yield self._unread(error, f"{self.name}/{DOCUMENT}")
        except _DECODING as error:
            yield Finding(self.name, f"it cannot be read: {' '.join(str(error).split())}", f"{self.name}/{DOCUMENT}")

    def _everything(self) -> Iterator[Finding]:
        if links := self.place.links(self.name):  # nothing could be said of the rest
            what = "a link, or no regular file: nothing is read through it; put there what it leads to"
            yield from (Finding(self.name, what, link) for link in links)
            return
        document = _read_document(self.place, f"{self.name}/{DOCUMENT}")
        try:
            attributes = document["attributes"][ATTRIBUTE]
            sound = sound_attributes(attributes) and document == {
                "attributes": {"coordinates": "init_seed data_seed", ATTRIBUTE: attributes},
                "zarr_format": 3,
                "node_type": "group",
            }
        except (KeyError, TypeError):
            sound = False
        if not sound:
            # The configuration is gone with it: nothing could be said of the rest.
            yield Finding(self.name, "its document is damaged; restore it from a copy", f"{self.name}/{DOCUMENT}")
            return
        checked(attributes)
        if is_packed(self.place.keeper(read_only=True), self.name):
            if self.repair:  # which lays it out as files: not for nothing
                found = [*_Verifying(self.store, self.name, repair=False).everything()]
                if all(finding.harmless for finding in found):
                    yield from found
                    return
            found = [*self._packed()]
            yield from found
            if not self.repair and not all(finding.harmless for finding in found):
                return  # nothing could be said of the rest
        self._note(attributes.get("fills", ()))
        with ExitStack() as locks:
            if self.repair:
                locks.enter_context(self.store.declaring())
                for order, seed in product(self.schema.orders, self.schema.seeds):
                    locks.enter_context(self.stored.locked(order, seed))
            yield from self._documents()
            yield from self._labels()
            yield from self._noted()
            for i, k in product(range(len(self.schema.orders)), range(len(self.schema.seeds))):
                yield from self._slab(i, k)
            yield from self._chunks()
            for order, seed in product(self.schema.orders, self.schema.seeds):
                yield from self._slots(order, seed)
            yield from self._files()

    def _packed(self) -> Iterator[Finding]:
        """Tell how it is packed; when repairing, have it lie in files, as far as it can be read."""
        keeper = self.place.keeper(read_only=not self.repair)
        if self.repair:
            with self.store.declaring():
                yield from self._documents()  # without which what is packed could not be read
                lost = unreadable(keeper, self.name)
                lay_out(keeper, self.name, give_up=self._set_aside)
        else:
            lost = unreadable(keeper, self.name)
        for file, why in lost.items():
            yield self._found(f"nothing of what is packed in it can be found ({why}); {self._gone}", file)
        for file in doubled(keeper, self.name):
            what = "what is packed in it lies in files as well; `trajstore pack`, with or without --undo, ends that"
            yield self._found(what, file, harmless=True)

    @cached_property
    def group(self) -> zarr.Group:
        keeper = self.place.keeper(read_only=not self.repair)
        return zarr.open_group(keeper, path=self.name, mode="r+" if self.repair else "r", zarr_format=3)

    @cached_property
    def stored(self) -> ExperimentHandle:
        return ExperimentHandle(self.store, self.group)

    @cached_property
    def schema(self) -> Schema:
        return Schema.of(self.group)

    @property
    def _gone(self) -> str:
        how = self.schema.again
        return f"{how if self.schema.made_by == 'import' else f'recording it again with {how}'} writes it anew"

    @cached_property
    def expected(self) -> dict[str, Any]:
        """Path of a document in the experiment → its contents, as a declaration writes it."""
        written: dict[str, AnyBuffer] = {}
        memory = MemoryStore(written)
        attributes: Any = self.group.attrs[ATTRIBUTE]
        root = zarr.open_group(memory, mode="w", zarr_format=3)
        declare(root, self.name, self.schema, attributes["config"], [])
        found = {}
        for key, content in written.items():
            parent, _, last = key.partition("/")[2].rpartition("/")
            if last == DOCUMENT and key.startswith(f"{self.name}/") and parent:
                found[f"{parent}/{DOCUMENT}"] = json.loads(content.to_bytes())
        return found

    def _documents(self) -> Iterator[Finding]:
        """Compare the documents of all arrays with those that were declared."""
        for path, expected in self.expected.items():
            file = f"{self.name}/{path}"
            try:
                found = unnoted(_read_document(self.place, file))
                if found != expected:
                    found = unnoted(_read_document(self.place, file))
            except OSError as error:
                yield self._unread(error, file)
                continue
            if found != expected:
                if self.repair:
                    self._set_aside(file, keep=True)
                    keeper_of(self.group).set_sync(file, Buffer.from_bytes(json.dumps(expected, indent=2).encode()))
                if _equal(found, expected):
                    yield self._found("a document says the same in other words than this zarr's", file, harmless=True)
                elif _grown(found, expected):
                    yield self._found("it has begun to grow, and its declaration does not say so", file, harmless=True)
                else:
                    yield self._found("a document is damaged or missing", file)

    def _labels(self) -> Iterator[Finding]:
        """Compare the coordinates with the schema, and the batches with their digests."""
        for name, (_, values, _) in self.schema.coordinates().items():
            try:
                sound = any(self._reads_as(name, values) for _ in range(_TRIES))
            except OSError as error:
                yield self._unread(error, f"{self.name}/{name}")
                continue
            if not sound:
                if self.repair:
                    for file, _ in self.place.files(f"{self.name}/{name}/c"):
                        self._set_aside(file)
                    array_of(self.group, name)[...] = values
                yield self._found(f"the coordinate {name!r} is damaged", f"{self.name}/{name}")
        for k, seed in enumerate(self.schema.seeds if self.schema.batch_size else ()):
            try:
                batches, _ = _twice(partial(stored_batches, self.group, self.schema, k))
            except OSError as error:
                yield self._unread(error, f"{self.name}/batch_index", seed=seed)
                continue
            if batches is None:  # what it held is gone: only the problem could draw it again
                yield self._found("the record of its batches is damaged; restore it", f"{self.name}/batch_index",
                                  repaired=False, seed=seed)  # fmt: skip

    def _noted(self) -> Iterator[Finding]:
        """Read who recorded what, where that lies apart from the document."""
        if self._apart:
            for number in fills.block_numbers(self.group):
                file = fills.block_of(self.group, number)
                try:
                    found, wrong = _twice(partial(fills.read_block, self.group, number))
                except OSError as error:
                    yield self._unread(error, file)
                    continue
                if found is None:
                    if self.repair:
                        self._set_aside(file)
                        fills.put_block(self.group, number, [])
                    yield self._found(f"who recorded some of the slabs cannot be read any more ({wrong})", file)
                self._note(found or [])

    def _note(self, fills: Iterable[Mapping[str, Any]]) -> None:
        for fill in fills:
            for order, seed in fill["slabs"]:
                self._ended[order, seed] = self._ended.get((order, seed), False) or fill["ended"] is not None

    def _unnoted(self, ledger: Ledger, slab: Mapping[str, Any]) -> Iterator[Finding]:
        """Tell of a slab that is recorded, and of which nothing says by whom."""
        if self._apart and ledger.last_step >= 0 and (slab["order"], slab["seed"]) not in self._ended:
            what = "nothing says who recorded it: its merge was stopped, then merge again, or a block is lost"
            yield self._found(what, f"{self.name}/{fills.FOLDER}", **slab, harmless=True, repaired=False)

    @property
    def _apart(self) -> bool:
        return bool(self.stored.document["format"] != FORMAT)

    def _reads_as(self, name: str, values: np.ndarray[Any, Any]) -> bool:
        try:
            return np.array_equal(np.asarray(array_of(self.group, name)[: len(values)]), values)
        except (UnreachableError, OpenFilesError):
            raise
        except _DECODING:
            return False

    def _slab(self, order: int, seed: int) -> Iterator[Finding]:
        """Compare every committed segment with its record."""
        label, number = self.schema.orders[order], self.schema.seeds[seed]
        slab: dict[str, Any] = {"order": label, "seed": number}
        try:
            ledger, wrong = _twice(lambda: Ledger(self.group, self.schema, order, seed, whole=False))
            if ledger is None:
                yield from self._records_lost((order, seed), slab, wrong)
                return
            yield from self._records_missing(ledger, slab)
            yield from self._unnoted(ledger, slab)
            yield from self._late(ledger, slab)
        except OSError as error:
            yield self._unread(error, f"{self.name}/committed", **slab)
            return
        damaged = []
        for segment in np.flatnonzero(ledger.records[:, 0] >= 0).tolist():
            begin, end = self.schema.steps_of(segment)
            try:
                if _twice(partial(ledger.segment, segment))[0] is None:
                    damaged.append(segment)
            except OSError as error:
                yield self._unread(error, self.name, **slab, steps=(begin, end - 1))
        files = {segment: self._bad_of(ledger, segment) for segment in damaged}
        if self.repair and damaged:
            for file, _ in self.place.files(f"{self.name}/committed/c/{order}/{seed}"):
                self._set_aside(file, keep=True)
            ledger.discard(damaged)
            for file in {f for those in files.values() for f in those}:
                self._set_aside(file)
        for segment, those in files.items():
            begin, end = self.schema.steps_of(segment)
            what = f"not what was committed; {self._gone}"
            yield from (self._found(what, file, **slab, steps=(begin, end - 1)) for file in those or [self.name])

    def _records_lost(self, corner: Corner, slab: Mapping[str, Any], error: DamageError | None) -> Iterator[Finding]:
        """Tell of a slab of which cannot be read what counts."""
        files = [f for name in ("committed", "leg") for f in self._bad(name, corner) if self.place.exists(f)]
        if not files:  # it is said of the document of an array
            if not any(told.endswith(DOCUMENT) for told in self._told):
                yield self._found(str(error), self.name, repaired=False, **slab)
            return
        if self.repair:
            records = [file for file, _ in self.place.files(f"{self.name}/committed/c/{corner[0]}/{corner[1]}")]
            for file in {*files, *records}:
                self._set_aside(file, keep=file in records)  # these are written over
            discard_slab(self.group, self.schema, corner)
        for file in files:
            yield self._found(f"the commit records cannot be read; {self._gone}", file, **slab)

    def _records_missing(self, ledger: Ledger, slab: Mapping[str, Any]) -> Iterator[Finding]:
        """Tell of a slab that came to its end, and of which nothing says so."""
        ended = self._ended.get((slab["order"], slab["seed"]))
        for file in self._bad("committed", ledger.corner) if ended else ():
            if self.repair:
                ledger.discard(range(self.schema.segments))
            yield self._found(f"it was recorded, and its commit records are missing; {self._gone}", file, **slab)

    def _late(self, ledger: Ledger, slab: Mapping[str, Any]) -> Iterator[Finding]:
        """Compare the late metrics of a slab with their records."""
        for name in self.schema.late:
            series = LateSeries(self.group, self.schema, ledger.corner, name)
            for span in set(series.damaged()) & set(series.damaged()):
                steps = (span * LATE_SPAN, min((span + 1) * LATE_SPAN, self.schema.steps + 1) - 1)
                if self.repair:
                    array = array_of(self.group, late_records(name))
                    self._set_aside(self._file(array, (*ledger.corner, span, 0)), keep=True)
                    series.discard(span)
                    for file in self._bad(name, ledger.corner, range(steps[0], steps[1] + 1)):
                        self._set_aside(file)
                what = f"{name!r} is not what was committed"
                yield self._found(what, f"{self.name}/{name}", **slab, steps=steps)

    def _bad_of(self, ledger: Ledger, segment: int) -> list[str]:
        """Return the files of a segment that are missing or cannot be decoded."""
        begin, end = self.schema.steps_of(segment)
        first = segment * self.schema.snapshots_per_segment
        found = []
        for spec in self.schema.arrays():
            if spec.name != "committed" and "span" not in spec.dims and {"order", "seed"} <= set(spec.dims):
                along = range(begin, end) if "step" in spec.dims else range(first, first + 1)
                found += self._bad(spec.name, ledger.corner, along)
        return found

    def _bad(self, name: str, corner: tuple[int, int], along: range | None = None) -> list[str]:
        """Return the chunks of a slab's array that are missing or cannot be decoded, as files."""
        array = array_of(self.group, name)
        chunks = [range(-(-n // c)) for n, c in zip(array.shape, array.chunks, strict=True)]
        chunks[:2] = [range(k, k + 1) for k in corner]
        if along is not None:
            at = 3 if name in ("params", "counters") else 2
            chunks[at] = range(along.start // array.chunks[at], (along.stop - 1) // array.chunks[at] + 1)
        return [
            file
            for chunk in product(*chunks)
            if not self.place.exists(file := self._file(array, chunk)) or not self._decodes(array, chunk)
        ]

    def _chunks(self) -> Iterator[Finding]:
        """Decode every chunk that is there, committed or not."""
        for path in self.expected:
            if path.startswith(GROUP):
                continue
            try:
                array = array_of(self.group, path.rpartition("/")[0])
            except DamageError:
                continue  # of which no chunk can be decoded; it was told with the documents
            chunks = f"{self.name}/{array.basename}/c"
            for file, _ in self.place.files(chunks):
                try:
                    chunk = tuple(map(int, file.removeprefix(f"{chunks}/").split("/")))
                except ValueError:
                    continue
                if len(chunk) != array.ndim or file in self._told:
                    continue
                try:
                    if self._decodes(array, chunk) or array.basename == "batch_index":  # these are found already
                        continue
                except OSError as error:
                    yield self._unread(error, file)
                    continue
                if keeper_of(self.group).expected.lost(file, self.place.read) is not None:
                    what = "a chunk was whole when it was compared, and is not now; verify again"
                    yield self._found(what, file, repaired=False)
                    continue
                if self.repair:
                    self._set_aside(file)
                yield self._found("a chunk that nothing committed needs is damaged", file)

    def _slots(self, order: str, seed: int) -> Iterator[Finding]:
        """Look at the resume states of a slab."""
        slots = ResumeSlots(self.group, order, seed)
        for path in slots.paths:
            folder = f"{self.name}/{path}"
            there = {file for file, _ in self.place.files(folder)}
            if not there:
                continue
            begun = not {f"{folder}/{DOCUMENT}", f"{folder}/c/0"} <= there
            if begun or not (slots.whole(path) and self._is_slot(path)):
                if self.repair:
                    self.place.remove(folder)
                what = "a resume state was begun and not written" if begun else "a resume state is damaged"
                spare = begun or any(other != path and slots.whole(other) for other in slots.paths)
                yield self._found(what, folder, order=order, seed=seed, harmless=spare)

    def _is_slot(self, path: str) -> bool:
        """Tell whether the document of a slot is as it would be written."""
        found = _read_document(self.place, f"{self.name}/{path}/{DOCUMENT}")
        written: dict[str, AnyBuffer] = {}
        memory = MemoryStore(written)
        create_slot(zarr.open_group(memory, mode="w", zarr_format=3), path, found["shape"][0])
        return bool(found == json.loads(written[f"{path}/{DOCUMENT}"].to_bytes()))

    def _files(self) -> Iterator[Finding]:
        """Name the files that belong to nothing."""
        known, kept = {f"{self.name}/{path}" for path in (*self.expected, DOCUMENT)}, set[str]()
        if self._apart:
            known |= {f"{self.name}/{fills.FOLDER}/{DOCUMENT}"}
            known |= {fills.block_of(self.group, number) for number in fills.block_numbers(self.group)}
        for file in (f for f, _ in self.place.files(self.name) if f not in known):
            parts = file.split("/")[1:]
            if parts[1:2] == [TAKEN_OUT]:
                if parts[2] != self._mark:
                    kept.add(f"{self.name}/{parts[0]}/{TAKEN_OUT}")
            elif file.endswith(PARTIAL) or (parts[0] == fills.FOLDER and not self._apart):
                if self.repair:
                    self.place.delete(file)
                yield self._found("left by a writer that was killed", file, harmless=True)
            elif parts[0] != GROUP and (f"{parts[0]}/{DOCUMENT}" not in self.expected or parts[1:2] != ["c"]):
                yield self._found("this file is not the store's", file, harmless=True, repaired=False)
        for folder in sorted(kept):
            what = "what a repair took out is kept here; delete the folder when nothing is missed"
            yield self._found(what, folder, harmless=True, repaired=False)

    def _decodes(self, array: zarr.Array[Any], chunk: tuple[int, ...]) -> bool:
        return any(self._decodes_once(array, chunk) for _ in range(_TRIES))

    def _decodes_once(self, array: zarr.Array[Any], chunk: tuple[int, ...]) -> bool:
        where = tuple(slice(k * c, (k + 1) * c) for k, c in zip(chunk, array.chunks, strict=True))
        if any(s.start >= n for s, n in zip(where, array.shape, strict=True)):
            return True  # beyond what is declared: a declaration that died, or one that is under way
        try:
            if array.basename == "params":
                States.of(self.place, array, self.schema.codec)[where]
            else:
                array[where]
        except (UnreachableError, OpenFilesError):
            raise
        except _DECODING:
            return False
        return True

    def _set_aside(self, file: str, *, keep: bool = False) -> None:
        self.place.set_aside(file, self._mark, keep=keep)

    def _unread(self, error: OSError, file: str, **where: Any) -> Finding:  # noqa: ANN401
        """Tell of what could not be read: whether it is sound is not known."""
        if isinstance(error, UnreachableError | OpenFilesError):
            raise error
        told = system_told(error)
        what = f"it could not be read ({told}), so that nothing is known of it, and nothing was changed; verify again"
        return self._found(what, file, repaired=False, **where)

    def _file(self, array: zarr.Array[Any], chunk: tuple[int, ...]) -> str:
        return f"{self.name}/{array.basename}/{array.metadata.encode_chunk_key(chunk)}"

    def _found(self, what: str, file: str, *, repaired: bool | None = None, **where: Any) -> Finding:  # noqa: ANN401
        self._told.add(file)
        mended = self.repair if repaired is None else repaired
        return Finding(self.name, what, file, repaired=mended, **where)


def _twice(read: Callable[[], T]) -> tuple[T | None, DamageError | None]:
    """Return what is read, or, if it is damaged twice, how."""
    wrong = None
    for _ in range(_TRIES):
        try:
            return read(), None
        except DamageError as error:
            wrong = error
    return None, wrong


def _read_document(place: Place, key: str) -> Any:  # noqa: ANN401
    try:
        return json.loads(place.read(key) or b"")
    except ValueError:
        return None


def _grown(found: Any, expected: dict[str, Any]) -> bool:  # noqa: ANN401
    """Tell whether a document is that of a longer array, or of one that has flags for more metrics."""
    try:
        longer = all(a >= b for a, b in zip(found["shape"], expected["shape"], strict=True))
        flags = found["attributes"].get("flag_meanings", "").startswith(expected["attributes"].get("flag_meanings", ""))
        same = {**found, "shape": expected["shape"], "attributes": expected["attributes"]}
        meant = same == expected or _equal(same, expected)  # zarr takes two NaN for different fill values
        return longer and flags and set(found["attributes"]) == set(expected["attributes"]) and meant
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def _equal(found: Any, expected: dict[str, Any]) -> bool:  # noqa: ANN401
    """Tell whether two documents mean the same to zarr, whichever release wrote them."""
    try:
        if found["node_type"] != "array" or set(found) - set(expected):
            return False
        return bool(_understood(found) == _understood(expected))
    except (*_DECODING, OSError):
        return False


def _understood(document: Any) -> object:  # noqa: ANN401
    """Return what zarr makes of an array's document."""
    alone = MemoryStore({DOCUMENT: Buffer.from_bytes(json.dumps(document).encode())})
    return zarr.open_array(alone, mode="r").metadata
