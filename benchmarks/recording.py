"""What whole recordings cost, against naive backward SGD in the same run.

    python benchmarks/recording.py speed [--steps 1400] [--repeats 3] [--json FILE]
    python benchmarks/recording.py plans [--steps 1400] [--repeats 2]
    python benchmarks/recording.py grids [--repeats 3]

`speed` runs the command `trajstore record fig4 --seeds 0`, from cold (no compiled code, no plan) and then as often as
`--repeats` says with both from the run before, and compares each with naive backward SGD: eager PyTorch that starts
again for each n, timed before and after for a few seconds and multiplied by the number of operator applications.
`plans` runs it with every plan that could be chosen on this machine. `grids` asks in one process whether an
application costs the same however many steps there are, and what a grid of every tenth step saves.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from engine import naive

from trajstore.engine import Work
from trajstore.engine.orders import Leg
from trajstore.engine.plan import Plan, ready
from trajstore.engine.walk import applications
from trajstore.experiment.experiment import Experiment
from trajstore.problems.regression import Regression

PLANS = {
    "as planned": [],
    "one process, 1 lane": ["--workers", "0", "--lanes", "1"],
    "one process, 2 lanes": ["--workers", "0", "--lanes", "2"],
    "one process, 32 lanes": ["--workers", "0", "--lanes", "32"],
    "two workers, 1 lane": ["--workers", "2", "--lanes", "1"],
    "two workers, 32 lanes": ["--workers", "2", "--lanes", "32"],
}


def fig4(steps: int) -> Experiment:
    """Return the experiment that is recorded."""
    return Experiment.preset("fig4", {"seeds": [0], "steps": steps})


def naive_seconds(steps: int) -> float:
    """Return what the operator applications of forward and naive backward SGD take here, from three seconds of them."""
    problem = Regression()
    run = naive(problem, lambda: problem.module(), F.mse_loss, 0.05, torch.device("cpu"))
    run(0.5)
    experiment = fig4(steps)
    return run(3.0) * 1e-6 * applications(experiment.orders, experiment.steps, experiment.grid)


def command(steps: int, caches: Path, options: list[str]) -> float:
    """Record by the command, and return the seconds it took."""
    # torch keeps compiled headers in the folder for temporary files, wherever its cache is.
    environment = os.environ | dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME", "TMPDIR"), str(caches))
    with tempfile.TemporaryDirectory() as folder:
        words = ["record", "fig4", "--seeds", "0", "--steps", str(steps), "--store", f"{folder}/store.zarr", *options]
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "trajstore.cli.main", *words], env=environment, check=True)
        return time.perf_counter() - begin


def speed(steps: int, repeats: int) -> dict[str, Any]:
    """Time the command cold and warm, and naive before and after each."""
    told: dict[str, Any] = {"steps": steps, "runs": []}
    with tempfile.TemporaryDirectory() as caches:
        before = naive_seconds(steps)
        for turn in range(repeats + 1):
            seconds, after = command(steps, Path(caches), []), naive_seconds(steps)
            run = {"cached": turn > 0, "seconds": seconds, "naive": (before + after) / 2}
            run["ratio"] = run["naive"] / seconds
            told["runs"].append(run)
            print(
                f"{'cached' if turn else 'cold':<7} {seconds:6.1f} s, naive {run['naive']:6.0f} s "
                f"(before {before:.0f}, after {after:.0f}): {run['ratio']:.1f}×",
                flush=True,
            )
            before = after
    warm = [run["ratio"] for run in told["runs"] if run["cached"]]
    print(f"cached: median {statistics.median(warm):.1f}×, from {min(warm):.1f} to {max(warm):.1f}")
    return told


def plans(steps: int, repeats: int) -> dict[str, Any]:
    """Time the command by every plan, in turns, with code and plans cached."""
    seconds: dict[str, list[float]] = {name: [] for name in PLANS}
    with tempfile.TemporaryDirectory() as caches:
        for options in PLANS.values():
            command(200, Path(caches), options)
        command(steps, Path(caches), [])  # the plan is for so many steps
        for _ in range(repeats):
            for name, options in PLANS.items():
                seconds[name].append(command(steps, Path(caches), options))
    best = min(statistics.median(s) for s in seconds.values())
    for name, s in seconds.items():
        print(
            f"{name:<22} {statistics.median(s):6.1f} s ({min(s):.1f} to {max(s):.1f}), "
            f"{statistics.median(s) / best:.2f} times the best"
        )
    return {"steps": steps, "seconds": seconds}


def grids(repeats: int) -> dict[str, Any]:
    """Time backward iterates with their metrics, in one process, for several numbers of steps and grids."""
    live, plan = Regression().build(torch.device("cpu")), Plan("wavefront", torch.get_num_threads(), compiled=True)
    _, engine = ready(plan, live, fig4(1).operator, [(0, 0)])
    origin = engine.start(0)

    def timed(steps: int, every: int) -> float:
        work = Work(0, Leg("backward"), origin, list(range(every, steps + 1, every)))
        begin = time.perf_counter()
        for _ in engine.run([work]):
            pass
        return time.perf_counter() - begin

    timed(100, 1)
    asked = [(200, 1), (400, 1), (800, 1), (1600, 1), (1600, 10)]
    seconds: dict[tuple[int, int], list[float]] = {a: [] for a in asked}
    for _ in range(repeats):
        for a in asked:
            seconds[a].append(timed(*a))
    median = {a: statistics.median(s) for a, s in seconds.items()}
    for (steps, every), s in median.items():
        total = sum(range(every, steps + 1, every))
        print(
            f"{steps:>5} steps, every {every:<2}: {s:7.2f} s, "
            f"{s / total * 1e6:5.1f} µs an application with its share of metrics"
        )
    print(f"every tenth of 1,600 steps: {median[1600, 1] / median[1600, 10]:.1f} times cheaper than every step")
    return {f"{n} every {k}": s for (n, k), s in median.items()}


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("what", choices=["speed", "plans", "grids"])
    arguments.add_argument("--steps", type=int, default=1400)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    run: Mapping[str, Callable[[], dict[str, Any]]] = {
        "speed": lambda: speed(given.steps, given.repeats),
        "plans": lambda: plans(given.steps, given.repeats),
        "grids": lambda: grids(given.repeats),
    }
    told = {"torch": torch.__version__, "threads": torch.get_num_threads(), **run[given.what]()}
    if given.json:
        given.json.write_text(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
