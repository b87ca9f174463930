"""`trajstore ls`, `trajstore info` and `trajstore sql`: look into a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from trajstore.cli.console import counted, human_bytes, human_seconds, print_csv, print_json, print_table, say, tell
from trajstore.cli.options import JSON, StorePath, complete_experiment

from trajstore._common.units import human_size
from trajstore.errors import ConfigurationError

if TYPE_CHECKING:
    from trajstore.reading.handles import ExperimentHandle
    from trajstore.storage.format.commits import Commits
    from trajstore.store import StoredExperiment

__all__ = ["info", "ls", "sql"]

_WORTH = 10**7
"""From so many bytes of the disk on that packing would save, it is said."""


def ls(store: StorePath, json: JSON = False) -> None:
    """List the experiments of a store."""
    import trajstore as ts
    from trajstore.reading.telling_apart import refuse_damaged, told_apart

    found, damaged = told_apart(ts.open(store), _row)
    rows = [*found.values()]
    if json:
        print_json(rows)
    elif not rows:
        say(f"{store}: no experiments yet")
    else:
        spare = sum(max(0, row["disk_bytes"] - 5 * row["bytes"]) for row in rows)
        for row in rows:
            row["orders"] = ", ".join(row["orders"])
            row["bytes"] = human_size(row["bytes"], row.pop("disk_bytes"))
        print_table(list(rows[0]), [list(row.values()) for row in rows])
        if spare > _WORTH:
            tell(f"small files take most of the disk here; `trajstore pack {store}` saves {human_bytes(spare)} or more")
    refuse_damaged(damaged)


def _row(experiment: ExperimentHandle) -> dict[str, Any]:
    """Return what `ls` tells of an experiment."""
    schema, progress = experiment.schema, experiment.progress()
    return {
        "experiment": experiment.name,
        "problem": experiment.problem,
        "operator": experiment.operator,
        "orders": list(schema.orders),
        "seeds": len(schema.seeds),
        "steps": progress.steps,
        "slabs": int(progress.complete.size),
        "complete": int(progress.complete.sum()),
        "bytes": experiment.bytes_on_disk(),
        "disk_bytes": experiment.bytes_taken(),
    }


def info(
    store: StorePath,
    exp: Annotated[str | None, typer.Argument(metavar="[EXP]", autocompletion=complete_experiment)] = None,
    json: JSON = False,
) -> None:
    """Tell everything about an experiment: configuration, slabs, where it was recorded."""
    import trajstore as ts

    if exp is None:
        ls(store, json)
        return
    experiment = ts.open(store)[exp]
    schema, commits = experiment.schema, experiment.commits()
    slabs, progress = experiment.slabs(commits), experiment.progress(commits)
    raw = int(commits.snapshots.sum()) * schema.layout.row_bytes
    if json:
        print_json(
            {
                **experiment.attributes,
                "steps": progress.steps,
                "slabs": [vars(s) for s in slabs],
                "bytes": experiment.bytes_on_disk(),
                "disk_bytes": experiment.bytes_taken(),
                "raw_bytes": raw,
            }
        )
        return

    config, layout, fills = experiment.config, schema.layout, experiment.fills
    lines = [
        ("experiment", f"{experiment.name}   {experiment.document['config_digest']}"),
        ("problem", _one_line(config["problem"])),
        ("operator", _one_line(config["operator"])),
        ("steps", f"{progress.steps}, states stored at {_stored_where(experiment, commits)}"),
        ("parameters", f"{layout.parameters:,} ({layout.dtype})"),
        *(("metric", f"{name}: {schema.about(name)}") for name in (*schema.metrics, *schema.late)),
        (
            "size",
            f"{human_size(experiment.bytes_on_disk(), experiment.bytes_taken())}, states {human_bytes(raw)} raw, "
            f"codec {schema.codec}",
        ),
        *(("data", f"sha256:{data}") for data in dict.fromkeys(fill.get("data") for fill in fills) if data),
        *(("recorded", _fill_line(fill)) for fill in fills),
    ]
    for label, text in lines:
        say(f"{label:<12} {text}")
    say("")
    init = [seed for _ in schema.orders for seed in schema.init_seeds]
    columns = ["order", "seed", "init seed", "steps", "last step", "complete"]
    rows: list[list[Any]] = [
        [s.order, s.seed, i, s.recorded, s.last_step, s.complete] for s, i in zip(slabs, init, strict=True)
    ]
    if any(slab.diverged_at is not None for slab in slabs):
        columns.append("diverged at")
        rows = [[*row, "" if s.diverged_at is None else s.diverged_at] for row, s in zip(rows, slabs, strict=True)]
    print_table(columns, rows)


def sql(
    store: StorePath,
    query: Annotated[
        str | None, typer.Argument(metavar="QUERY", help="One SELECT on experiments, runs, metrics and segments.")
    ] = None,
    json: JSON = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    parquet: Annotated[
        Path | None, typer.Option("--parquet", metavar="FILE", help="Write the answer as Parquet, with its types.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at FILE.")] = False,
    init: Annotated[
        bool, typer.Option("--init", help='Print the file to begin with: duckdb -init "$(trajstore sql STORE --init)".')
    ] = False,
) -> None:
    """Ask a store in SQL: tables `experiments`, `runs`, `metrics`, `segments`; `"order"` needs its quotes.

    Table macros: tail_variance, level_variance, step_variance, rolling_variance, convergence, each of
    ('EXPERIMENT', 'METRIC', steps := 100).
    """
    import trajstore as ts
    from trajstore.reading.sql import answer, definitions_file, write_answer

    if init:
        if query is not None or json or csv or parquet:
            raise ConfigurationError("--init prints the path of a file for DuckDB; give it no query and no format")
        say(str(definitions_file(ts.open(store))))
        return
    if query is None:
        raise ConfigurationError("give a query, as in 'SELECT * FROM runs', or --init for a DuckDB shell")
    if json + csv + (parquet is not None) > 1:
        raise ConfigurationError("choose one of --json, --csv and --parquet")
    if force and parquet is None:
        raise ConfigurationError("--force replaces a file; name it with --parquet FILE")
    opened = ts.open(store)
    if parquet is not None:
        write_answer(opened, query, parquet, force=force)
        say(str(parquet))
        return
    print_answer(*answer(opened, query), json, csv)


def print_answer(columns: list[str], rows: list[tuple[Any, ...]], json: bool = False, csv: bool = False) -> None:
    """Print what a query gives as a table, or as JSON or CSV."""
    if json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    elif csv:
        print_csv(columns, rows)
    else:
        print_table(columns, rows)


def _stored_where(experiment: StoredExperiment, commits: Commits) -> str:
    record, places = experiment.config["record"], len(experiment.schema.snapshots)
    if experiment.schema.made_by != "problem":  # it has places for more states than there are
        return f"{int(commits.snapshots.any(axis=(0, 1)).sum())} of them"
    if record.get("adaptive") is None:
        return f"{places} of them"
    tail = f", and the last {record['dense_tail']} of each leg" if record.get("dense_tail") else ""
    return f"those of {places} that it took to know {record['adaptive']} to {record['tolerance']:g}{tail}"


def _fill_line(fill: dict[str, Any]) -> str:
    from trajstore.engine.plan import Plan

    where = f"{fill['device']}, {fill['threads']} threads, torch {fill['versions'].get('torch')}"
    spent = ", ".join(f"{what} {human_seconds(s)}" for what, s in (fill.get("seconds") or {}).items())
    when = f"{fill['began']} to {fill['ended'] or '?'}, {counted(len(fill['slabs']), 'slab')}"
    how = Plan.from_json(fill["plan"]) if "plan" in fill else fill.get("engine")
    return ", ".join(str(part) for part in (when, how, where) if part) + (f" ({spent})" if spent else "")


def _one_line(table: dict[str, Any]) -> str:
    fields = ", ".join(
        f"{k} = {_one_line(v) if isinstance(v, dict) else v}" for k, v in table.items() if k not in ("family", "made")
    )
    return f"{table.get('family', '')}({fields})"
