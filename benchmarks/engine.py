"""What an operator application costs: naive, vmapped, wavefront, in one run on the same problem.

    python benchmarks/engine.py [--problem NAME …] [--repeats 5] [--lanes 1 --lanes 2 …] [--device auto] [--json FILE]

Naive is eager PyTorch as one would write it by hand: a module, `torch.optim.SGD`, a new start for every chain.
Contenders take turns, each for about a second, as often as `--repeats` says; the table has the median and the
spread of microseconds per application, and the ratio to naive within each turn. Floor is the time that reading and
writing a state once takes at the bandwidth measured here: no engine that keeps states in memory is faster.
Needs only torch and numpy beside trajstore, so that a bare GPU machine can run it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from trajstore.engine import Work
from trajstore.engine.orders import Leg
from trajstore.engine.plan import Plan, ready
from trajstore.engine.ticks import PROVEN_TICKS
from trajstore.operators.sgd import SGD
from trajstore.operators.state import State, beginning
from trajstore.problems import Problem
from trajstore.problems._module import ModuleProblem
from trajstore.problems.regression import Regression

Run = Callable[[float], float]
"""Work for about so many seconds, return microseconds per application."""


def mlp(depth: int = 5, width: int = 500) -> nn.Module:
    """Return the paper's network for 28×28 images."""
    sizes = [784] + [width] * depth
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, 10))


def cnn() -> nn.Module:
    """Return a small convolutional network with BatchNorm."""
    block = lambda a, b: [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]  # noqa: E731
    return nn.Sequential(*block(3, 16), *block(16, 32), nn.Flatten(), nn.Linear(32 * 64, 10))


def resnet18() -> nn.Module:
    """Return torchvision's ResNet-18 with the CIFAR stem."""
    from torchvision.models import resnet18

    model = resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model


def images(module: Callable[[], nn.Module], shape: tuple[int, ...], batch_size: int) -> ModuleProblem:
    """Return a problem on random images: what they show costs nothing."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(256, *shape, generator=generator), torch.randint(10, (256,), generator=generator)
    return ModuleProblem(module, F.cross_entropy, data, batch_size=batch_size, eval_batch=64)


Loss = Callable[..., torch.Tensor]

PROBLEMS: dict[str, tuple[Callable[[], Problem], Callable[[], nn.Module], Loss, float]] = {
    "regression 3×300, batch 1": (Regression, lambda: Regression().module(), F.mse_loss, 0.05),
    "MLP 5×500, batch 8": (
        lambda: images(lambda: mlp(5, 500), (1, 28, 28), 8),
        lambda: mlp(5, 500),
        F.cross_entropy,
        1e-3,
    ),
    "CNN with BatchNorm, batch 8": (lambda: images(cnn, (3, 32, 32), 8), cnn, F.cross_entropy, 0.01),
    "ResNet-18, batch 8": (lambda: images(resnet18, (3, 32, 32), 8), resnet18, F.cross_entropy, 0.025),
}


def naive(problem: Problem, module: Callable[[], nn.Module], loss: Loss, lr: float, device: torch.device) -> Run:
    """Train by hand; starting again for every chain costs nothing here."""
    batches = problem.build(device).batches(0)

    def run(seconds: float) -> float:
        torch.manual_seed(0)
        model = module().to(device)  # building it anew for each chain would cost more than a short chain
        optimizer = torch.optim.SGD(model.parameters(), lr)
        done, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds or done < 3:
            x, y, *_ = batches[done % 50 + 1]
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
            done += 1
        _wait(device)
        return (time.perf_counter() - begin) / done * 1e6

    return run


def engine(problem: Problem, lr: float, plan: Plan, device: torch.device) -> tuple[Run, float, float, str]:
    """Return chains by an engine without metrics, the seconds it takes to get ready and to be proven, and the plan."""
    live = problem.build(device)
    live.evaluate = lambda params, buffers: {}  # type: ignore[method-assign]
    begin = time.perf_counter()
    plan, computing = ready(plan, live, SGD(lr), [(0, 0)])
    seconds_ready = time.perf_counter() - begin
    origin = computing.start(0)

    def seconds(ticks: int) -> float:
        begin = time.process_time()  # of all threads, whatever else the machine does
        for _ in computing.run([Work(0, Leg("forward"), origin, [ticks])] * plan.lanes):
            pass
        _wait(device)
        return time.process_time() - begin

    # Getting ready proved one tick of a compiled wave; none of an eager one.
    missing = PROVEN_TICKS - plan.compiled
    proof = (seconds(PROVEN_TICKS) - seconds(PROVEN_TICKS)) * PROVEN_TICKS / missing

    def run(seconds: float) -> float:
        length, total, spent = 4, 0, 0.0
        while spent < seconds:
            length = min(2 * length, 4096)
            works = [Work(0, Leg("backward"), origin, [length])] * plan.lanes
            begin = time.perf_counter()
            for _ in computing.run(works):
                pass
            _wait(device)
            spent, total = spent + time.perf_counter() - begin, total + length * plan.lanes
        return spent / total * 1e6

    return run, seconds_ready, proof, str(plan)


def floor(problem: Problem, device: torch.device, lanes: int) -> float:
    """Return microseconds to read and write one state, at the bandwidth of scaling a wave in place."""
    params, buffers = problem.build(device).initial(0)
    numbers = sum(t.numel() for t in beginning(params, buffers, {}).params.values())
    wave = torch.randn(lanes * numbers, device=device)
    times = []
    for _ in range(30):
        begin = time.perf_counter()
        wave.mul_(1.000001)
        _wait(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times) / lanes * 1e6


def state_megabytes(problem: Problem) -> float:
    """Return the size of the parameters."""
    state: State = beginning(*problem.build(torch.device("cpu")).initial(0), {})
    return sum(t.numel() * t.element_size() for t in state.params.values()) / 1e6


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(name: str, widths: Sequence[int], repeats: int, device: torch.device) -> dict[str, Any]:
    """Measure one problem, with waves of several widths."""
    make, module, loss, lr = PROBLEMS[name]
    problem, threads = make(), torch.get_num_threads()
    contenders: dict[str, Run] = {"naive": naive(problem, module, loss, lr, device)}
    notes: dict[str, str] = {}
    for label, plan in {
        "reference": Plan("reference", threads=threads),
        "vmap eager": Plan("wavefront", max(widths), threads=threads),
        **{f"wavefront {w}": Plan("wavefront", w, compiled=True, threads=threads) for w in widths},
    }.items():
        contenders[label], seconds, proof, notes[label] = engine(problem, lr, plan, device)
        notes[label] += f", ready in {seconds:.1f} s, proven in {max(0.0, proof):.2f} s of CPU time"
    times: dict[str, list[float]] = {label: [] for label in contenders}
    for _ in range(repeats):
        for label, run in contenders.items():
            times[label].append(run(1.0))
    least = floor(problem, device, max(widths))
    return {
        "problem": name, "megabytes": state_megabytes(problem), "floor": least, "notes": notes,
        "engines": {
            label: {
                "median": statistics.median(t), "least": min(t), "most": max(t),
                "ratio": statistics.median(n / x for n, x in zip(times["naive"], t, strict=True)),
                "share_of_floor": least / statistics.median(t),
            }
            for label, t in times.items()
        },
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--problem", action="append", help="part of a problem's name; repeatable")
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--lanes", type=int, action="append", help="width of a wave; repeatable")
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    device = torch.device(given.device)
    widths = given.lanes or ([64, 256] if device.type == "cuda" else [1, torch.get_num_threads(), 32])
    chosen = [n for n in PROBLEMS if not given.problem or any(p.lower() in n.lower() for p in given.problem)]
    where = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(f"torch {torch.__version__}, {where}; µs per operator application, median (least to most) of {given.repeats}")
    results = []
    for name in chosen:
        result = measure(name, widths, given.repeats, device)
        results.append(result)
        print(f"\n{name}: {result['megabytes']:.2f} MB of parameters, floor {result['floor']:.1f} µs")
        for label, r in result["engines"].items():
            print(
                f"  {label:<13} {r['median']:>9.1f}  ({r['least']:.1f} to {r['most']:.1f})  {r['ratio']:>5.1f}× naive"
                f"  {r['share_of_floor']:>6.1%} of the floor  {result['notes'].get(label, '')}",
                flush=True,
            )
    if given.json:
        given.json.write_text(json.dumps({"torch": torch.__version__, "machine": where, "results": results}, indent=2))


if __name__ == "__main__":
    main()
