"""The plan: which engine computes a recording, how wide its wave is, and whether it is compiled.

`choose` looks at the work, the size of a state, the memory and a short calibration here. The plan is stored with
what it recorded, so that the rest of a recording is computed the same way.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from trajstore.engine import Engine, Work
from trajstore.engine.compiling import compiled, missing_for_compiling
from trajstore.engine.reference import ReferenceEngine
from trajstore.engine.wavefront import WavefrontEngine, eager, tick_of
from trajstore.errors import ConfigurationError
from trajstore.operators import Operator
from trajstore.orders import Leg
from trajstore.problems import LiveProblem

__all__ = ["EngineChoice", "Plan", "choose", "make_engine", "ready"]

EngineChoice = Literal["auto", "reference", "wavefront"]

_WORTH_COMPILING = 15.0
"""Seconds of eager work below which a compilation would cost more than it saves."""


@dataclass(frozen=True)
class Plan:
    """How iterates are computed."""

    engine: Literal["reference", "wavefront"]
    lanes: int = 1
    compiled: bool = False
    reason: str = ""
    """Why this one, for a person."""
    slowed: bool = False
    """Whether something is missing that would make it faster."""

    def __str__(self) -> str:
        if self.engine == "reference":
            how = "reference engine, one chain at a time"
        else:
            how = f"wavefront of {self.lanes} lanes, {'compiled' if self.compiled else 'eager'}"
        return how + (f" ({self.reason})" if self.reason else "")

    def to_json(self) -> dict[str, Any]:
        """Return the plan as it is stored."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Plan:
        """Read a stored plan, also of a version that stored more."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in stored.items() if name in known})


def make_engine(plan: Plan, problem: LiveProblem, operator: Operator, seeds: Sequence[tuple[int, int]]) -> Engine:
    """Return the engine of a plan."""
    if plan.engine == "reference":
        return ReferenceEngine(problem, operator, seeds)
    tick = tick_of(problem, operator, plan.lanes)
    return WavefrontEngine(problem, operator, seeds, plan.lanes, compiled(tick) if plan.compiled else eager(tick))


def ready(
    plan: Plan, problem: LiveProblem, operator: Operator, seeds: Sequence[tuple[int, int]]
) -> tuple[Plan, Engine]:
    """Return the engine of a plan once it has run, and the plan it really follows.

    Where torch cannot compile the wave it runs eagerly, and the plan says why.
    """
    engine = make_engine(plan, problem, operator, seeds)
    if plan.compiled:
        try:
            list(engine.run([Work(0, Leg("forward"), engine.start(0), [1])]))
        except Exception as error:
            told = " ".join(str(error).split())
            reason = f"torch.compile failed: {type(error).__name__}: {told[:300]}"
            plan = replace(plan, compiled=False, reason=reason, slowed=True)
            return plan, make_engine(plan, problem, operator, seeds)
    return plan, engine


def choose(
    problem: LiveProblem,
    operator: Operator,
    seeds: Sequence[tuple[int, int]],
    applications: int,
    chains: int,
    state_bytes: int,
    steps: int,
    choice: EngineChoice = "auto",
) -> Plan:
    """Choose a plan for so many operator applications in so many chains of at most so many steps.

    Times are measured for chains of this problem on this machine, for about a second.
    """
    if choice == "reference":
        return Plan("reference", reason="asked for")
    device = next(iter(problem.initial(seeds[0][0])[0].values())).device.type
    lanes = _lanes(state_bytes, chains, device)
    one_by_one = _seconds_an_application(ReferenceEngine(problem, operator, seeds[:1]), 1, steps)
    try:
        eager = Plan("wavefront", lanes)
        in_a_wave = _seconds_an_application(make_engine(eager, problem, operator, seeds[:1]), lanes, steps)
    except Exception as error:
        told = " ".join(f"this problem cannot be vectorised: {type(error).__name__}: {error}".split())[:300]
        if choice == "wavefront":
            raise ConfigurationError(f"engine 'wavefront': {told}; use engine 'reference'") from error
        return Plan("reference", reason=told, slowed=True)
    quickest = min(one_by_one, in_a_wave)
    if applications * quickest > _WORTH_COMPILING:
        if not (missing := missing_for_compiling(device)):
            plan, engine = ready(Plan("wavefront", lanes, compiled=True), problem, operator, seeds[:1])
            if plan.compiled and (choice == "wavefront" or _seconds_an_application(engine, lanes, steps) < quickest):
                return plan
            reason, slowed = (plan.reason, True) if plan.slowed else ("quicker here than a compiled wave", False)
        else:
            reason, slowed = f"not compiled: this machine lacks {' and '.join(missing)}", True
    else:
        reason, slowed = "too little work to compile for", False
    if choice == "wavefront" or in_a_wave < one_by_one:
        return Plan("wavefront", lanes, reason=reason, slowed=slowed)
    return Plan("reference", reason=reason, slowed=slowed)


def _lanes(state_bytes: int, chains: int, device: str) -> int:
    """Return a power of two: many for small states, where a tick costs its overhead, few for large ones.

    On a CPU a wave of some 24 MB was quickest for a 3×300 network (16, 32 and 64 lanes were tried); a GPU wants more.
    """
    budget = 2**30 if device == "cuda" else 24 * 2**20
    lanes = min(max(budget // max(state_bytes, 1), 4), 256, max(chains, 1))
    return 1 << (lanes.bit_length() - 1)


def _seconds_an_application(engine: Engine, lanes: int, most: int, seconds: float = 0.4) -> float:
    """Time full waves: as many chains as lanes, of lengths that differ by one."""
    origin = engine.start(0)

    def timed(longest: int) -> float:
        steps = list(range(max(longest - lanes, 0) + 1, longest + 1))
        begin = time.perf_counter()
        for _ in engine.run([Work(0, Leg("backward"), origin, steps)]):
            pass
        return (time.perf_counter() - begin) / sum(steps)

    timed(min(2, most))  # first calls are slow
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        best = min(best, timed(min(lanes + 20, most)))
    return best
