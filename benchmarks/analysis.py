"""Statistics of a store's parameters in one pass, against plain xarray doing the same work.

    python benchmarks/analysis.py --store FOLDER [--seeds 5] [--steps 1400] [--repeats 3] [--matrix 100] [--cluster]

Records the preset fig4 (181,501 float32 parameters, forward and backward; five seeds of 1,400 steps are 10 GB raw) once
into FOLDER. Then, each in a process of its own so that its peak memory is its own: distances to θ₀, to the last iterate
and between successive ones, and the variance of the parameters about a line over the last 100 iterates, by
`analysis.stream`; by plain xarray on the same dataset; and by plain xarray on what `xr.open_zarr` gives. Results are
compared. Contenders take turns; the table has the median and the spread, and the time of this process's cores, which
tells on a machine that is shared what the time would be alone. Files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

WINDOW = 100
NAME = "fig4"


def recorded(store: Path, seeds: int, steps: int) -> None:
    """Record what is missing."""
    import trajstore as ts

    asked = {"name": NAME, "seeds": list(range(seeds)), "steps": steps}
    ts.run(ts.Experiment.preset("fig4", asked), store, resume=True, durability="none")


def opened(store: Path) -> xr.Dataset:
    """Open as users do."""
    import trajstore as ts

    return ts.open(store)[NAME].dataset()


def streaming(store: Path, cluster: str | None = None) -> xr.Dataset:
    """One pass."""
    from trajstore import analysis
    from trajstore.reading.distances import Distance, Successive

    asked = [Distance("start"), Distance("last"), Successive(), analysis.ParameterTailVariance(WINDOW)]
    return analysis.stream(opened(store), asked, cluster=cluster)


def on_a_cluster(store: Path) -> xr.Dataset:
    """One pass by two worker processes, which are there already."""
    from trajstore.recording.workers import connected

    with connected(2) as client:
        begun = time.perf_counter()
        found = streaming(store, client)
        return found.assign_attrs(seconds=time.perf_counter() - begun)


def plainly(ds: xr.Dataset) -> xr.Dataset:
    """Do the same as an xarray user would write it."""
    p = ds["params"].reset_coords(drop=True).astype(np.float64)

    def distance(difference: xr.DataArray) -> xr.DataArray:
        return np.sqrt((difference**2).sum("param"))

    tail = p.isel(snapshot=slice(-WINDOW, None))
    t = tail["snapshot"] - tail["snapshot"].mean()
    rest = tail - tail.mean("snapshot")
    rest = rest - (rest * t).sum("snapshot") / (t**2).sum() * t
    lazy = xr.Dataset(
        {
            "distance_to_start": distance(p - p.isel(snapshot=0, drop=True)),
            "distance_to_last": distance(p - p.isel(snapshot=-1, drop=True)),
            "distance_to_previous": distance(p.diff("snapshot")),
            "parameter_tail_variance": ((rest**2).sum("snapshot") / (WINDOW - 2)).mean("param"),
        }
    )
    return lazy.compute(scheduler="threads")


def plain_zarr(store: Path) -> xr.Dataset:
    """The same without trajstore."""
    return plainly(xr.open_zarr(store, group=NAME, consolidated=False))


def matrix(store: Path, iterates: int) -> xr.Dataset:
    """Return all distances between some iterates of the first slab."""
    from trajstore import analysis

    ds = opened(store).isel(order=0, seed=0)
    steps = np.linspace(0, ds.sizes["snapshot"] - 1, iterates).astype(int)
    return analysis.distance_matrix(ds.isel(snapshot=steps)).to_dataset(name="matrix")


def reading(store: Path) -> xr.Dataset:
    """Read and decode every block, and do nothing with it."""
    import dask

    blocks = opened(store)["params"].data.to_delayed().ravel()
    dask.compute(*(dask.delayed(np.shape)(block) for block in blocks), scheduler="threads")
    return xr.Dataset()


CONTENDERS: dict[str, Callable[[Path], xr.Dataset]] = {
    "reading alone": reading,
    "analysis.stream": streaming,
    "analysis.stream, two worker processes": on_a_cluster,
    "plain xarray, store.dataset()": lambda store: plainly(opened(store)),
    "plain xarray, xr.open_zarr": plain_zarr,
}


def alone(name: str, store: Path, out: Path) -> None:
    """Run one contender in this process and write what it took."""
    from trajstore import analysis  # noqa: F401  importing is not timed
    from trajstore.reading import dataset  # noqa: F401

    begun, before = time.perf_counter(), time.process_time()
    found = matrix(store, int(name.split()[1])) if name.startswith("matrix") else CONTENDERS[name](store)
    core_seconds = time.process_time() - before
    seconds = found.attrs.get("seconds", time.perf_counter() - begun)
    peak = _peak()
    values = {str(k): np.asarray(v.values, dtype=float) for k, v in found.data_vars.items()}
    np.savez(out, seconds=seconds, core_seconds=core_seconds, peak=peak, **values)


def _peak() -> float:
    """Return this process's own peak memory in GB; what getrusage tells begins with the parent's."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def turn(name: str, store: Path, out: Path) -> dict[str, Any]:
    """Run one contender in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--store", str(store), "--alone", name, "--out", str(out)]
    subprocess.run(command, check=True)
    with np.load(out) as found:
        return {k: found[k] for k in found.files}


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Compare what two contenders found."""
    for name in set(one) & set(other) - {"seconds", "core_seconds", "peak"}:
        a, b = one[name], other[name]
        a = a[..., -b.shape[-1] :] if a.ndim == b.ndim == 3 else a  # a difference has one step less
        assert np.allclose(a, b, rtol=1e-9, equal_nan=True), name


def main() -> None:
    """Record, take turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--matrix", type=int, nargs="*", default=[100, 400])
    parser.add_argument("--only", nargs="*", choices=list(CONTENDERS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    store = asked.store / "analysis.zarr"
    if asked.alone:
        alone(asked.alone, asked.store, asked.out)
        return
    asked.store.mkdir(parents=True, exist_ok=True)
    recorded(store, asked.seeds, asked.steps)
    raw = opened(store)["params"].nbytes / 1e9
    names = [*(asked.only or CONTENDERS), *(f"matrix {n}" for n in asked.matrix)]
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(asked.repeats):
        for name in names:
            turns[name].append(turn(name, store, asked.store / "found.npz"))
            same(turns[names[0]][-1] if name == names[0] else turns.get("analysis.stream", [{}])[-1], turns[name][-1])
    print(f"{raw:.2f} GB raw, {os.cpu_count()} cores, {platform.processor() or platform.machine()}")
    print("| | seconds | core-seconds | GB/s raw | peak memory, GB |\n| --- | --- | --- | --- | --- |")
    rows = {}
    for name, found in turns.items():
        times = [float(one["seconds"]) for one in found]
        middle, peak = statistics.median(times), max(float(one["peak"]) for one in found)
        speed = "" if name.startswith("matrix") else f"{raw / middle:.2f}"
        cores = statistics.median(float(one["core_seconds"]) for one in found)
        print(f"| {name} | {middle:.2f} ({min(times):.2f}–{max(times):.2f}) | {cores:.2f} | {speed} | {peak:.2f} |")
        rows[name] = {"seconds": times, "core_seconds": cores, "peak": peak}
    if asked.json:
        asked.json.write_text(json.dumps({"raw": raw, "rows": rows}))


if __name__ == "__main__":
    main()
