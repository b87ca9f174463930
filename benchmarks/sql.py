"""What SQL costs on many metrics: the first index, a refresh, queries; and pandas and xarray doing the same work.

    python benchmarks/sql.py [--slabs 2000] [--steps 10000] [--repeats 5] [--json FILE]

A store is made whose slabs have a commit record each and two metrics of random numbers, written as chunks without a
training loop. Then the first index is built; the store is asked again when nothing is new, and when one slab is; and
queries are asked through `store.sql`: their time begins with opening the store, so it holds the look for what is new.
Pandas groups the same columns after DuckDB read them into a frame, xarray reads the arrays of the store. Everything
lies in the page cache. Median of `--repeats`, and the range.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import zarr

import trajstore as ts
from trajstore.experiment.experiment import Experiment
from trajstore.reading.handles import open_root
from trajstore.reading.sql.index import refresh
from trajstore.storage.format.schema import Schema
from trajstore.storage.writing.declaring import declare
from trajstore.storage.writing.segment import array_of

SEGMENTS = 10
NAME = "big"
WINDOW = 1000


def make(folder: Path, slabs: int, steps: int) -> Path:
    """Write a store of many slabs."""
    small = ts.run(Experiment.preset("quadratic", {"steps": 2, "seeds": [0]}), folder / "small.zarr")
    seeds = tuple(range(slabs // 2))
    schema = replace(
        small.schema, seeds=seeds, init_seeds=seeds, data_seeds=seeds, orders=("forward", "backward"), steps=steps,
        snapshots=tuple(range(0, steps, -(-steps // SEGMENTS))), snapshots_per_segment=1, batch_size=0, components=1,
        metrics={"train_loss": None, "test_loss": None},
    )  # fmt: skip
    config = {**small.config, "steps": steps, "seeds": list(seeds), "orders": list(schema.orders)}
    group = declare(open_root(folder / "big.zarr", "none"), NAME, schema, config, [])
    for order in range(2):
        for seed in seeds:
            write(group, order, seed)
    return folder / "big.zarr"


def write(group: zarr.Group, order: int, seed: int) -> None:
    """Write a slab: its series, then its record."""
    there = array_of(group, "leg").shape[2]
    rng = np.random.default_rng()
    for name, values in {"leg": 0, "measured": 3, "train_loss": None, "test_loss": None}.items():
        array_of(group, name)[order, seed] = rng.normal(size=there) if values is None else np.full(there, values)
    records = array_of(group, "committed")
    words = rng.integers(-(2**62), 2**62, records.shape[2:])
    steps = np.diff(Schema.of(group).segment_starts, append=there)
    words[:, 0], words[:, 1], words[:, -1] = steps, 1, 0
    records[order, seed] = words


def timed(action: Callable[[], Any], repeats: int) -> list[float]:
    """Return how long an action took each time."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return seconds


def main() -> None:
    """Make the store, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slabs", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    told: dict[str, list[float]] = {}

    def tell(what: str, action: Callable[[], Any], repeats: int = given.repeats) -> None:
        told[what] = seconds = timed(action, repeats)
        print(f"{what:<60} {statistics.median(seconds):7.2f} s   {min(seconds):.2f} to {max(seconds):.2f}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        path = make(Path(folder), given.slabs, given.steps)
        print(f"duckdb {duckdb.__version__}, {platform.machine()}; {given.slabs} slabs of {given.steps + 1} steps, "
              f"made in {time.perf_counter() - began:.0f} s")  # fmt: skip

        def ask(query: str) -> list[Any]:
            return ts.open(path).sql(query).fetchall()

        def one_new() -> list[Any]:
            group = open_root(path, "none")[NAME]
            assert isinstance(group, zarr.Group)
            write(group, 0, 7)
            return ask("SELECT count(*) FROM runs")

        by_slab = 'SELECT "order", seed, var_samp(test_loss) FROM metrics GROUP BY ALL'
        by_step = 'SELECT "order", step, avg(test_loss) FROM metrics GROUP BY ALL'
        tell("first index", lambda: ask("SELECT count(*) FROM runs"), 1)
        tell("nothing new", lambda: ask("SELECT count(*) FROM runs"))
        tell("one slab new", one_new)
        tell("group by order and seed", lambda: ask(by_slab))
        tell("group by order and step", lambda: ask(by_step))
        for macro in ("tail_variance", "convergence"):
            tell(f"{macro}, {WINDOW} steps", lambda m=macro: ask(f"FROM {m}('{NAME}', 'test_loss', {WINDOW})"))  # type: ignore[misc]
        tell("rolling_variance, its maximum", lambda: ask(
            f"SELECT max(variance) FROM rolling_variance('{NAME}', 'test_loss', {WINDOW})"), 1)  # fmt: skip

        files = [str(file) for file in refresh(ts.open(path)).metrics]
        print(f"{len(files)} files in the index, {sum(Path(f).stat().st_size for f in files) / 1e6:.0f} MB")
        read = f"""SELECT "order", seed, test_loss FROM read_parquet({files})"""
        frame: pd.DataFrame = duckdb.sql(read).df()
        tell("pandas: read the columns into a frame", lambda: duckdb.sql(read).df(), 1)
        tell("pandas: group the frame", lambda: frame.groupby(["order", "seed"])["test_loss"].var())

        def with_xarray() -> Any:  # noqa: ANN401
            return ts.open(path)[NAME].dataset()["test_loss"].var("step", ddof=1).compute()

        tell("xarray: the variance from the store", with_xarray, 1)
    if given.json:
        given.json.write_text(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
