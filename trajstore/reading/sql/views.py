"""Views and macros over the files of an index, as statements that any DuckDB can run.

They are also kept in the index as `index.sql`, with whole paths, for `duckdb -init`. The views read files that stay for
a day after others have taken their place, so whoever holds them open is not disturbed by a refresh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

import duckdb

from trajstore.reading.handles import StoreHandle
from trajstore.reading.sql.files import write_text
from trajstore.reading.sql.index import Index, refresh
from trajstore.reading.sql.slabs import METRICS_COLUMNS, SEGMENTS_COLUMNS
from trajstore.reading.sql.text import identifier, literal, read_parquet

__all__ = ["definitions", "definitions_file"]


def definitions(index: Index) -> str:
    """Return the statements that make views and macros of an index."""
    return "\n".join(
        [
            _view("_known", [index.experiments], {}),
            _view("experiments", [index.experiments], index.left_out),
            _view("runs", [index.runs], index.left_out),
            _view("metrics", index.metrics, index.left_out, METRICS_COLUMNS),
            _view("segments", index.segments, index.left_out, SEGMENTS_COLUMNS),
            _series(index.names),
            _macros(),
        ]
    )


def definitions_file(store: StoreHandle) -> Path:
    """Bring the index up to date, and return the file that gives a DuckDB shell its views and macros."""
    _ = store.root  # a clear error, if this is no store
    index = refresh(store)
    file = index.folder.absolute() / "index.sql"
    write_text(file, f"-- duckdb -init this file: the views and macros of a trajstore's index\n{definitions(index)}")
    return file


def _view(
    name: str, parquet: Sequence[Path], left_out: Mapping[str, str], empty: Mapping[str, str] | None = None
) -> str:
    """Return a view; whoever asks it for an experiment that cannot be read, or for all, is told why.

    Asking for others is no error: DuckDB sees that their names are other ones before it looks at the row that says so.
    Of that row nothing else is known to it, so that no other condition lets it be skipped.
    """
    if parquet:
        rows = f"SELECT * FROM {read_parquet(file.absolute() for file in parquet)}"
    else:  # nothing is recorded yet
        rows = (
            f"SELECT {', '.join(f'NULL::{kind} AS {identifier(c)}' for c, kind in (empty or {}).items())} WHERE false"
        )
    if left_out:
        with duckdb.connect() as connection:
            others = [column for column in connection.sql(rows).columns if column != "experiment"]
        for experiment, why in left_out.items():
            told = f"error({literal(why)})"
            unknown = ", ".join(f"{told} AS {identifier(column)}" for column in others)
            rows += (
                f" UNION ALL BY NAME SELECT {literal(experiment)} AS experiment, {unknown} FROM range(1) WHERE {told}"
            )
    return f"CREATE OR REPLACE VIEW {name} AS {rows};"


def _series(metrics: Sequence[str]) -> str:
    """Return the macro that gives one metric, named by a text, of an experiment.

    Which branch it is is known before anything is read, so DuckDB reads the column of this metric only.
    """
    branches = " ".join(f"WHEN {literal(name.lower())} THEN m.{identifier(name)}" for name in metrics)
    value = f"CASE lower(metric) {branches} END" if branches else "NULL::DOUBLE"
    return (
        "CREATE OR REPLACE MACRO _series(experiment, metric) AS TABLE "
        f'SELECT m."order", m.seed, m.step, {value} AS value FROM metrics m WHERE m.experiment = experiment;'
    )


@cache
def _macros() -> str:
    return files("trajstore.reading.sql").joinpath("macros.sql").read_text(encoding="utf-8")
