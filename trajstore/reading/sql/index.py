"""The index: Parquet files that say in rows what is committed, and are only a cache.

A catalog tells which slab lies in which file, and the stamp of the commit records it was made from. A refresh reads
the commit records of all slabs, and the data of those whose records are other ones now; the files of the others stay.
Files are never changed, only replaced; one that is not as it was written any more is left, and its rows are written
anew. Many small ones become a large one, since opening each costs as much as reading ten thousand rows.

The index lies in the folder beside the store, or in the user's cache where that cannot be written, is full, or holds
the index of somebody else, which is not believed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import duckdb

from trajstore._common.cache import user_cache
from trajstore._common.system import is_full, system_told
from trajstore.errors import FormatError, WriteError, damage_told, slab_named
from trajstore.reading.handles import ExperimentHandle, StoreHandle, unreadable_told
from trajstore.reading.sql.catalog import CATALOG, VERSION, Catalog, Key, SlabEntry, is_of_another
from trajstore.reading.sql.files import copy, is_own, new_file, tidy
from trajstore.reading.sql.slabs import METRICS_COLUMNS, SlabRows, write_metrics, write_segments
from trajstore.reading.sql.tables import EXPERIMENTS_COLUMNS, RUNS_COLUMNS, experiment_row, run_rows, write_table
from trajstore.reading.sql.text import identifier, read_parquet
from trajstore.storage.format.codecs import chunk_bytes
from trajstore.storage.format.schema import late_records
from trajstore.storage.places.regular import inside
from trajstore.storage.writing.segment import array_of

__all__ = ["Index", "places_of", "refresh", "refreshed"]

_FOLDERS = ("experiments", "runs", "metrics", "segments")
_ROWS = 1_000_000
"""A file of so many rows is large: it is written as one, and merged with no others."""
_SMALL_FILES = 16
"""More small files than these are merged."""


@dataclass(frozen=True)
class Index:
    """The files of an index that is up to date."""

    folder: Path
    experiments: Path
    runs: Path
    metrics: Sequence[Path]
    segments: Sequence[Path]
    names: Sequence[str]
    """All metrics that there are rows of, in the spelling of their columns."""
    left_out: Mapping[str, str]
    """Experiments that cannot be read, and why."""


def refresh(store: StoreHandle, *, anew: bool = False) -> Index:
    """Bring the index up to date; `anew` takes over nothing of what is there."""
    beside, cached = _beside(store), _cached(store)
    try:
        return refreshed(store, beside or cached, anew)
    except (OSError, duckdb.Error) as error:
        if not _is_refused(error, beside or cached):
            raise
        refused = error
    if beside is not None:
        with suppress(OSError, duckdb.Error):
            return refreshed(store, cached, anew)
    told = system_told(refused) if isinstance(refused, OSError) else " ".join(str(refused).split())
    raise WriteError(f"the index for SQL could not be written ({told}), nor in the user's cache {user_cache()}")


def places_of(store: StoreHandle) -> list[Path]:
    """Return the folders in which this user has an index of a store."""
    return [folder for folder in (_beside(store), _cached(store)) if folder is not None and is_own(folder / CATALOG)]


def refreshed(store: StoreHandle, folder: Path, anew: bool) -> Index:
    """Bring the index in a folder up to date."""
    for table in _FOLDERS:
        (folder / table).mkdir(parents=True, exist_ok=True)
    catalog, experiments, left_out = Catalog.of(folder), dict[str, ExperimentHandle](), dict[str, str]()
    for name, one in store.experiments():
        if isinstance(one, FormatError):
            left_out[name] = str(one)
        else:
            experiments[name] = one
    before = catalog.paths()
    if anew:
        catalog = Catalog(folder)
    stamps = dict[Key, str]()
    for name, experiment in experiments.items():
        with unreadable_told(name, left_out):
            stamps |= _stamps(experiment)
    sound = catalog.sound(before)

    def good(slab: SlabEntry) -> bool:
        found = all(folder / table / slab.file in sound for table in ("metrics", "segments"))
        return found and stamps.get(slab.key) == slab.stamp

    files = catalog.files()
    mixed = {slab.file for slab in catalog.slabs.values() if not good(slab)}  # with rows that are not true any more
    catalog.slabs = {key: slab for key, slab in catalog.slabs.items() if good(slab)}
    columns = _spelled(experiments.values())
    _merge(catalog, [file for file in files if file in mixed], columns)
    new = {key: stamp for key, stamp in stamps.items() if key not in catalog.slabs}
    for slabs in _written(catalog, experiments, new, left_out):
        catalog.slabs |= {slab.key: slab for slab in slabs}
        catalog.save()  # a first refresh is long, and may be interrupted
    rows = dict.fromkeys(catalog.files(), 0)
    for slab in catalog.slabs.values():
        rows[slab.file] += slab.rows
    small = [file for file, count in rows.items() if count < _ROWS]
    if len(small) > _SMALL_FILES:
        _merge(catalog, small, columns)
    catalog.slabs = {key: catalog.slabs[key] for key in stamps if key in catalog.slabs}
    _tables(catalog, {name: e for name, e in experiments.items() if name not in left_out}, sound)
    catalog.save()
    tidy(folder, catalog.paths(), before)
    metrics, segments = ([folder / table / file for file in catalog.files()] for table in ("metrics", "segments"))
    tables = {table: folder / table / file for table, file in catalog.tables.items()}
    there = {slab.experiment for slab in catalog.slabs.values()}
    names = _spelled(experiment for name, experiment in experiments.items() if name in there)
    return Index(folder, tables["experiments"], tables["runs"], metrics, segments, names, left_out)


def _stamps(experiment: ExperimentHandle) -> dict[Key, str]:
    """Return what each slab's rows are made from, as a digest: names of metrics, and the bytes of all records.

    The records hold digests of the data, so that the data need not be read. As they lie on disk they are read
    about ten times as fast as through Zarr.
    """
    schema, place = experiment.schema, experiment.store.place
    names = json.dumps([VERSION, list(schema.metrics), list(schema.late)])
    with damage_told(f"experiment {experiment.name!r} in {experiment.store}"):
        arrays = [array_of(experiment.group, name) for name in ("committed", *map(late_records, schema.late))]
    grids = [
        list(product(*(range(-(-n // c)) for n, c in zip(array.shape[2:], array.chunks[2:], strict=True))))
        for array in arrays
    ]

    def stamp(corner: tuple[int, int]) -> str:
        digest = hashlib.sha256(names.encode())
        with damage_told(slab_named(experiment.name, schema.orders[corner[0]], schema.seeds[corner[1]])):
            for array, grid in zip(arrays, grids, strict=True):
                for chunk in grid:
                    key = f"{array.path}/{array.metadata.encode_chunk_key((*corner, *chunk))}"
                    found = place.read(key, chunk_bytes(array))
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
    catalog: Catalog, experiments: Mapping[str, ExperimentHandle], stamps: Mapping[Key, str], left_out: dict[str, str]
) -> Iterator[list[SlabEntry]]:
    """Write slabs that are new or have changed, file by file; put down which experiments cannot be read."""
    waiting: list[tuple[Key, SlabRows, dict[str, Any], dict[str, Any]]] = []
    rows = 0

    def write() -> list[SlabEntry]:
        metrics = new_file(catalog.folder / "metrics")
        segments = catalog.folder / "segments" / metrics.name
        write_metrics(metrics, (rows for _, _, rows, _ in waiting))
        write_segments(segments, (rows for *_, rows in waiting))
        for file in (metrics, segments):
            catalog.add(file)
        slabs = [
            SlabEntry(*key, stamps[key], metrics.name, int(slab.steps.sum()), slab.last_step, slab.unbroken)
            for key, slab, _, _ in waiting
        ]
        waiting.clear()
        return slabs

    for key in stamps:
        name, order, seed = key
        schema = experiments[name].schema
        with unreadable_told(name, left_out):
            slab = SlabRows.of(experiments[name], schema.orders.index(order), schema.seeds.index(seed))
            waiting.append((key, slab, slab.metrics(), slab.segments()))
            rows += int(slab.steps.sum())
        if rows >= _ROWS:
            rows = 0
            yield write()
    if waiting:
        yield write()


def _merge(catalog: Catalog, files: Sequence[str], columns: Sequence[str]) -> None:
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
            catalog.add(catalog.folder / table / merged)
    catalog.slabs |= {slab.key: replace(slab, file=merged) for slab in kept}


def _gone(connection: duckdb.DuckDBPyConnection, source: str, columns: Sequence[str]) -> str:
    """Leave out metrics of experiments that are there no more."""
    wanted = {name.casefold() for name in (*columns, *METRICS_COLUMNS)}
    gone = [name for name in connection.sql(f"FROM {source}").columns if name.casefold() not in wanted]
    return f" EXCLUDE ({', '.join(map(identifier, gone))})" if gone else ""


def _tables(catalog: Catalog, experiments: Mapping[str, ExperimentHandle], sound: Container[Path]) -> None:
    """Write experiments and runs, where they are others now, or not `sound` any more."""
    last: dict[str, list[int]] = {name: [] for name in experiments}
    for slab in catalog.slabs.values():
        if slab.experiment in last:
            last[slab.experiment].append(slab.last_step)
    ends = {name: experiment.ends_at(last[name]) for name, experiment in experiments.items()}
    runs = [row for name, e in experiments.items() for row in run_rows(e, ends[name], _runs(catalog, e))]
    for table, rows, columns in (
        ("experiments", [experiment_row(e, ends[name]) for name, e in experiments.items()], EXPERIMENTS_COLUMNS),
        ("runs", runs, RUNS_COLUMNS),
    ):
        stamp = hashlib.sha256(json.dumps([VERSION, rows]).encode()).hexdigest()[:32]
        file = catalog.folder / table / f"{stamp}.parquet"
        if file not in sound:
            write_table(file, rows, columns)
            catalog.add(file)
        catalog.tables[table] = file.name


def _runs(catalog: Catalog, experiment: ExperimentHandle) -> Iterator[dict[str, Any]]:
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


def _spelled(experiments: Iterable[ExperimentHandle]) -> list[str]:
    """Return the metrics, each once: SQL does not tell upper case from lower."""
    spelled: dict[str, str] = {}
    for experiment in experiments:
        for name in (*experiment.schema.metrics, *experiment.schema.late):
            spelled.setdefault(name.casefold(), name)
    return list(spelled.values())


def _beside(store: StoreHandle) -> Path | None:
    """Return the folder beside the store, if the index can be there."""
    beside = store.place.beside
    if beside is None:
        return None
    try:
        # It may have come with the store: nothing is written where a link in it leads.
        own, *_ = (inside(beside.parent, f"{beside.name}/index{below}") for below in ("", *(f"/{t}" for t in _FOLDERS)))
        own.mkdir(parents=True, exist_ok=True)
    except (OSError, FormatError):
        return None
    return own if os.access(own, os.W_OK) and not is_of_another(own) else None


def _cached(store: StoreHandle) -> Path:
    """Return a folder in the user's cache."""
    address = store.place.address
    if store.place.beside is not None:
        address = str(Path(address).resolve())
    return user_cache() / "index" / hashlib.sha256(address.encode()).hexdigest()[:16]


_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)


def _is_refused(error: OSError | duckdb.Error, folder: Path) -> bool:
    """Tell whether an error says that nothing may be written to the folder of an index, or nothing more fits."""
    if isinstance(error, OSError):
        return is_full(error) or (error.errno in _REFUSED and str(error.filename).startswith(str(folder)))
    return any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT, *_REFUSED))
