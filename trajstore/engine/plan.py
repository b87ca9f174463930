"""The plan: which engine computes a recording, how wide its wave is, whether it is compiled, on how many processes.

`choose` looks at the work and the size of a state, and times candidates here. The plan is stored with what it
recorded, so that the rest of a recording is computed the same way.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch

from trajstore.engine import Engine, Work
from trajstore.engine.orders import Leg
from trajstore.engine.reference import ReferenceEngine
from trajstore.engine.ticks import PROVEN_TICKS, Advance, Eager, Proven, definition_of, step_of
from trajstore.engine.toolchain import missing_for_compiling
from trajstore.engine.wavefront import WavefrontEngine
from trajstore.errors import ConfigurationError
from trajstore.operators import Operator
from trajstore.problems import LiveProblem

__all__ = ["EngineChoice", "Plan", "choose", "followed", "make_engine", "ready", "threads"]

EngineChoice = Literal["auto", "reference", "wavefront"]

_WORTH_COMPILING = 15.0
"""Seconds of eager work below which a compilation would cost more than it saves."""
_WORTH_WORKERS = 30.0
"""Seconds of work below which starting processes would."""
_WORTH_A_SECOND_LOOK, _WORTH_EVERY_LOOK = 120.0, 1200.0
"""Seconds of eager work from which a second candidate is compiled and timed, and every one."""
_LARGE_STATE = 100_000
"""Bytes of a state from which a lane for each core is better than many."""
_SLOW_STEP = 5e-4
"""Seconds of an application from which its own work matters more than what it costs to begin it."""
_LANES_PROVEN = 4
"""So many lanes of a tick are compared with one chain at a time: vectorised they are all treated alike."""


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
    workers: int = 0
    """Processes that compute; 0: the one that was called."""
    threads: int = 0
    """Threads of each process; 0: as torch has it."""

    def __str__(self) -> str:
        if self.engine == "reference":
            how = "reference engine, one chain at a time"
        else:
            lanes = f"{self.lanes} lane{'s' if self.lanes > 1 else ''}"
            how = f"wavefront of {lanes}, {'compiled' if self.compiled else 'eager'}"
        if self.workers:
            how = f"{self.workers} worker process{'es' if self.workers > 1 else ''}, in each a " + how
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
    return WavefrontEngine(problem, operator, seeds, plan.lanes, _advance(plan, problem, operator))


def _advance(plan: Plan, problem: LiveProblem, operator: Operator) -> Advance:
    """Return the way a wave of a plan advances, and behind it the ways that are used if it is none."""
    step, definition = step_of(problem, operator, plan.lanes), definition_of(problem, operator)
    a_few = definition, _LANES_PROVEN
    wave = Proven(Eager(step), "vectorised tick" if plan.lanes > 1 else "functional tick", Eager(definition), a_few)
    if not plan.compiled:
        return wave
    from trajstore.engine.compiled_tick import Compiled

    return Proven(Compiled(step), "compiled tick", wave, (step, None), a_few)


def ready(
    plan: Plan, problem: LiveProblem, operator: Operator, seeds: Sequence[tuple[int, int]]
) -> tuple[Plan, Engine]:
    """Return the engine of a plan once it has run, and the plan it really follows.

    Where torch cannot compile the wave, or what it compiles gives something else, it runs eagerly, and the plan says
    why.
    """
    try:
        engine = make_engine(plan, problem, operator, seeds)
        if plan.compiled:
            _try(engine, plan.lanes, 1)
    except Exception as error:
        if not plan.compiled:
            raise
        told = " ".join(str(error).split())
        reason = f"torch.compile failed: {type(error).__name__}: {told[:300]}"
        plan = replace(plan, compiled=False, reason=reason, slowed=True)
        return plan, make_engine(plan, problem, operator, seeds)
    return followed(plan, engine), engine


def followed(plan: Plan, engine: Engine) -> Plan:
    """Return the plan that an engine really follows: what it refused it does not use."""
    if not engine.refusals:
        return plan
    reason = f"with torch {torch.__version__}, {'; '.join(map(str, engine.refusals))}"
    compiled = plan.compiled and all(refusal.of != "compiled tick" for refusal in engine.refusals)
    return replace(plan, compiled=compiled, reason=reason, slowed=True)


def _try(engine: Engine, lanes: int, steps: int) -> None:
    """Take a few ticks in every lane."""
    for _ in engine.run([Work(0, Leg("forward"), engine.start(0), [steps])] * lanes):
        pass


def choose(
    problem: LiveProblem,
    operator: Operator,
    seeds: Sequence[tuple[int, int]],
    applications: int,
    chains: int,
    state_bytes: int,
    steps: int,
    choice: EngineChoice = "auto",
    lanes: int | None = None,
    workers: int | None = None,
) -> Plan:
    """Choose a plan for so many operator applications in so many chains of at most so many steps.

    What is not None was asked for. Times are measured for chains of this problem on this machine, for about a
    second each. Processes are taken to share the work evenly, less a tenth.
    """
    device = next(iter(problem.initial(seeds[0][0])[0].values())).device.type
    cores = torch.get_num_threads()
    of_workers: dict[str, Any] = {"workers": workers, "threads": 1} if workers else {"threads": cores}
    if choice == "reference":
        return Plan("reference", reason="asked for", **of_workers)

    def timed(plan: Plan) -> float:
        engine = make_engine(plan, problem, operator, seeds[:1])
        seconds = _seconds_an_application(engine, plan.lanes, steps)
        if refused := [str(refusal) for refusal in engine.refusals if refusal.of.endswith("tick")]:
            raise RuntimeError("; ".join(refused))
        return seconds

    one_by_one = timed(Plan("reference"))
    heavy = device == "cpu" and (state_bytes >= _LARGE_STATE or one_by_one > _SLOW_STEP)
    wide = lanes or _lanes(state_bytes, chains, device)
    found = {Plan("reference", **of_workers): one_by_one} if choice == "auto" else {}
    told = ""
    try:
        found[Plan("wavefront", wide, **of_workers)] = timed(Plan("wavefront", wide))
    except Exception as error:
        told = " ".join(f"this problem cannot be vectorised: {type(error).__name__}: {error}".split())[:300]
        if wide > 1 and (choice == "wavefront" or not heavy):
            if choice == "wavefront":
                raise ConfigurationError(f"engine 'wavefront': {told}; use engine 'reference'") from error
            return Plan("reference", reason=told, slowed=True, **of_workers)
    reason, slowed, beside = told, bool(told), ""
    quickest = min(found.values(), default=one_by_one)
    if applications * quickest / max(1, workers or 1) <= _WORTH_COMPILING:
        reason = reason or "too little work to compile for"
    elif missing := missing_for_compiling(device):
        reason, slowed = f"not compiled: this machine lacks {' and '.join(missing)}", True
    else:
        compiling, seconds = _Compiling(problem, operator, seeds, steps), applications * quickest
        several = workers is None and device == "cpu" and cores > 1
        spread = Plan("wavefront", lanes or (1 if heavy else wide), compiled=True, workers=cores, threads=1)
        if several and seconds > _WORTH_A_SECOND_LOOK:
            compiling.try_out(spread)  # so far it has always won where there was much work
        if not compiling.found or seconds > _WORTH_EVERY_LOOK:
            for width in _widths(lanes, wide, 1 if workers else cores, heavy, seconds):
                compiling.try_out(Plan("wavefront", width, compiled=True, **of_workers))
        best = min(compiling.found.values(), default=quickest)
        if several and spread not in compiling.found and applications * best > _WORTH_WORKERS:
            compiling.try_out(spread)
        if compiling.failed and not compiling.found:
            reason, slowed = told or compiling.failed, True
        elif choice == "wavefront" and compiling.found:
            found = compiling.found
        else:
            found |= compiling.found
            reason = reason or "quicker here than a compiled wave"
        beside = compiling.failed
    plan = min(found, key=lambda p: found[p])
    return replace(plan, reason=beside) if plan.compiled else replace(plan, reason=reason, slowed=slowed)


class _Compiling:
    """Candidates that are compiled, and their seconds an application."""

    def __init__(self, problem: LiveProblem, operator: Operator, seeds: Sequence[tuple[int, int]], steps: int) -> None:
        self._given = problem, operator, seeds[:1]
        self._steps = steps
        self.found: dict[Plan, float] = {}
        self.failed = ""

    def try_out(self, plan: Plan) -> None:
        """Compile and time a plan with as many threads as each of its processes has."""
        with threads(plan.threads):
            done, engine = ready(plan, *self._given)
            if done.compiled:
                seconds = _seconds_an_application(engine, plan.lanes, self._steps)
                done = followed(plan, engine)
            if done.compiled:
                self.found[plan] = seconds * 1.1 / plan.workers if plan.workers > 1 else seconds
            else:
                self.failed = done.reason


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch use so many threads, 0: as it does. Compiled code depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _widths(lanes: int | None, wide: int, threads: int, heavy: bool, seconds: float) -> list[int]:
    """Return the widths to compile, the likeliest first."""
    if lanes is not None or not heavy:
        return [wide]
    return [threads] if seconds < _WORTH_A_SECOND_LOOK or wide == threads else [threads, wide]


def _lanes(state_bytes: int, chains: int, device: str) -> int:
    """Return a power of two: many for small states, where a tick costs its overhead, few for large ones."""
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

    _try(engine, lanes, min(PROVEN_TICKS, most))  # first calls are slow, and proven
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        best = min(best, timed(min(lanes + 20, most)))
    return best
