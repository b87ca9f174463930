"""The plan: what it chooses, that it is remembered, and that it says what is missing."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import trajstore as ts
from trajstore.engine import Work, plan
from trajstore.engine.orders import Leg
from trajstore.engine.plan import Plan, choose, make_engine, ready
from trajstore.engine.toolchain import missing_for_compiling
from trajstore.errors import ConfigurationError, SlowPlanWarning
from trajstore.operators.sgd import SGD
from trajstore.problems._module import ModuleProblem
from trajstore.problems.quadratic import Quadratic
from trajstore.problems.regression import Regression
from trajstore.reading.handles import open_root
from trajstore.recording.planning import Wishes, afford
from trajstore.recording.schema import schema_of
from trajstore.storage.writing.segment import array_of

CPU = torch.device("cpu")
SMALL = Regression(width=8, depth=2, points=21)
QUADRATIC = {"name": "q", "problem": {"family": "quadratic"}, "operator": {"family": "sgd", "lr": 0.1}, "steps": 120}


def iterates(engine, steps=(1, 5, 9)):
    return [it for _, it in engine.run([Work(0, Leg("backward"), engine.start(0), steps)])]


def test_a_compiled_wave_gives_the_references_iterates():
    if missing := missing_for_compiling():
        pytest.skip(f"this machine lacks {missing}")
    live, operator = dataclasses.replace(SMALL, dtype="float64").build(CPU), SGD(0.05, momentum=0.5)
    reference = make_engine(Plan("reference"), live, operator, [(0, 0)])
    done, wave = ready(Plan("wavefront", 4, compiled=True), live, operator, [(0, 0)])
    assert done.compiled
    for ours, theirs in zip(iterates(wave), iterates(reference), strict=True):
        torch.testing.assert_close(ours.state, theirs.state, rtol=1e-10, atol=1e-12)
        assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-9)


def test_many_compiled_waves_in_one_process_stay_compiled(monkeypatch):
    """torch stops compiling a function after eight shapes, and would run eagerly with only a warning."""
    if missing := missing_for_compiling():
        pytest.skip(f"this machine lacks {missing}")
    live = Quadratic().build(CPU)
    compilations = []
    original = torch._inductor.compile_fx.compile_fx

    def spy(*arguments, **more):
        compilations.append(1)
        return original(*arguments, **more)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", spy)
    for lanes in range(1, 11):
        done, _ = ready(Plan("wavefront", lanes, compiled=True), live, SGD(0.1), [(0, 0)])
        assert done.compiled
    assert len(compilations) >= 10


def test_where_nothing_can_be_compiled_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(plan, "missing_for_compiling", lambda device: ("a C++ compiler (on Debian: apt install g++)",))
    chosen = choose(Quadratic().build(CPU), SGD(0.1), [(0, 0)], 10**9, 10**6, 8, 1000)
    assert not chosen.compiled
    assert chosen.slowed
    assert "lacks a C++ compiler (on Debian: apt install g++)" in str(chosen)


def test_what_is_missing_is_found_without_a_compiler(tmp_path):
    program = "from trajstore.engine.toolchain import missing_for_compiling as m; print(*m(), sep='|')"
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    told = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "a C++ compiler" in told.stdout


def test_a_compilation_that_fails_runs_eagerly_and_says_so(monkeypatch, tmp_path):
    def broken(step):
        def fail(*_):
            raise RuntimeError("no\nluck")

        return fail

    monkeypatch.setattr("trajstore.engine.compiled_tick.Compiled", broken)
    monkeypatch.setattr("trajstore.recording.planning.remembered", lambda *_: Plan("wavefront", 8, compiled=True))
    experiment = ts.Experiment.of(QUADRATIC)
    with pytest.warns(SlowPlanWarning, match=r"torch\.compile failed: RuntimeError: no luck"):
        stored = ts.run(experiment, tmp_path / "s.zarr")
    assert all(slab.complete for slab in stored.slabs())
    assert stored.attributes["fills"][0]["plan"]["compiled"] is False


@pytest.mark.slow
def test_a_compiler_older_than_the_processor_compiles_for_what_it_knows(tmp_path):
    if missing := missing_for_compiling():
        pytest.skip(f"this machine lacks {missing}")
    old = tmp_path / "old-g++"
    old.write_text('#!/bin/sh\ncase "$*" in *-mavx512*|*-mamx*) exit 1;; esac\nexec g++ "$@"\n')
    old.chmod(0o755)
    program = (
        "import torch; from trajstore.engine.plan import Plan, ready; from trajstore.operators.sgd import SGD;"
        "from trajstore.problems.quadratic import Quadratic;"
        "live = Quadratic().build(torch.device('cpu'));"
        "print(ready(Plan('wavefront', 2, compiled=True), live, SGD(0.1), [(0, 0)])[0])"
    )
    environment = os.environ | {"CXX": str(old), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "wavefront of 2 lanes, compiled\n"


@pytest.mark.parametrize(
    ("applications", "tried", "workers"),
    [
        (100_000, [], 0),  # 10 s
        (500_000, [(2, 0)], 0),  # 50 s
        (2_000_000, [(1, 2)], 2),  # 200 s: processes have always won there
        (20_000_000, [(1, 2), (2, 0), (16, 0)], 2),
    ],
)
def test_the_more_work_the_more_is_tried_and_much_is_spread_over_processes(monkeypatch, applications, tried, workers):
    class Timed:
        def __init__(self, *_):
            self.found, self.failed = {}, ""

        def try_out(self, one):
            looked_at.append((one.lanes, one.workers))
            self.found[one] = 1e-5 if one.workers else 2e-5

    looked_at: list[tuple[int, int]] = []
    monkeypatch.setattr(plan, "_Compiling", Timed)
    monkeypatch.setattr(plan, "_seconds_an_application", lambda *_: 1e-4)
    monkeypatch.setattr(plan, "missing_for_compiling", lambda device: ())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    chosen = choose(SMALL.build(CPU), SGD(0.05), [(0, 0)], applications, 1000, 1_000_000, 500)
    assert looked_at == tried
    assert chosen.workers == workers
    assert chosen.compiled == bool(tried)


def test_processes_are_as_many_as_memory_allows_and_too_little_is_refused():
    experiment = ts.Experiment.of(QUADRATIC)
    live = experiment.live
    given = Plan("wavefront", 1, compiled=True, workers=4, threads=1), experiment, live, schema_of(experiment, live)
    for memory, workers in ((10**10, 4), (3_100_000_000, 2), (1_000_000_000, 0)):
        assert afford(*given, Wishes(memory=memory))[0].workers == workers
    with pytest.raises(ConfigurationError, match=r"4 worker processes would take about 5\.0 GB, and memory is 3\.1 GB"):
        afford(*given, Wishes(memory=3_100_000_000, workers=4))
    with pytest.raises(ConfigurationError, match="one process would take about 1"):
        afford(*given, Wishes(memory=500_000_000))


def branching() -> ModuleProblem:
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, x):
            out = self.layer(x)
            return out if out.sum() > 0 else -out  # depends on the data

    x = torch.linspace(-1, 1, 9)[:, None]
    return ModuleProblem(Branching, nn.functional.mse_loss, (x, x), batch_size=2)


def test_a_problem_that_cannot_be_vectorised_falls_back_and_names_the_reason(tmp_path):
    experiment = ts.Experiment.of({**QUADRATIC, "problem": branching()})
    with pytest.warns(SlowPlanWarning) as told:
        stored = ts.run(experiment, tmp_path / "s.zarr")
    (message,) = {str(w.message) for w in told if w.category is SlowPlanWarning}
    assert "\n" not in message
    assert "one chain at a time (this problem cannot be vectorised: " in message
    assert "data-dependent control flow" in message
    assert all(slab.complete for slab in stored.slabs())
    with pytest.raises(ConfigurationError, match=r"engine 'wavefront': .*data-dependent.*use engine 'reference'"):
        ts.run(ts.Experiment.of({**QUADRATIC, "problem": branching()}), tmp_path / "t.zarr", engine="wavefront")
    assert not (tmp_path / "t.zarr").exists()


def test_little_work_is_done_plainly_and_a_choice_is_remembered(tmp_path, monkeypatch):
    asked = []
    original = choose

    def spy(*arguments):
        asked.append(1)
        return original(*arguments)

    monkeypatch.setattr("trajstore.recording.planning.choose", spy)
    ts.run(ts.Experiment.of({**QUADRATIC, "steps": 20}), tmp_path / "little.zarr")
    assert not asked
    for store in ("one.zarr", "two.zarr"):
        ts.run(ts.Experiment.of(QUADRATIC), tmp_path / store)
    assert len(asked) == 1
    plans = [ts.open(tmp_path / s)["q"].attributes["fills"][0]["plan"] for s in ("one.zarr", "two.zarr")]
    assert plans[0] == plans[1]


def test_resume_follows_the_plan_that_the_recording_began_with(tmp_path, monkeypatch):
    experiment = ts.Experiment.of({**QUADRATIC, "seeds": [0, 1]})

    def interrupt(done: int, where: str) -> None:
        if where.startswith("seed 1") and "backward" in where:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ts.run(experiment, tmp_path / "s.zarr", engine="wavefront", lanes=2, progress=interrupt)
    whole = ts.run(experiment, tmp_path / "whole.zarr", engine="wavefront", lanes=2)
    monkeypatch.setattr("trajstore.recording.planning.choose", lambda *_: Plan("reference"))
    stored = ts.run(experiment, tmp_path / "s.zarr", resume=True)
    assert {fill["plan"]["lanes"] for fill in stored.attributes["fills"]} == {2}
    assert np.array_equal(stored.dataset()["params"].values, whole.dataset()["params"].values)
    assert np.array_equal(stored.commits().records, whole.commits().records)


@pytest.mark.parametrize("steps", [10, pytest.param(60, marks=pytest.mark.slow)])
def test_many_seeds_of_a_small_problem_share_a_wave(tmp_path, steps):
    experiment = ts.Experiment.of({**QUADRATIC, "steps": steps, "seeds": list(range(12)), "init_seed": 3})
    stored = ts.run(experiment, tmp_path / "s.zarr", engine="wavefront", lanes=16)
    assert any(len(fill["slabs"]) > 2 for fill in stored.attributes["fills"])
    plainly = ts.run(experiment, tmp_path / "plain.zarr", engine="reference")
    one, other = (s.dataset()["params"].values for s in (stored, plainly))
    np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)


def test_an_engine_that_was_asked_for_is_used(tmp_path):
    experiment = ts.Experiment.of({**QUADRATIC, "steps": 10})
    for engine in ("reference", "wavefront"):
        stored = ts.run(experiment, tmp_path / f"{engine}.zarr", engine=engine)
        assert stored.attributes["fills"][0]["plan"]["engine"] == engine


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"engine": "warp"}, "engine 'warp'"),
        ({"device": "mps"}, "device 'mps'"),
        ({"lanes": 0}, "lanes is 0"),
        ({"lanes": -3}, "lanes is -3"),
        ({"engine": "reference", "lanes": 4}, "lanes belong to engine 'wavefront'"),
    ],
)
def test_choices_that_there_are_not_are_refused(tmp_path, how, says):
    with pytest.raises(ConfigurationError, match=says):
        ts.run(ts.Experiment.of(QUADRATIC), tmp_path / "s.zarr", **how)
    assert not (tmp_path / "s.zarr").exists()


def test_lanes_ask_for_a_wavefront_and_hold_for_the_rest_of_a_recording(tmp_path):
    experiment = ts.Experiment.of({**QUADRATIC, "steps": 10})
    stored = ts.run(experiment, tmp_path / "s.zarr", lanes=4)
    assert stored.attributes["fills"][0]["plan"]["lanes"] == 4
    array_of(open_root(tmp_path / "s.zarr")["q"], "committed")[1, 0] = -1
    again = ts.run(experiment, tmp_path / "s.zarr", lanes=8, resume=True)
    assert [fill["plan"]["lanes"] for fill in again.attributes["fills"]] == [4, 8]
    assert again.attributes["fills"][1]["plan"]["engine"] == "wavefront"


def test_a_plan_that_was_slowed_is_chosen_again_when_what_was_missing_is_there(tmp_path, monkeypatch):
    plans = iter([Plan("wavefront", 2, reason="not compiled: lacks", slowed=True), Plan("wavefront", 4)])
    monkeypatch.setattr("trajstore.recording.planning.choose", lambda *_: next(plans))
    with pytest.warns(SlowPlanWarning, match="lacks"):
        ts.run(ts.Experiment.of(QUADRATIC), tmp_path / "one.zarr")
    stored = ts.run(ts.Experiment.of(QUADRATIC), tmp_path / "two.zarr")
    assert stored.attributes["fills"][0]["plan"]["lanes"] == 4


def test_a_compiled_recording_goes_on_where_nothing_compiles_and_says_so(tmp_path, monkeypatch):
    experiment = ts.Experiment.of({**QUADRATIC, "steps": 10})
    ts.run(experiment, tmp_path / "s.zarr", lanes=2)
    group = open_root(tmp_path / "s.zarr")["q"]
    array_of(group, "committed")[1, 0] = -1
    attributes = dict(group.attrs["trajstore"])
    attributes["fills"][0]["plan"] |= {"compiled": True, "of a later version": 1}
    group.attrs["trajstore"] = attributes
    monkeypatch.setattr("trajstore.recording.running.missing_for_compiling", lambda device: ("a C++ compiler",))
    with pytest.warns(SlowPlanWarning, match=r"not compiled as it was begun: this machine lacks a C\+\+ compiler"):
        stored = ts.run(experiment, tmp_path / "s.zarr", resume=True)
    assert all(slab.complete for slab in stored.slabs())


def test_calibration_asks_for_no_batch_beyond_the_last_step(tmp_path):
    class Finite:
        """A stream of exactly as many batches as there are steps."""

        batch_size = 0

        def __init__(self, steps):
            self._steps = steps

        def __getitem__(self, i):
            if not 1 <= i <= self._steps:
                raise IndexError(f"there is no batch {i}")
            return (torch.full((1,), float(i), dtype=torch.float64),)

    class Own:
        def build(self, device):
            live = Quadratic().build(device)
            live.batches = lambda seed: Finite(15)
            return live

        def describe(self):
            return {}

    experiment = ts.Experiment.of({**QUADRATIC, "problem": Own(), "steps": 15, "seeds": list(range(60))})
    stored = ts.run(experiment, tmp_path / "s.zarr")
    assert all(slab.complete for slab in stored.slabs())
    assert not stored.attributes["fills"][0]["plan"]["slowed"]
    assert ts.cost(experiment).applications == 60 * (15 + 120)
