"""A query: one SELECT (or EXPLAIN of one), on a connection that reads the index and nothing else.

`reading` says what may be asked. The connection's settings say what can be reached: the folder of the index, no
extensions, secrets or variables of Python; and they are locked. Where an answer is to be written as Parquet, one folder
may be written as well.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import duckdb

from trajstore._common.atomic import whole_file
from trajstore._common.system import refuse_too_many
from trajstore.errors import DamageError, QueryError, TrajstoreError
from trajstore.reading.handles import StoreHandle
from trajstore.reading.sql.catalog import is_damaged
from trajstore.reading.sql.index import Index, refresh
from trajstore.reading.sql.reading import reading
from trajstore.reading.sql.text import literal
from trajstore.reading.sql.views import definitions

if TYPE_CHECKING:
    import pandas as pd

Tables = Mapping[str, "pd.DataFrame"]
T = TypeVar("T")

__all__ = ["answer", "query_store", "rows_of", "write_answer"]


def query_store(store: StoreHandle, query: str, tables: Tables | None = None) -> duckdb.DuckDBPyRelation:
    """Run one SELECT on a store's tables, and on others that are given by name."""
    return _fetched(store, query, lambda relation: relation, tables=tables)


def answer(store: StoreHandle, query: str, tables: Tables | None = None) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Return the names of the columns that a SELECT gives, and its rows."""
    return _fetched(store, query, lambda relation: (list(relation.columns), _rows(relation)), tables=tables)


def write_answer(store: StoreHandle, query: str, file: Path, *, force: bool = False) -> None:
    """Write what a SELECT gives as Parquet, with its types."""
    # DuckDB can be allowed folders, so it gets one of its own beside the file.
    with (
        whole_file(file, force=force) as partial,
        TemporaryDirectory(prefix=".", suffix=".partial", dir=file.parent) as folder,
    ):
        written = Path(folder, "answer.parquet")
        _fetched(store, query, lambda relation: relation.write_parquet(str(written)), Path(folder))
        written.replace(partial)


def rows_of(relation: duckdb.DuckDBPyRelation) -> list[tuple[Any, ...]]:
    """Fetch a relation's rows, times with a zone as text; what goes wrong only then is a QueryError too."""
    try:
        return _rows(relation)
    except duckdb.Error as error:
        raise _wrong(error, "") from None


def _rows(relation: duckdb.DuckDBPyRelation) -> list[tuple[Any, ...]]:
    zoned = [str(kind) == "TIMESTAMP WITH TIME ZONE" for kind in relation.types]
    if any(zoned):  # some DuckDB would need another package for them
        columns = [f"CAST(#{n} AS VARCHAR)" if is_zoned else f"#{n}" for n, is_zoned in enumerate(zoned, start=1)]
        relation = relation.project(", ".join(columns))
    return [tuple(row) for row in relation.fetchall()]


def _fetched(
    store: StoreHandle, query: str, fetch: Callable[[duckdb.DuckDBPyRelation], T], *writable: Path,
    tables: Tables | None = None,
) -> T:  # fmt: skip
    """Ask and fetch; once more where a file of the index was damaged after it had been looked at."""
    _ = store.root  # a clear error, if this is no store
    for last in (False, True):
        index, connection = _connected(store, writable, tables or {})
        try:
            relation = _asked(connection, query)
            if index.left_out:  # whether it asks for those is known when the rows are
                relation = relation.materialize()
            return fetch(relation)
        except duckdb.Error as error:
            if last or not is_damaged(index.folder):
                raise _wrong(error, query, index.left_out) from None
    raise AssertionError


def _connected(store: StoreHandle, writable: Iterable[Path], tables: Tables) -> tuple[Index, duckdb.DuckDBPyConnection]:
    try:
        connection = _confined(index := refresh(store), writable)
    except duckdb.Error as error:  # a file of the index is damaged, and it is only a cache
        _refuse_too_many(error)
        connection = _confined(index := refresh(store, anew=True), writable)
    for name, frame in tables.items():
        connection.register(name, frame)
    return index, connection


def _asked(connection: duckdb.DuckDBPyConnection, query: str) -> duckdb.DuckDBPyRelation:
    relation = connection.sql(reading(connection, query))
    if relation is None:
        raise QueryError("the statement returns no rows; use SELECT")
    return relation


def _refuse_too_many(error: duckdb.Error) -> None:
    """Raise an OpenFilesError where DuckDB could not open a file for that reason, which it tells in words only."""
    if os.strerror(errno.EMFILE) in str(error):
        file = re.search(r'"([^"]+)"', str(error))
        refuse_too_many(OSError(errno.EMFILE, os.strerror(errno.EMFILE)), file[1] if file else "a file of the index")


def _wrong(error: duckdb.Error, query: str, left_out: Mapping[str, str] = MappingProxyType({})) -> TrajstoreError:
    _refuse_too_many(error)
    for why in left_out.values():
        if why in str(error):
            return DamageError(why)
    text = " ".join(str(error).split("\n\nLINE")[0].split())
    if "pytz" in text:  # deeper in a value, they are not seen by `rows_of`
        return QueryError("a column holds TIMESTAMP WITH TIME ZONE; cast these to TIMESTAMP or VARCHAR")
    if isinstance(error, duckdb.ParserException) and re.search(r'(?i)(?<!["\w])order(?!["\w]|\s+by\b)', query):
        text += '; order is a word of SQL: write the column as "order"'
    # What the macros of views.py raise is a sentence already.
    return QueryError(re.sub(r"^Invalid Input Error: (?=(no )?(experiment|metric|steps) )", "", text))


_SETTINGS = {
    "allow_community_extensions": "false",
    "allow_persistent_secrets": "false",
    "python_enable_replacements": "false",  # a table is never a variable of this program
    "enable_external_access": "false",
    "lock_configuration": "true",
}
"""In this order: what comes after the last of them cannot be set any more."""


def _confined(index: Index, writable: Iterable[Path]) -> duckdb.DuckDBPyConnection:
    folders = ", ".join(literal(str(folder)) for folder in (index.folder, *writable))
    connection = duckdb.connect(config={"autoinstall_known_extensions": False, "autoload_known_extensions": False})
    connection.execute(definitions(index))
    settings = {
        "allowed_directories": f"[{folders}]",
        "temp_directory": literal(str(index.folder / "spilled")),  # of sorts that need more than memory
        **_SETTINGS,
    }
    for name, value in settings.items():
        connection.execute(f"SET {name} = {value}")
    return connection
