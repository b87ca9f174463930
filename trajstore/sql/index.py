"""The index: Parquet files that say in rows what is committed, and are only a cache.

A catalog tells which slab lies in which file, and the stamp of the commit records it was made from. A refresh reads
the commit records of all slabs, and the data of those whose records are other ones now; the files of the others stay.
Files are never changed, only replaced. Many small ones become a large one, since opening each costs as much as
reading ten thousand rows.

The index lies in the folder beside the store, or in the user's cache where that cannot be written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import duckdb

from trajstore.errors import FormatError, damage_told
from trajstore.sql.files import copy, is_own, new_file, tidy, write_text
from trajstore.sql.slabs import METRICS_COLUMNS, SlabRows, write_metrics, write_segments
from trajstore.sql.tables import EXPERIMENTS_COLUMNS, RUNS_COLUMNS, experiment_row, run_rows, write_table
from trajstore.sql.text import identifier, read_parquet
from trajstore.storage.local import inside, user_cache
from trajstore.storage.schema import late_records
from trajstore.storage.segment import array_of
from trajstore.store import Store, StoredExperiment

__all__ = ["Index", "refresh"]

_VERSION = 2
_CATALOG = "catalog.json"
_FOLDERS = ("experiments", "runs", "metrics", "segments")
_ROWS = 1_000_000
"""A file of so many rows is large: it is written as one, and merged with no others."""
_SMALL_FILES = 16
"""More small files than these are merged."""

Key = tuple[str, str, int]
"""Experiment, order, seed."""


@dataclass(frozen=True)
class Index:
    """The files of an index that is up to date."""

    folder: Path
    experiments: Path
    runs: Path
    metrics: Sequence[Path]
    segments: Sequence[Path]
    names: Sequence[str]
    """All metrics of all experiments, in the spelling of their columns."""


@dataclass(frozen=True)
class _Slab:
    """What the catalog holds of a slab."""

    experiment: str
    order: str
    seed: int
    stamp: str
    """Of what it was made from."""
    file: str
    """Its rows lie in metrics/FILE and segments/FILE."""
    rows: int
    last_step: int
    unbroken: bool

    @property
    def key(self) -> Key:
        return self.experiment, self.order, self.seed


@dataclass
class _Catalog:
    """Which slab lies in which file."""

    folder: Path
    slabs: dict[Key, _Slab] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    """experiments and runs → file."""

    @classmethod
    def of(cls, folder: Path) -> _Catalog:
        """Read the catalog; where there is none that can be understood, begin a new one."""
        if not is_own(folder / _CATALOG):
            return cls(folder)
        try:
            stored = json.loads((folder / _CATALOG).read_text(encoding="utf-8"))
            if stored["version"] != _VERSION:
                return cls(folder)
            slabs = [_Slab(*fields) for fields in stored["slabs"]]
            return cls(folder, {slab.key: slab for slab in slabs}, dict(stored["tables"]))
        except (OSError, ValueError, KeyError, TypeError):
            return cls(folder)

    def save(self) -> None:
        slabs = [list(vars(slab).values()) for slab in self.slabs.values()]
        told = {"version": _VERSION, "tables": self.tables, "slabs": slabs}
        write_text(self.folder / _CATALOG, json.dumps(told))

    def files(self) -> list[str]:
        """Return the files of slabs, each once."""
        return list(dict.fromkeys(slab.file for slab in self.slabs.values()))

    def paths(self) -> set[Path]:
        """Return all files that are told of."""
        slabs = {self.folder / table / file for table in ("metrics", "segments") for file in self.files()}
        return slabs | {self.folder / table / file for table, file in self.tables.items()}


def refresh(store: Store, *, anew: bool = False) -> Index:
    """Bring the index up to date; `anew` takes over nothing of what is there."""
    folder = _folder_of(store)
    for table in _FOLDERS:
        (folder / table).mkdir(parents=True, exist_ok=True)
    catalog, experiments = _Catalog.of(folder), _whole(store)
    before = catalog.paths()
    if anew:
        catalog = _Catalog(folder)
    stamps = {key: stamp for e in experiments.values() for key, stamp in _stamps(e).items()}
    there = {table: {f.name for f in (folder / table).iterdir() if is_own(f)} for table in ("metrics", "segments")}

    def good(slab: _Slab) -> bool:
        found = all(slab.file in files for files in there.values())
        return found and stamps.get(slab.key) == slab.stamp

    files = catalog.files()
    mixed = {slab.file for slab in catalog.slabs.values() if not good(slab)}  # with rows that are not true any more
    catalog.slabs = {key: slab for key, slab in catalog.slabs.items() if good(slab)}
    columns = _spelled(experiments.values())
    _merge(catalog, [file for file in files if file in mixed], columns)
    for slabs in _written(folder, experiments, {key: s for key, s in stamps.items() if key not in catalog.slabs}):
        catalog.slabs |= {slab.key: slab for slab in slabs}
        catalog.save()  # a first refresh is long, and may be interrupted
    rows = dict.fromkeys(catalog.files(), 0)
    for slab in catalog.slabs.values():
        rows[slab.file] += slab.rows
    small = [file for file, count in rows.items() if count < _ROWS]
    if len(small) > _SMALL_FILES:
        _merge(catalog, small, columns)
    catalog.slabs = {key: catalog.slabs[key] for key in stamps}
    _tables(catalog, experiments)
    catalog.save()
    tidy(folder, catalog.paths(), before)
    metrics, segments = ([folder / table / file for file in catalog.files()] for table in ("metrics", "segments"))
    tables = {table: folder / table / file for table, file in catalog.tables.items()}
    return Index(folder, tables["experiments"], tables["runs"], metrics, segments, columns)


def _whole(store: Store) -> dict[str, StoredExperiment]:
    """Return all experiments; where one is damaged an answer would lack something."""
    found = {}
    for name, experiment in store.experiments():
        if isinstance(experiment, FormatError):
            raise experiment
        found[name] = experiment
    return found


def _stamps(experiment: StoredExperiment) -> dict[Key, str]:
    """Return what each slab's rows are made from, as a digest: names of metrics, and the bytes of all records.

    The records hold digests of the data, so that the data need not be read. As they lie on disk they are read
    about ten times as fast as through Zarr.
    """
    schema, place = experiment.schema, experiment.store.place
    names = json.dumps([_VERSION, list(schema.metrics), list(schema.late)])
    with damage_told(f"experiment {experiment.name!r} in {experiment.store}"):
        arrays = [array_of(experiment.group, name) for name in ("committed", *map(late_records, schema.late))]
    grids = [
        list(product(*(range(-(-n // c)) for n, c in zip(array.shape[2:], array.chunks[2:], strict=True))))
        for array in arrays
    ]

    def stamp(corner: tuple[int, int]) -> str:
        digest = hashlib.sha256(names.encode())
        for array, grid in zip(arrays, grids, strict=True):
            for chunk in grid:
                found = place.read(f"{array.path}/{array.metadata.encode_chunk_key((*corner, *chunk))}")
                digest.update(hashlib.sha256(found or b"").digest())
        return digest.hexdigest()[:32]

    corners = list(product(range(len(schema.orders)), range(len(schema.seeds))))
    if place.beside is not None:
        stamps = [stamp(corner) for corner in corners]
    else:  # a request each
        with ThreadPoolExecutor(16) as pool:
            stamps = list(pool.map(stamp, corners))
    return {
        (experiment.name, schema.orders[i], schema.seeds[k]): found
        for (i, k), found in zip(corners, stamps, strict=True)
    }


def _written(
    folder: Path, experiments: Mapping[str, StoredExperiment], stamps: Mapping[Key, str]
) -> Iterator[list[_Slab]]:
    """Write slabs that are new or have changed, file by file."""
    waiting: list[tuple[Key, SlabRows]] = []
    rows = 0

    def write() -> list[_Slab]:
        file = new_file(folder / "metrics")
        write_metrics(file, (slab.metrics() for _, slab in waiting))
        write_segments(folder / "segments" / file.name, (slab.segments() for _, slab in waiting))
        slabs = [
            _Slab(*key, stamps[key], file.name, int(slab.steps.sum()), slab.last_step, slab.unbroken)
            for key, slab in waiting
        ]
        waiting.clear()
        return slabs

    for key in stamps:
        name, order, seed = key
        schema = experiments[name].schema
        slab = SlabRows.of(experiments[name], schema.orders.index(order), schema.seeds.index(seed))
        waiting.append((key, slab))
        rows += int(slab.steps.sum())
        if rows >= _ROWS:
            rows = 0
            yield write()
    if waiting:
        yield write()


def _merge(catalog: _Catalog, files: Sequence[str], columns: Sequence[str]) -> None:
    """Write what is true of some files anew, as one."""
    kept = [slab for slab in catalog.slabs.values() if slab.file in files]
    if not kept:
        return
    merged = new_file(catalog.folder / "metrics").name
    with duckdb.connect() as connection:
        labels = json.dumps([{"experiment": s.experiment, "order": s.order, "seed": s.seed} for s in kept])
        connection.execute(
            "CREATE TABLE kept AS SELECT unnest(slab) FROM (SELECT unnest(from_json($1::JSON, "
            """'[{"experiment": "VARCHAR", "order": "VARCHAR", "seed": "BIGINT"}]')) AS slab)""",
            [labels],
        )
        for table in ("metrics", "segments"):
            own = {slab.file for slab in kept}
            source = read_parquet([catalog.folder / table / file for file in files if file in own])
            gone = "" if table == "segments" else _gone(connection, source, columns)
            query = f'SELECT *{gone} FROM {source} SEMI JOIN kept USING (experiment, "order", seed)'
            by = 'experiment, "order", seed, ' + ("step" if table == "metrics" else "segment")
            copy(connection, f"{query} ORDER BY {by}", catalog.folder / table / merged)
    catalog.slabs |= {slab.key: replace(slab, file=merged) for slab in kept}


def _gone(connection: duckdb.DuckDBPyConnection, source: str, columns: Sequence[str]) -> str:
    """Leave out metrics of experiments that are there no more."""
    wanted = {name.casefold() for name in (*columns, *METRICS_COLUMNS)}
    gone = [name for name in connection.sql(f"FROM {source}").columns if name.casefold() not in wanted]
    return f" EXCLUDE ({', '.join(map(identifier, gone))})" if gone else ""


def _tables(catalog: _Catalog, experiments: Mapping[str, StoredExperiment]) -> None:
    """Write experiments and runs, where they are others now."""
    last: dict[str, list[int]] = {name: [] for name in experiments}
    for slab in catalog.slabs.values():
        last[slab.experiment].append(slab.last_step)
    ends = {name: experiment.ends_at(last[name]) for name, experiment in experiments.items()}
    runs = [row for name, e in experiments.items() for row in run_rows(e, ends[name], _runs(catalog, e))]
    made = set(catalog.tables.values())
    for table, rows, columns in (
        ("experiments", [experiment_row(e, ends[name]) for name, e in experiments.items()], EXPERIMENTS_COLUMNS),
        ("runs", runs, RUNS_COLUMNS),
    ):
        stamp = hashlib.sha256(json.dumps([_VERSION, rows]).encode()).hexdigest()[:32]
        file = catalog.folder / table / f"{stamp}.parquet"
        if file.name not in made or not is_own(file):
            write_table(file, rows, columns)
        catalog.tables[table] = file.name


def _runs(catalog: _Catalog, experiment: StoredExperiment) -> Iterator[dict[str, Any]]:
    schema, ended = experiment.schema, experiment.ended()
    for order, (k, seed) in product(schema.orders, enumerate(schema.seeds)):
        slab = catalog.slabs[experiment.name, order, seed]
        finished = slab.last_step == schema.steps if ended is None else (order, seed) in ended
        yield {
            "order": order,
            "seed": seed,
            "init_seed": schema.init_seeds[k],
            "data_seed": schema.data_seeds[k],
            "last_step": slab.last_step,
            "complete": finished and slab.unbroken,
        }


def _spelled(experiments: Iterable[StoredExperiment]) -> list[str]:
    """Return the metrics, each once: SQL does not tell upper case from lower."""
    spelled: dict[str, str] = {}
    for experiment in experiments:
        for name in (*experiment.schema.metrics, *experiment.schema.late):
            spelled.setdefault(name.casefold(), name)
    return list(spelled.values())


def _folder_of(store: Store) -> Path:
    place = store.place
    if place.beside is None:
        return _cached(place.address)
    beside = place.beside
    try:
        # It may have come with the store: nothing is written where a link in it leads.
        own, *_ = (inside(beside.parent, f"{beside.name}/index{below}") for below in ("", *(f"/{t}" for t in _FOLDERS)))
        own.mkdir(parents=True, exist_ok=True)
        if os.access(own, os.W_OK):
            return own
    except (OSError, FormatError):
        pass  # a read-only place: the user's cache serves as well
    return _cached(str(Path(place.address).resolve()))


def _cached(address: str) -> Path:
    return user_cache() / "index" / hashlib.sha256(address.encode()).hexdigest()[:16]
