"""Do the libraries that answer questions work: DuckDB, confined to the store, and Dask, with worker processes?"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trajstore.machine import State, check

__all__: list[str] = []


@check("sql", "Does SQL answer, and read nothing but the store?")
def _sql(folder: Path) -> Iterator[tuple[State, str, str, Mapping[str, Any]]]:
    from trajstore.errors import QueryError
    from trajstore.experiment.experiment import Experiment
    from trajstore.reading.sql import query_store, rows_of
    from trajstore.recording.running import run

    experiment = Experiment.preset("quadratic", {"name": "tiny", "steps": 3, "seeds": [0], "orders": ["forward"]})
    store = run(experiment, folder / "tiny.zarr", engine="reference", durability="none").store
    secret, stolen = folder / "secret.csv", folder / "stolen.csv"
    secret.write_text("a,b\n1,2\n", encoding="utf-8")
    counted = rows_of(query_store(store, "SELECT count(*) FROM metrics"))
    if counted != [(4,)]:
        yield "wrong", f"4 recorded steps are counted as {counted}", "pip install --upgrade duckdb", {}
    for query, outcome in (
        (f"SELECT * FROM read_csv('{secret}')", "a file outside the store was read"),
        (f"SELECT * FROM '{secret}'", "a file outside the store was read"),
        (f"COPY (SELECT 1) TO '{stolen}'", "a file outside the store was written"),
        ("SET enable_external_access = true", "a setting could be changed"),
    ):
        try:
            rows_of(query_store(store, query))
        except QueryError:
            continue
        yield "wrong", f"{outcome}: {query}", "ask no stores of strangers; use another release of duckdb", {}
        return
    if stolen.exists():
        yield "wrong", "a file outside the store was written", "use another release of duckdb", {}
    elif counted == [(4,)]:
        yield "good", "SQL answers, and reads nothing but the store", "", {}


@check("dask", "Can work be given to threads, and to processes of its own?")
def _dask(folder: Path) -> Iterator[tuple[State, str, str, Mapping[str, Any]]]:
    import dask.array

    from trajstore.recording.workers.cluster import connected

    total = int(dask.array.arange(10_000, chunks=1_000).sum().compute())
    if total != 49_995_000:
        yield "wrong", f"a sum of whole numbers by threads is {total}, not 49995000", "reinstall dask", {}
        return
    begun = time.perf_counter()
    try:
        with connected(1) as client:
            answer = client.submit(sum, [1, 2, 3]).result(timeout=300)
    except Exception as error:
        told = " ".join(f"no worker process can be started: {type(error).__name__}: {error}".split())
        yield "slow", told[:300], "record with --workers 0", {}
        return
    seconds = time.perf_counter() - begun
    state: State = "good" if answer == 6 else "wrong"
    yield state, f"threads compute, and a worker process is ready after {seconds:.0f} s", "", {"seconds": seconds}
