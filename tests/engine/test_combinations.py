"""Every operator on every problem, compiled, in waves of several widths, against the reference in float64.

`make engines` tries all of them, which takes an hour or so; `make test` tries a few.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests.engine.problems import HANDING, OF_PARTS, OPERATORS, PROBLEMS, goes_with, miscompiled
from trajstore._common import pytree
from trajstore.engine import Iterate, Work
from trajstore.engine.orders import Leg
from trajstore.engine.plan import Plan, followed, ready
from trajstore.engine.reference import ReferenceEngine
from trajstore.engine.toolchain import missing_for_compiling
from trajstore.problems import LiveProblem

pytestmark = pytest.mark.skipif(bool(missing_for_compiling()), reason="there is no compiler")

SEEDS = [(3, 3), (0, 8)]
EVERY = {f"{type(o).__name__}-{k}": o for k, o in enumerate([*OPERATORS, *OF_PARTS, *HANDING])}
SAMPLE = [("SGD-1", "normed", 8), ("Adam-3", "mlp", 3), ("OrderRegularized-6", "least-squares", 1),
          ("Swapping-8", "regression", 3), ("Turning-11", "quadratic", 1)]  # fmt: skip


@cache
def live(problem: str) -> LiveProblem:
    return PROBLEMS[problem].build(torch.device("cpu"))


ALL = [(o, p, k) for o in EVERY for p in PROBLEMS if goes_with(EVERY[o], live(p)) for k in (1, 3, 8)]


def iterates(engine) -> dict[tuple[int, int], Iterate]:
    """More chains than lanes, of both kinds, from both seeds."""
    works = [Work(k, Leg(kind), engine.start(k), [2, 5, 6, 9, 11]) for k in (0, 1) for kind in ("forward", "backward")]
    return {(k, iterate.step): iterate for k, iterate in engine.run(works)}


def agrees(operator: str, problem: str, lanes: int) -> None:
    there, how = live(problem), EVERY[operator]
    expected = iterates(ReferenceEngine(there, how, SEEDS))
    plan, engine = ready(Plan("wavefront", lanes, compiled=True), there, how, SEEDS)
    found = iterates(engine)
    assert found.keys() == expected.keys()
    for at, iterate in found.items():
        assert all(t.dtype != torch.float32 for t in pytree.tree_leaves(iterate.state))
        torch.testing.assert_close(iterate.state, expected[at].state, rtol=1e-9, atol=1e-11)
        assert iterate.metrics == pytest.approx(expected[at].metrics, rel=1e-8, abs=1e-11)
    if engine.refusals and miscompiled(how, problem):
        assert not followed(plan, engine).compiled
    else:
        assert plan.compiled
        assert engine.refusals == ()  # so all of that is compiled code


@pytest.mark.parametrize(("operator", "problem", "lanes"), SAMPLE)
def test_some_combinations(operator, problem, lanes):
    agrees(operator, problem, lanes)


@pytest.mark.engines
@pytest.mark.parametrize(("operator", "problem", "lanes"), ALL)
def test_every_combination(operator, problem, lanes):
    agrees(operator, problem, lanes)
