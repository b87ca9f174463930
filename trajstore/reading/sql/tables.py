"""The tables `experiments` and `runs`: what was recorded, with hyperparameters as columns."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import duckdb

from trajstore.errors import printable
from trajstore.reading.drawing import drawing_of
from trajstore.reading.handles import ExperimentHandle
from trajstore.reading.sql.files import copy
from trajstore.reading.sql.text import literal

__all__ = ["EXPERIMENTS_COLUMNS", "RUNS_COLUMNS", "experiment_row", "run_rows", "write_table"]

EXPERIMENTS_COLUMNS = {
    "experiment": "VARCHAR", "problem": "VARCHAR", "operator": "VARCHAR", "steps": "BIGINT", "orders": "VARCHAR[]",
    "seeds": "BIGINT[]", "metrics": "VARCHAR[]", "parameters": "BIGINT", "config_digest": "VARCHAR",
    "config": "VARCHAR",
}  # fmt: skip
RUNS_COLUMNS = {
    "experiment": "VARCHAR", "problem": "VARCHAR", "operator": "VARCHAR", "steps": "BIGINT", "order": "VARCHAR",
    "seed": "BIGINT", "init_seed": "BIGINT", "data_seed": "BIGINT", "last_step": "BIGINT", "complete": "BOOLEAN",
}  # fmt: skip
"""What `runs` has beside a column a hyperparameter."""


def experiment_row(experiment: ExperimentHandle, steps: int) -> dict[str, Any]:
    """Return the row of an experiment, which has so many steps."""
    config, schema = experiment.config, experiment.schema
    return {
        "experiment": experiment.name,
        "problem": experiment.problem,
        "operator": experiment.operator,
        "steps": steps,
        "orders": config["orders"],
        "seeds": config["seeds"],
        "metrics": [*schema.metrics, *schema.late],
        "parameters": schema.layout.parameters,
        "config_digest": experiment.document["config_digest"],
        "config": json.dumps(config),
    }


def run_rows(experiment: ExperimentHandle, steps: int, slabs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the slabs of an experiment, which has so many steps."""
    config = experiment.config
    shared = {
        "experiment": experiment.name,
        "problem": experiment.problem,
        "operator": experiment.operator,
        "steps": steps,
    }
    hyper = _of_own_problem(experiment) | _hyperparameters(config)
    hyper = {name: value for name, value in hyper.items() if name not in RUNS_COLUMNS}
    return [{**shared, **slab, **hyper} for slab in slabs]


def write_table(file: Path, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Write rows as Parquet: the named columns, and others with the narrowest type that holds their values."""
    # DuckDB takes no NUL and no halves of characters; nothing that was recorded has any.
    rows = [{k: printable(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows]
    kinds: dict[str, str] = dict(columns)
    for row in rows:
        for name, value in row.items():
            if name not in columns and value is not None:
                kinds[name] = _wider(kinds.get(name), value)
    text = {name for name, kind in kinds.items() if kind == "VARCHAR"}
    lines = [{k: str(v) if k in text and v is not None else v for k, v in row.items()} for row in rows]
    structure = json.dumps([kinds])
    with duckdb.connect() as connection:
        connection.execute("CREATE TABLE rows AS SELECT $1::JSON AS rows", [json.dumps(lines)])
        parsed = f"SELECT unnest(from_json(rows, {literal(structure)})) AS row FROM rows"
        copy(connection, f"SELECT unnest(row) FROM ({parsed})", file)


def _hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten the fields of problem and operator; a name that both use gets its owner in front."""
    tables = {owner: _leaves(config[owner]) for owner in ("operator", "problem")}
    shared = reduce(set.intersection, (set(t) for t in tables.values()))
    return {
        f"{owner}_{name}" if name in shared else name: value
        for owner, table in tables.items()
        for name, value in table.items()
    }


def _of_own_problem(experiment: ExperimentHandle) -> dict[str, Any]:
    """Return how batches were drawn for a problem of the user's own, under the names that families use for it."""
    if "family" in experiment.config["problem"] and "made" not in experiment.config["problem"]:
        return {}
    drawing = drawing_of(experiment.attributes)
    known = {"batch_size": drawing.batch_size or None, "sampling": drawing.sampling}
    return {name: value for name, value in known.items() if value is not None}


def _leaves(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}".lower()  # SQL does not tell upper case from lower
        if not re.fullmatch(r"\w{1,200}", name):
            continue  # no name of a column; the column `config` has it
        if isinstance(value, Mapping):
            if "family" in value:
                leaves[name] = value["family"]
            leaves |= _leaves(value, f"{name}_")
        elif key != "family":
            finite = not isinstance(value, float) or math.isfinite(value)
            leaves[name] = json.dumps(value) if isinstance(value, list) or not finite else value
    return leaves


def _wider(kind: str | None, value: Any) -> str:  # noqa: ANN401
    own = {bool: "BOOLEAN", int: "BIGINT", float: "DOUBLE"}.get(type(value), "VARCHAR")
    if own == "BIGINT" and not -(2**63) <= value < 2**63:
        own = "VARCHAR"
    if kind is None or kind == own:
        return own
    return "DOUBLE" if {kind, own} == {"BIGINT", "DOUBLE"} else "VARCHAR"
