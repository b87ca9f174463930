"""A query: one SELECT (or EXPLAIN of one), on a connection that reads the index and nothing else.

Its settings are locked. Where an answer is to be written as Parquet, one folder may be written as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import duckdb

from trajstore.appearing import whole_file
from trajstore.errors import QueryError
from trajstore.sql.index import Index, refresh
from trajstore.sql.text import literal
from trajstore.sql.views import definitions
from trajstore.store import Store

if TYPE_CHECKING:
    import pandas as pd

Tables = Mapping[str, "pd.DataFrame"]

__all__ = ["query_store", "rows_of", "write_answer"]


def query_store(store: Store, query: str, tables: Tables | None = None) -> duckdb.DuckDBPyRelation:
    """Run one SELECT on a store's tables, and on others that are given by name."""
    return _asked(store, query, tables=tables)


def write_answer(store: Store, query: str, file: Path, *, force: bool = False) -> None:
    """Write what a SELECT gives as Parquet, with its types."""
    # DuckDB can be allowed folders, so it gets one of its own beside the file.
    with (
        whole_file(file, force=force) as partial,
        TemporaryDirectory(prefix=".", suffix=".partial", dir=file.parent) as folder,
    ):
        written = Path(folder, "answer.parquet")
        relation = _asked(store, query, Path(folder))
        try:
            relation.write_parquet(str(written))
        except duckdb.Error as error:
            raise _wrong(error, query) from None
        written.replace(partial)


def rows_of(relation: duckdb.DuckDBPyRelation) -> list[tuple[Any, ...]]:
    """Fetch a relation's rows; what goes wrong only then is a QueryError too."""
    try:
        return [tuple(row) for row in relation.fetchall()]
    except duckdb.Error as error:
        raise _wrong(error, "") from None


def _asked(store: Store, query: str, *writable: Path, tables: Tables | None = None) -> duckdb.DuckDBPyRelation:
    _ = store.root  # a clear error, if this is no store
    try:
        connection = _confined(refresh(store), writable)
    except duckdb.Error:  # a file of the index is damaged, and it is only a cache
        connection = _confined(refresh(store, anew=True), writable)
    for name, frame in (tables or {}).items():
        connection.register(name, frame)
    _refuse_unless_reading(query)
    try:
        relation = connection.sql(query)
    except duckdb.Error as error:
        raise _wrong(error, query) from None
    if relation is None:
        raise QueryError("the statement returns no rows; use SELECT")
    return relation


def _refuse_unless_reading(query: str) -> None:
    try:
        statements = duckdb.extract_statements(query)
    except duckdb.Error as error:
        raise _wrong(error, query) from None
    if len(statements) != 1:
        raise QueryError(f"give one statement; this has {len(statements)}")
    kind = statements[0].type
    if kind == duckdb.StatementType.EXPLAIN:
        # EXPLAIN ANALYZE runs what it explains, so that has to be a SELECT as well.
        explained = re.sub(r"(?is)^\s*explain(\s+analyze)?\b", "", statements[0].query)
        if re.match(r"(?is)\s*\((?!\s*(select|from|with|values|\())", explained):
            explained = re.sub(r"(?s)^\s*\([^)]*\)", "", explained)  # options, as in EXPLAIN (FORMAT json)
        _refuse_unless_reading(explained)
    elif kind != duckdb.StatementType.SELECT:
        raise QueryError(f"only SELECT is possible here, not {kind.name}; a store is changed by recording")


def _wrong(error: duckdb.Error, query: str) -> QueryError:
    text = " ".join(str(error).split("\n\nLINE")[0].split())
    if "pytz" in text:  # DuckDB would turn such values into Python with a package that nothing else needs
        return QueryError("a column is a TIMESTAMP WITH TIME ZONE; cast it to TIMESTAMP or VARCHAR")
    if isinstance(error, duckdb.ParserException) and re.search(r'(?i)(?<!["\w])order(?!["\w]|\s+by\b)', query):
        text += '; order is a word of SQL: write the column as "order"'
    # What the macros of views.py raise is a sentence already.
    return QueryError(re.sub(r"^Invalid Input Error: (?=(no )?(experiment|metric|steps) )", "", text))


def _confined(index: Index, writable: Iterable[Path]) -> duckdb.DuckDBPyConnection:
    folders = [index.folder, *writable]
    connection = duckdb.connect(config={"autoinstall_known_extensions": False, "autoload_known_extensions": False})
    connection.execute(definitions(index))
    connection.execute(f"SET allowed_directories = [{', '.join(literal(str(folder)) for folder in folders)}]")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection
