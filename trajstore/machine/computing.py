"""Does this machine compute what it should? Sums have an exact answer, a compiled tick has a definition."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trajstore.engine import Work
from trajstore.engine.orders import Leg
from trajstore.engine.plan import Plan, make_engine
from trajstore.engine.proving import Refusal
from trajstore.engine.reference import ReferenceEngine
from trajstore.engine.toolchain import missing_for_compiling
from trajstore.experiment.experiment import Experiment
from trajstore.machine import State, check

__all__ = ["exact_product"]

_STEPS, _LANES = 8, 3
_NETWORK = {"family": "regression", "width": 8, "depth": 2, "points": 21, "batch_size": 2}
_LINEAR = {"family": "least-squares", "d": 4, "n": 20, "batch_size": 2}
_OPERATORS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sgd with momentum": (_NETWORK, {"family": "sgd", "lr": 0.05, "momentum": 0.9}),
    "adam": (_LINEAR, {"family": "adam", "lr": 0.01}),
}
_DTYPES = ("float64", "float32")


def exact_product(device: torch.device) -> bool:
    """Tell whether products of matrices of whole numbers, whose sums are exact in floating point, come out exactly."""
    rng = np.random.default_rng(0)
    left, right = rng.integers(-8, 9, (257, 129)), rng.integers(-8, 9, (129, 65))
    exact = left @ right  # numpy multiplies whole numbers without a library
    for dtype in (torch.float64, torch.float32):
        one, other = (torch.from_numpy(m).to(device, dtype) for m in (left, right))
        products = {"row": one[0] @ other, "column": one @ other[:, 0], "whole": one @ other}
        expected = {"row": exact[0], "column": exact[:, 0], "whole": exact}
        if not all(np.array_equal(products[k].double().numpy(force=True), expected[k]) for k in products):
            return False
    return bool(np.array_equal(left.astype(float) @ right.astype(float), exact))


@check("arithmetic", "Are products of matrices right, in torch and in numpy?")
def _arithmetic(folder: Path) -> Iterator[tuple[State, str, str, Mapping[str, Any]]]:
    figures = {"cpu": torch.backends.cpu.get_cpu_capability()}
    if exact_product(torch.device("cpu")):
        yield "good", f"products of whole numbers are exact ({figures['cpu']})", "", figures
    else:
        told = "a product of matrices of whole numbers comes out wrong: a linear-algebra library is broken here"
        yield "wrong", told, "reinstall torch and numpy; nothing recorded here can be relied on", figures


@check("compiling", "Can a recording be compiled, and does it compute what its definition says?")
def _compiling(folder: Path) -> Iterator[tuple[State, str, str, Mapping[str, Any]]]:
    if missing := missing_for_compiling():
        told = f"recordings are not compiled, which takes several times as long: {' and '.join(missing)} is missing"
        yield "missing", told, "install what is missing", {"missing": list(missing)}
        return
    for name, (problem, operator) in _OPERATORS.items():
        for dtype in _DTYPES:
            begun = time.perf_counter()
            refusals = _refusals({**problem, "dtype": dtype}, operator)
            figures = {"operator": name, "dtype": dtype, "seconds": time.perf_counter() - begun}
            what = f"compiled {name} in {dtype}"
            if refusals:
                told = f"{what} computes something else than its definition: {'; '.join(map(str, refusals))}"
                yield "wrong", told, "use another release of torch, or record with --engine reference", figures
            else:
                yield "good", f"{what} agrees with its definition ({figures['seconds']:.0f} s)", "", figures


def _refusals(problem: Mapping[str, Any], operator: Mapping[str, Any]) -> Sequence[Refusal]:
    """Run a compiled wave, as recordings do, and return what was refused because it gave something else."""
    table = {"name": "x", "problem": dict(problem), "operator": dict(operator), "steps": _STEPS}
    experiment = Experiment.of(table)
    live = experiment.problem.build(torch.device("cpu"))
    engine = make_engine(Plan("wavefront", _LANES, compiled=True), live, experiment.operator, [(0, 0)])
    steps = range(_STEPS - _LANES + 1, _STEPS + 1)  # a chain for every lane
    for _ in engine.run([Work(0, Leg("backward"), engine.start(0), steps)]):
        pass
    return engine.refusals


@check("recording", "Is what is recorded what comes back, and does verifying find nothing?")
def _recording(folder: Path) -> Iterator[tuple[State, str, str, Mapping[str, Any]]]:
    from trajstore.reading.verify import verify
    from trajstore.recording.running import record_here

    experiment = Experiment.of(
        {"name": "tiny", "problem": _NETWORK, "operator": {"family": "sgd", "lr": 0.05}, "steps": _STEPS}
    )
    live, begun = experiment.problem.build(torch.device("cpu")), time.perf_counter()
    engine = ReferenceEngine(live, experiment.operator, [(0, 0)])
    stored = record_here(experiment, folder / "tiny.zarr", live, engine)
    seconds = time.perf_counter() - begun
    state = stored.state_dict(order="backward", seed=0, step=_STEPS)
    start = engine.start(0)
    ((_, again),) = engine.run([Work(0, Leg("backward"), start, [_STEPS])])
    same = all(torch.equal(tensor, again.state.params[name]) for name, tensor in state.items())
    found = [str(finding) for finding in verify(stored.store)]
    if same and not found:
        yield "good", f"a tiny recording comes back bit for bit ({seconds:.1f} s)", "", {"seconds": seconds}
    else:
        told = "; ".join(found) or "a state comes back other than it was recorded"
        yield "wrong", f"a tiny recording is not what was recorded: {told}", "use another disk or release", {}
