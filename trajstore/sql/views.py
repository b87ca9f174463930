"""Views and macros over the files of an index, as statements that any DuckDB can run.

They are also kept in the index as `index.sql`, with whole paths, for `duckdb -init`. The views read files that stay for
a day after others have taken their place, so whoever holds them open is not disturbed by a refresh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from trajstore.sql.files import write_text
from trajstore.sql.index import Index, refresh
from trajstore.sql.slabs import METRICS_COLUMNS, SEGMENTS_COLUMNS
from trajstore.sql.text import identifier, literal, read_parquet
from trajstore.store import Store

__all__ = ["definitions", "definitions_file"]


def definitions(index: Index) -> str:
    """Return the statements that make views and macros of an index."""
    return "\n".join(
        [
            _view("experiments", [index.experiments]),
            _view("runs", [index.runs]),
            _view("metrics", index.metrics, METRICS_COLUMNS),
            _view("segments", index.segments, SEGMENTS_COLUMNS),
            _series(index.names),
            _macros(),
        ]
    )


def definitions_file(store: Store) -> Path:
    """Bring the index up to date, and return the file that gives a DuckDB shell its views and macros."""
    _ = store.root  # a clear error, if this is no store
    index = refresh(store)
    file = index.folder.absolute() / "index.sql"
    write_text(file, f"-- duckdb -init this file: the views and macros of a trajstore's index\n{definitions(index)}")
    return file


def _view(name: str, parquet: Sequence[Path], empty: Mapping[str, str] | None = None) -> str:
    if parquet:
        rows = f"SELECT * FROM {read_parquet(file.absolute() for file in parquet)}"
    else:  # nothing is recorded yet
        rows = (
            f"SELECT {', '.join(f'NULL::{kind} AS {identifier(c)}' for c, kind in (empty or {}).items())} WHERE false"
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
    return files("trajstore.sql").joinpath("macros.sql").read_text(encoding="utf-8")
