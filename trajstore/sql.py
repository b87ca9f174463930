"""The SQL view: DuckDB over an index that is only a cache.

One Parquet file a slab holds its committed metrics, one file a store its experiments and runs. A file's name
carries the digest of what it was made from, so that a refresh writes what was committed since and nothing
else. The index lies in the folder beside the store, or in the user's cache where that cannot be written.

A query is one SELECT (or EXPLAIN of one), on a connection that reads the index, nothing else, and whose
settings are locked. Unmeasured is NULL, diverged is NaN.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any
from urllib.parse import quote

import duckdb
import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray

from trajstore.errors import QueryError
from trajstore.storage.local import user_cache
from trajstore.store import Store, StoredExperiment

__all__ = ["literal", "query_store", "rows_of", "write_slab"]

_INDEX_VERSION = 1
_KEEP_SECONDS = 24 * 3600.0
_METRICS_COLUMNS = {
    "experiment": "VARCHAR",
    "order": "VARCHAR",
    "seed": "BIGINT",
    "step": "BIGINT",
    "leg": "BIGINT",
}


def query_store(store: Store, query: str) -> duckdb.DuckDBPyRelation:
    """Run one SELECT on a store's tables."""
    _ = store.root  # a clear error, if this is no store
    connection = _confined(*_refresh(store))
    _refuse_unless_reading(query)
    try:
        relation = connection.sql(query)
    except duckdb.Error as error:
        raise _wrong(error, query) from None
    if relation is None:
        raise QueryError("the statement gives no rows; ask with SELECT")
    return relation


def rows_of(relation: duckdb.DuckDBPyRelation) -> list[tuple[Any, ...]]:
    """Fetch a relation's rows; what goes wrong only then is a QueryError too."""
    try:
        return [tuple(row) for row in relation.fetchall()]
    except duckdb.Error as error:
        raise _wrong(error, "") from None


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
    return QueryError(text)


def _confined(folder: Path, index: Mapping[str, set[Path]]) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(config={"autoinstall_known_extensions": False, "autoload_known_extensions": False})
    for table, files in index.items():
        listed = ", ".join(literal(str(f)) for f in sorted(files))
        connection.execute(f"CREATE VIEW {table} AS SELECT * FROM read_parquet([{listed}], union_by_name = true)")
    connection.execute(f"SET allowed_directories = [{literal(str(folder))}]")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection


def _refresh(store: Store) -> tuple[Path, dict[str, set[Path]]]:
    """Bring the index up to date, and return its folder and the files of each table."""
    index = _index_folder(store)
    experiments = [store[name] for name in store]
    tables: dict[str, set[Path]] = {"experiments": set(), "runs": set(), "metrics": set()}
    parts: list[tuple[StoredExperiment, list[dict[str, Any]]]] = []
    for experiment in experiments:
        commits = experiment.commits()
        complete, late, rows = experiment.complete(commits), experiment.late(), []
        for i, order in enumerate(experiment.schema.orders):
            for k, seed in enumerate(experiment.schema.seeds):
                after = {name: (known[i, k], values[i, k]) for name, (known, values) in late.items()}
                changing = [part.tobytes() for known_values in after.values() for part in known_values]
                digest = experiment.attributes["config_digest"]
                stamp = _stamp(digest, *after, commits.records[i, k].tobytes(), *changing)
                file = index / "metrics" / experiment.name / f"{quote(order, safe='')}.{seed}.{stamp}.parquet"
                tables["metrics"].add(file)
                if not file.exists():
                    write_slab(file, experiment, order, seed, i, k, commits.steps[i, k])
                rows.append(
                    {
                        "order": order, "seed": seed,
                        "init_seed": experiment.schema.init_seeds[k], "data_seed": experiment.schema.data_seeds[k],
                        "last_step": int(commits.last_step[i, k]), "complete": bool(complete[i, k]),
                    }
                )  # fmt: skip
        parts.append((experiment, rows))
    for table, records in _tables(parts).items():
        text = json.dumps(records, sort_keys=True)
        file = index / table / f"{_stamp(text)}.parquet"
        tables[table].add(file)
        if not file.exists():
            _write_records(file, records, _EMPTY[table])
    empty = index / "metrics" / "empty.parquet"  # gives the columns, when nothing is recorded yet
    tables["metrics"].add(empty)
    if not empty.exists():
        columns = ", ".join(f'NULL::{kind} AS "{name}"' for name, kind in _METRICS_COLUMNS.items())
        _copy(duckdb.connect(), f"SELECT {columns} WHERE false", empty)
    for file in set(index.rglob("*.parquet")).difference(*tables.values()):
        with suppress(FileNotFoundError):  # another process tidies up as well
            if time.time() - file.stat().st_mtime > _KEEP_SECONDS:  # a relation made before may still want it
                file.unlink()
    return index, tables


def write_slab(
    file: Path, experiment: StoredExperiment, order: str, seed: int, i: int, k: int, steps: NDArray[np.bool_]
) -> None:
    """Write the metrics of some steps of a slab as Parquet."""

    def values(name: str) -> NDArray[Any]:
        array = experiment.group[name]
        assert isinstance(array, zarr.Array)
        return np.asarray(array[i, k, : len(steps)])[steps]

    measured = values("measured")
    columns: dict[str, NDArray[Any]] = {"step": np.flatnonzero(steps), "leg": values("leg")}
    selected = [
        literal(experiment.name) + " AS experiment",
        literal(order) + ' AS "order"',
        f"{seed}::BIGINT AS seed",
        "step",
        "leg",
    ]
    of_metric = {m: (values(m), measured >> bit & 1) for bit, m in enumerate(experiment.schema.metrics)}
    of_metric |= {m: (value[i, k][steps], known[i, k][steps]) for m, (known, value) in experiment.late().items()}
    for bit, (metric, (column, there)) in enumerate(of_metric.items()):
        # DuckDB reads NaN in a DataFrame as NULL, so both states travel apart.
        columns[f"v{bit}"], columns[f"m{bit}"], columns[f"n{bit}"] = (
            column,
            there,
            np.isnan(column),
        )
        selected.append(
            f"CASE WHEN m{bit} = 0 THEN NULL WHEN n{bit} THEN 'NaN'::DOUBLE ELSE v{bit} END AS {_identifier(metric)}"
        )
    connection = duckdb.connect()
    connection.register("slab", pd.DataFrame(columns))
    _copy(connection, f"SELECT {', '.join(selected)} FROM slab ORDER BY step", file)


def _tables(
    parts: Iterable[tuple[StoredExperiment, list[dict[str, Any]]]],
) -> dict[str, list[dict[str, Any]]]:
    experiments, runs = [], []
    for experiment, slabs in parts:
        config = experiment.config
        row = {
            "experiment": experiment.name,
            "problem": experiment.problem,
            "operator": experiment.operator,
            "steps": config["steps"],
            "orders": config["orders"],
            "seeds": config["seeds"],
            "parameters": experiment.schema.layout.parameters,
            "config_digest": experiment.attributes["config_digest"],
            "config": json.dumps(config),
        }
        experiments.append(row)
        hyper = _hyperparameters(config)
        shared = {key: row[key] for key in ("experiment", "problem", "operator", "steps")}
        runs += [{**shared, **slab, **{k: v for k, v in hyper.items() if k not in shared | slab}} for slab in slabs]
    return {"experiments": experiments, "runs": runs}


_EMPTY = {
    "experiments": "experiment VARCHAR, problem VARCHAR, operator VARCHAR, steps BIGINT, orders VARCHAR[], "
    "seeds BIGINT[], parameters BIGINT, config_digest VARCHAR, config VARCHAR",
    "runs": 'experiment VARCHAR, problem VARCHAR, operator VARCHAR, steps BIGINT, "order" VARCHAR, seed BIGINT, '
    "init_seed BIGINT, data_seed BIGINT, last_step BIGINT, complete BOOLEAN",
}


def _hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten the fields of problem and operator; a name that both use gets its owner in front."""
    tables = {owner: _leaves(config[owner]) for owner in ("operator", "problem")}
    shared = reduce(set.intersection, (set(t) for t in tables.values()))
    return {
        f"{owner}_{name}" if name in shared else name: value
        for owner, table in tables.items()
        for name, value in table.items()
    }


def _leaves(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}".lower()  # SQL does not tell upper case from lower
        if isinstance(value, Mapping):
            if "family" in value:
                leaves[name] = value["family"]
            leaves |= _leaves(value, f"{name}_")
        elif key != "family":
            leaves[name] = json.dumps(value) if isinstance(value, list) else value
    return leaves


def _write_records(file: Path, records: list[dict[str, Any]], declared: str) -> None:
    connection = duckdb.connect()
    connection.execute(f"CREATE TABLE t ({declared})")
    known = set(re.findall(r'"?(\w+)"? [A-Z]+', declared))
    types: dict[str, str] = {}
    for record in records:
        for key, value in record.items():
            if key not in known and value is not None:
                types[key] = _wider(types.get(key), value)
    for name, kind in types.items():
        connection.execute(f"ALTER TABLE t ADD COLUMN {_identifier(name)} {kind}")
    for record in records:
        present = {key: value for key, value in record.items() if value is not None}
        text = {k: str(v) if types.get(k) == "VARCHAR" else v for k, v in present.items()}
        names = ", ".join(_identifier(key) for key in text)
        connection.execute(f"INSERT INTO t ({names}) VALUES ({', '.join('?' * len(text))})", list(text.values()))
    _copy(connection, "SELECT * FROM t", file)


def _wider(kind: str | None, value: Any) -> str:  # noqa: ANN401
    own = {bool: "BOOLEAN", int: "BIGINT", float: "DOUBLE"}.get(type(value), "VARCHAR")
    if own == "BIGINT" and not -(2**63) <= value < 2**63:
        own = "VARCHAR"
    if kind is None or kind == own:
        return own
    return "DOUBLE" if {kind, own} == {"BIGINT", "DOUBLE"} else "VARCHAR"


def _copy(connection: duckdb.DuckDBPyConnection, query: str, file: Path) -> None:
    """Write a query's rows to a file that appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{uuid.uuid4().hex}.partial")
    connection.execute(f"COPY ({query}) TO {literal(str(partial))} (FORMAT parquet)")
    partial.replace(file)


def _index_folder(store: Store) -> Path:
    place = store.place
    if place.beside is None:
        return user_cache() / "index" / _stamp(place.address)
    own = place.beside / "index"
    try:
        own.mkdir(parents=True, exist_ok=True)
        if os.access(own, os.W_OK):
            return own
    except OSError:
        pass  # a read-only place: the user's cache serves as well
    return user_cache() / "index" / _stamp(str(Path(place.address).resolve()))


def _stamp(*parts: str | bytes) -> str:
    digest = hashlib.sha256(str(_INDEX_VERSION).encode())
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
    return digest.hexdigest()[:16]


def literal(text: str) -> str:
    """Return a text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
