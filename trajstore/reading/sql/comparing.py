"""Does an index say what the store says? It is made once more, elsewhere, and both are compared row by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb

from trajstore.reading.handles import StoreHandle
from trajstore.reading.sql.catalog import Catalog
from trajstore.reading.sql.index import places_of, refreshed
from trajstore.reading.sql.text import identifier, read_parquet

__all__ = ["Difference", "differences", "discard"]

_SLAB = 'experiment, "order", seed'


@dataclass(frozen=True)
class Difference:
    """What is wrong with an index."""

    what: str
    path: Path
    wrong: bool
    """Whether an answer may have been wrong; else it is noticed by whoever asks."""


def differences(store: StoreHandle) -> Iterator[Difference]:
    """Yield what the indexes of this user say and the store does not; slabs that have changed since are left out."""
    for folder in places_of(store):
        catalog = Catalog.of(folder)
        paths = catalog.paths()
        for path in sorted(paths - catalog.sound(paths)):
            what = "a file of the index for SQL is not as it was written; the next query writes it anew"
            yield Difference(what, path, wrong=False)
            paths.clear()
        if paths:
            yield from _compared(store, catalog)


def discard(store: StoreHandle) -> None:
    """Have the next query make the index anew."""
    for folder in places_of(store):
        Catalog(folder).save()


def _compared(store: StoreHandle, catalog: Catalog) -> Iterator[Difference]:
    with TemporaryDirectory() as elsewhere, duckdb.connect() as connection:
        refreshed(store, Path(elsewhere), anew=True)
        again = Catalog.of(Path(elsewhere))
        stamps = {key: slab.stamp for key, slab in again.slabs.items()}
        same = [key for key, slab in catalog.slabs.items() if stamps.get(key) == slab.stamp]
        connection.execute('CREATE TABLE same (experiment VARCHAR, "order" VARCHAR, seed BIGINT)')
        if same:
            connection.executemany("INSERT INTO same VALUES (?, ?, ?)", [list(key) for key in same])
        tables: Mapping[str, list[str]] = {"metrics": catalog.files(), "segments": catalog.files()} if same else {}
        if stamps.keys() == catalog.slabs.keys() == set(same):  # nothing is new
            tables = {**tables, **{table: [file] for table, file in catalog.tables.items()}}
        for table, files in tables.items():
            of = again.files() if table in ("metrics", "segments") else [again.tables[table]]
            sides = ([c.folder / table / f for f in names] for c, names in ((catalog, files), (again, of)))
            for row in _rows_apart(connection, table, *sides):
                slab = ", ".join(map(str, row))
                what = f"the index for SQL has other rows in {table!r} than the store, of {slab}; it is only a cache"
                yield Difference(what, catalog.folder / table, wrong=True)


def _rows_apart(
    connection: duckdb.DuckDBPyConnection, table: str, left: Sequence[Path], right: Sequence[Path]
) -> list[tuple[object, ...]]:
    """Return of which slabs, or experiments, two sets of files have other rows."""
    sources = read_parquet(left), read_parquet(right)
    names = [[name.casefold() for name in connection.sql(f"FROM {source}").columns] for source in sources]
    known = sorted({*names[0], *names[1]})
    sides = []
    for source, own in zip(sources, names, strict=True):
        columns = ", ".join(identifier(name) if name in own else f"NULL AS {identifier(name)}" for name in known)
        only = "" if table == "experiments" else f" SEMI JOIN same USING ({_SLAB})"
        sides.append(f"SELECT {columns} FROM {source}{only}")
    one, other = sides
    of = "experiment" if table == "experiments" else _SLAB
    apart = f"(({one}) EXCEPT ALL ({other})) UNION ALL (({other}) EXCEPT ALL ({one}))"
    return connection.sql(f"SELECT DISTINCT {of} FROM ({apart}) ORDER BY ALL").fetchall()
