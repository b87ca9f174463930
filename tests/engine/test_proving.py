"""A fast way is used only if it gives what its definition gives, but for rounding."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

import trajstore as ts
from tests.conftest import last_of
from tests.engine.problems import normed
from trajstore._common import pytree
from trajstore.engine import Work, compiled_tick, plan, wavefront
from trajstore.engine.orders import Leg
from trajstore.engine.plan import Plan, choose, followed, make_engine, ready
from trajstore.engine.proving import disproof
from trajstore.engine.reference import ReferenceEngine
from trajstore.engine.ticks import PROVEN_TICKS, Eager, Proven, definition_of, step_of
from trajstore.engine.wavefront import WavefrontEngine
from trajstore.errors import RefusedWarning
from trajstore.operators.adam import Adam
from trajstore.operators.sgd import SGD
from trajstore.problems.quadratic import Quadratic
from trajstore.problems.regression import Regression

CPU = torch.device("cpu")
SMALL = {
    "name": "s", "problem": {"family": "regression", "width": 6, "depth": 1, "points": 15}, "steps": 30,
    "seeds": [0, 1], "operator": {"family": "sgd", "lr": 0.05, "momentum": 0.5}, "orders": ["forward", "backward"],
}  # fmt: skip


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def in_another_order(x):
    return sum(reversed(x.unbind(-1)))


def in_order(x):
    return sum(x.unbind(-1))


def scaled(g):
    """What Adam makes of a gradient at its first step."""
    return g / (g.abs() + 1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lanes", [1, 5])
def test_another_order_of_a_sum_is_rounding_and_a_thousandth_is_not(dtype, lanes):
    x = numbers(lanes, 7, 100, dtype=dtype)
    found = in_another_order(x)
    assert not torch.equal(found, in_order(x))
    assert disproof(found, in_order, x) == ""
    found[-1, 3] += 1e-3
    assert f"of lane {lanes - 1} is " in disproof(found, in_order, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_that_is_divided_by_itself_is_still_rounding(dtype):
    """Half of the sums are zero but for rounding, and come out as any number up to 1."""
    terms = numbers(3, 40, 50, dtype=dtype)
    x = torch.cat([terms, torch.where(torch.arange(40)[:, None] < 20, -terms, terms)], -1)
    x = x[..., torch.randperm(100, generator=torch.Generator().manual_seed(1))]
    found, defined = (scaled(summed(x)) for summed in (in_another_order, in_order))
    assert (found - defined).abs().max() > 0.1
    assert disproof(found, lambda x: scaled(in_order(x)), x) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(20))
def test_a_number_that_is_all_noise_excuses_no_other(dtype, seed):
    """One gradient is zero but for rounding, and Adam makes any number of it; another is off by a whole step."""
    lr, random = 1e-3, torch.Generator().manual_seed(seed)
    x, g = (torch.randn(2, 64, generator=random, dtype=torch.float64).to(dtype) for _ in range(2))

    def adam(x, g):
        nothing = (g[:, 0] * g[:, 1] + g[:, 2]) - g[:, 2] - g[:, 0] * g[:, 1]
        gradient = torch.cat([nothing[:, None], x[:, 1:]], 1)
        return x - lr * gradient / (gradient.abs() + 1e-12)

    found = adam(x, g)
    found[1, 5] += lr
    assert "of lane 1 is" in disproof(found, adam, x, g)


def test_a_number_next_to_a_kink_may_fall_on_either_side():
    """A gradient that is 0 or 5 as the sum is above or below zero, where it is zero but for rounding."""
    terms = numbers(200, 30)
    x = torch.stack([terms, -terms], -1).flatten(1)[:, torch.randperm(60, generator=torch.Generator().manual_seed(2))]
    found, defined = (5.0 * (summed(x) > 0) for summed in (in_another_order, in_order))
    assert not torch.equal(found, defined)
    assert disproof(found, lambda x: 5.0 * (in_order(x) > 0), x) == ""


def test_a_definition_that_computes_in_less_than_its_numbers_have_is_taken_as_it_is():
    x = numbers(2, 50)
    rounded = lambda t: (t.bfloat16() * 1.1).float()  # noqa: E731
    assert disproof(x * 1.1, rounded, x) == ""
    assert disproof(x * 1.2, rounded, x) != ""


def test_what_a_definition_holds_itself_is_widened_too():
    held, x = numbers(50, 50), numbers(4, 50)
    found = (x[:, None] * held).sum(-1)
    assert disproof(found, lambda t: t @ held.T, x) == ""
    assert disproof(found + 1e-4, lambda t: t @ held.T, x) != ""


def test_what_a_definition_makes_of_several_tensors_at_once_is_widened():
    x = numbers(4, 50)

    def several(t):
        top, at = t.max(-1)
        return {"top": torch.cat([top, t.topk(2).values[:, 1]]).reshape(2, 4).T + torch.zeros(2), "at": at}

    found = several(x)
    assert disproof(found, several, x) == ""
    found["top"][2, 1] += 1e-4
    assert disproof(found, several, x).startswith("top of lane 2 is ")


def test_a_definition_that_insists_on_its_precision_is_moved_instead():
    x = numbers(4, 50)

    def insisting(t):
        assert t.element_size() == 4
        return in_order(t)

    assert disproof(in_another_order(x), insisting, x) == ""
    assert disproof(in_another_order(x) + 1e-3, insisting, x) != ""


def test_integers_nan_and_infinity_have_to_be_the_same():
    odd = torch.tensor([[1.0, torch.nan, torch.inf, -torch.inf]])
    assert disproof(odd.clone(), lambda t: t, odd) == ""
    for k, other in ((1, 0.0), (2, -torch.inf), (2, 3.0), (0, torch.nan)):
        found = odd.clone()
        found[0, k] = other
        assert disproof(found, lambda t: t, odd) != ""
    counts = torch.tensor([3, 2**60])
    assert disproof(counts.clone(), lambda t: t, counts) == ""
    assert disproof(counts + torch.tensor([0, 1]), lambda t: t, counts) != ""


class Broken(Eager):
    """A fast way that goes wrong: from some tick on, in the last lane, or in what it leaves out."""

    def __init__(self, step, wrong, after=0):
        super().__init__(step)
        self._wrong, self._after, self.taken = wrong, after, 0

    def __call__(self, states, batches, indices, ticks, busy):
        for j in ticks:
            before = pytree.tree_map(torch.clone, states)
            super().__call__(states, batches, indices, range(j, j + 1), busy)
            self.taken += 1
            if self.taken > self._after:
                self._wrong(states, before)


def filled(engine, lanes):
    """The states at the ends of as many chains as there are lanes, of different lengths."""
    steps = list(range(6, 6 + lanes))
    return [it.state for _, it in engine.run([Work(0, Leg("backward"), engine.start(0), steps)])]


def off_in_one_lane(states, before):
    next(iter(states.params.values()))[-1] += 1e-3


def buffer_left_as_it_was(states, before):
    for name, buffer in states.buffers.items():
        if "mean" in name:
            buffer.copy_(before.buffers[name])


def memory_aliased(states, before):
    for name, moment in states.memory["exp_avg"].items():
        moment.copy_(states.params[name])


def counter_stands_still(states, before):
    states.position.copy_(before.position)


@pytest.mark.parametrize("lanes", [1, 3, 8])
@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (off_in_one_lane, "params/"),
        (buffer_left_as_it_was, "buffers/norm.running_mean"),
        (memory_aliased, "memory/exp_avg/"),
        (counter_stands_still, "position"),
    ],
)
@pytest.mark.parametrize("after", [0, 2])
def test_a_tick_that_is_broken_on_purpose_is_refused_and_nothing_wrong_comes_out(lanes, wrong, what, after):
    live, operator = normed("float32").build(CPU), Adam(0.01)
    step, definition = step_of(live, operator, lanes), definition_of(live, operator)
    sound = Proven(Eager(step), "vectorised tick", Eager(definition), (definition, 4))
    advance = Proven(Broken(step, wrong, after), "compiled tick", sound, (step, None), (definition, 4))
    found, expected = (
        filled(WavefrontEngine(live, operator, [(0, 0)], lanes, way), lanes) for way in (advance, Eager(step))
    )
    assert all(map(torch.equal, pytree.tree_leaves(found), pytree.tree_leaves(expected)))
    (refusal,) = advance.refusals
    assert str(refusal).startswith(f"the compiled tick gives something else than its definition: {what}")


@pytest.mark.parametrize("lanes", [1, 8])
def test_a_vectorised_tick_that_is_wrong_leaves_the_definition(lanes):
    live, operator = normed("float32").build(CPU), Adam(0.01)
    step, definition = step_of(live, operator, lanes), definition_of(live, operator)
    wrong = Broken(step, off_in_one_lane)
    sound = Proven(Broken(step, off_in_one_lane), "vectorised tick", Eager(definition), (definition, None))
    advance = Proven(wrong, "compiled tick", sound, (step, None), (definition, 4))
    found = filled(WavefrontEngine(live, operator, [(0, 0)], lanes, advance), lanes)
    expected = filled(ReferenceEngine(live, operator, [(0, 0)]), lanes)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert [refusal.of for refusal in advance.refusals] == ["compiled tick", "vectorised tick"]


@pytest.mark.parametrize("operator", [SGD(0.05, momentum=0.9), Adam(0.01)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_a_wave_that_is_right_is_not_refused(operator, dtype, lanes):
    """Adam and batch normalisation: gradients that are zero but for rounding."""
    live = normed(dtype, bias=True).build(CPU)
    wave = make_engine(Plan("wavefront", lanes), live, operator, [(0, 0)])
    last_of(wave, Leg("backward"), 30)
    assert wave.refusals == ()


def test_what_comes_out_of_idle_lanes_is_not_looked_at():
    live, operator = Regression(width=6, depth=1, points=15).build(CPU), SGD(0.05)
    step, definition = step_of(live, operator, 8), definition_of(live, operator)

    class Garbage(Eager):
        def __call__(self, states, batches, indices, ticks, busy):
            super().__call__(states, batches, indices, ticks, busy)
            idle = [k for k in range(8) if k not in busy]
            for tensor in states.params.values():
                tensor[idle] = torch.nan

    advance = Proven(Garbage(step), "compiled tick", Eager(step), (step, None), (definition, 4))
    wave = WavefrontEngine(live, operator, [(0, 0)], 8, advance)
    expected = last_of(ReferenceEngine(live, operator, [(0, 0)]), Leg("backward"), 12)
    torch.testing.assert_close(last_of(wave, Leg("backward"), 12).state, expected.state)
    assert advance.refusals == ()


def test_a_lane_that_begins_later_is_proven_then():
    live, operator = Quadratic((0.5, 1.0)).build(CPU), SGD(0.05)
    step, definition = step_of(live, operator, 4), definition_of(live, operator)
    advance = Proven(Broken(step, off_in_one_lane), "compiled tick", Eager(step), (step, None), (definition, 4))
    wave = WavefrontEngine(live, operator, [(0, 0)], 4, advance)
    last_of(wave, Leg("backward"), 12)  # one chain, in the first lane
    assert advance.refusals == ()
    found, expected = filled(wave, 4), filled(ReferenceEngine(live, operator, [(0, 0)]), 4)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    assert "of lane 3 is" in advance.refusals[0].why


def test_metrics_that_come_out_otherwise_when_vectorised_are_computed_one_by_one():
    live, operator = Regression(width=6, depth=1, points=15).build(CPU), SGD(0.05)
    evaluate = live.evaluate

    def wrong_in_a_stack(params, buffers):
        values = evaluate(params, buffers)
        if torch._C._functorch.maybe_current_level() is not None:
            values["test_loss"] = values["test_loss"] * 1.001
        return values

    live.evaluate = wrong_in_a_stack
    wave = make_engine(Plan("wavefront", 3), live, operator, [(0, 0)])
    expected = last_of(ReferenceEngine(live, operator, [(0, 0)]), Leg("backward"), 9).metrics
    assert last_of(wave, Leg("backward"), 9).metrics == pytest.approx(expected, rel=1e-5)
    (refusal,) = wave.refusals
    assert str(refusal).startswith("the vectorised evaluation of metrics gives something else than its definition: ")
    assert "test_loss of lane 0 is" in str(refusal)


@pytest.fixture
def off_in_a_row(monkeypatch):
    """A `vmap` that puts the training loss of one state of a stack off by a thousandth, from some call on."""
    vmap = torch.vmap

    def break_it(row, after=0):
        calls = []

        def broken(function, **options):
            def vectorised(*given):
                values = vmap(function, **options)(*given)
                if isinstance(values, dict) and "train_loss" in values and len(values["train_loss"]) > row:
                    calls.append(row)
                    values["train_loss"][row] += 1e-3 * (len(calls) > after)
                return values

            return vectorised

        monkeypatch.setattr(torch, "vmap", broken)

    return break_it


def metrics_of(engine, steps):
    works = [Work(0, Leg("backward"), engine.start(0), range(1, steps + 1))]
    return {iterate.step: iterate.metrics for _, iterate in engine.run(works)}


@pytest.mark.parametrize(("row", "after"), [(0, 0), (1, 0), (2, 0), (1, 1), (2, 3)])
def test_metrics_of_every_state_of_a_stack_are_proven(off_in_a_row, row, after):
    live, operator = Regression(width=6, depth=1, points=15).build(CPU), SGD(0.05)
    expected = metrics_of(ReferenceEngine(live, operator, [(0, 0)]), 40)
    off_in_a_row(row, after)
    wave = make_engine(Plan("wavefront", 3), live, operator, [(0, 0)])
    found = metrics_of(wave, 40)
    assert found.keys() == expected.keys()
    for step, metrics in found.items():
        assert metrics == pytest.approx(expected[step], rel=1e-5)
    (refusal,) = wave.refusals
    assert f"train_loss of lane {row} is" in refusal.why
    assert "record them again" not in refusal.why


def test_metrics_of_a_wide_stack_are_proven_a_few_at_a_time(off_in_a_row, monkeypatch):
    """The last of ten is reached in the third call; what was handed on before is told."""
    live, operator = Regression(width=6, depth=1, points=15).build(CPU), SGD(0.05)
    off_in_a_row(9)
    asked = []
    monkeypatch.setattr(wavefront, "disproof", lambda *a, lanes: asked.append(lanes) or disproof(*a, lanes=lanes))
    wave = make_engine(Plan("wavefront", 10), live, operator, [(0, 0)])
    metrics_of(wave, 100)
    assert asked[-3:] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    assert "train_loss of lane 9 is" in wave.refusals[0].why
    assert "those of 8 states were handed on before" in wave.refusals[0].why  # 6 in the first call, 2 in the second


def test_each_state_of_a_stack_is_measured_by_itself_a_few_times_and_no_more(monkeypatch):
    live, operator = Regression(width=6, depth=1, points=15).build(CPU), SGD(0.05)
    asked = []
    monkeypatch.setattr(wavefront, "disproof", lambda *a, lanes: asked.extend(lanes) or disproof(*a, lanes=lanes))
    wave = make_engine(Plan("wavefront", 6), live, operator, [(0, 0)])
    origin = wave.start(0)
    asked.clear()
    for _ in range(3):
        for _ in wave.run([Work(0, Leg("backward"), origin, range(1, 61))]):
            pass
    assert {lane: asked.count(lane) for lane in range(6)} == dict.fromkeys(range(6), PROVEN_TICKS)
    assert wave.refusals == ()


def test_a_plan_stays_compiled_when_only_metrics_are_refused(off_in_a_row, monkeypatch):
    off_in_a_row(1)
    monkeypatch.setattr(compiled_tick, "Compiled", Eager)
    live, operator = Regression(width=6, depth=1, points=15).build(CPU), SGD(0.05)
    wanted = Plan("wavefront", 3, compiled=True)
    done, engine = ready(wanted, live, operator, [(0, 0)])
    metrics_of(engine, 9)
    done = followed(done, engine)
    assert (done.compiled, done.slowed) == (True, True)
    assert "the vectorised evaluation of metrics gives something else" in done.reason
    assert str(done).startswith("wavefront of 3 lanes, compiled (with torch")


def test_a_candidate_is_not_put_aside_for_its_metrics(off_in_a_row, monkeypatch):
    off_in_a_row(1)
    monkeypatch.setattr(compiled_tick, "Compiled", Eager)
    monkeypatch.setattr(plan, "missing_for_compiling", lambda device: ())
    timed = plan._seconds_an_application
    monkeypatch.setattr(plan, "_seconds_an_application", lambda *a: timed(*a, seconds=0.0))
    live = Regression(width=6, depth=1, points=15).build(CPU)
    chosen = choose(live, SGD(0.05), [(0, 0)], 10**8, 10**4, 16, 1000, "wavefront", 4, 0)
    assert chosen.compiled
    assert chosen.lanes == 4


@pytest.fixture
def broken_compiler(monkeypatch):
    """Compiled ticks that are wrong after some more ticks."""

    def break_it(wrong, after=0):
        monkeypatch.setattr(compiled_tick, "Compiled", lambda step: Broken(step, wrong, after))
        monkeypatch.setattr("trajstore.recording.planning.remembered", lambda *_: Plan("wavefront", 3, compiled=True))

    return break_it


@pytest.mark.parametrize("after", [0, 2])
def test_a_recording_with_a_broken_compiler_stores_what_eager_code_gives_and_says_so(
    tmp_path, monkeypatch, broken_compiler, trajstore, after
):
    broken_compiler(off_in_one_lane, after)  # at once, or when iterates were stored already
    with pytest.warns(RefusedWarning) as told:
        stored = ts.run(ts.Experiment.of(SMALL), tmp_path / "s.zarr", engine="wavefront")
    (message,) = {str(warning.message) for warning in told if warning.category is RefusedWarning}
    for said in ("experiment 's'", "sgd on regression", f"torch {torch.__version__}", "compiled tick", "of lane 2"):
        assert said in message
    monkeypatch.setattr("trajstore.recording.planning.remembered", lambda *_: Plan("wavefront", 3))
    eager = ts.run(ts.Experiment.of(SMALL), tmp_path / "e.zarr", engine="wavefront")
    assert np.array_equal(stored.dataset()["params"].values, eager.dataset()["params"].values)
    for fill in stored.attributes["fills"]:
        assert (fill["plan"]["compiled"], fill["plan"]["slowed"]) == (False, True)
        assert "the compiled tick gives something else than its definition" in fill["plan"]["reason"]
    code, out, _ = trajstore("info", str(tmp_path / "s.zarr"), "s")
    assert code == 0
    assert "the compiled tick gives something else" in " ".join(out.split())


def test_a_refusal_is_written_down_also_if_the_recording_is_interrupted(tmp_path, broken_compiler):
    broken_compiler(off_in_one_lane, 2)

    def interrupt(done, where):
        if where.endswith("step 20"):
            raise KeyboardInterrupt

    with pytest.warns(RefusedWarning), pytest.raises(KeyboardInterrupt):
        ts.run(ts.Experiment.of(SMALL), tmp_path / "s.zarr", engine="wavefront", progress=interrupt)
    (fill,) = ts.open(tmp_path / "s.zarr")["s"].attributes["fills"]
    assert fill["ended"] is None
    assert not fill["plan"]["compiled"]


def test_a_candidate_that_computes_something_else_is_not_chosen_however_fast(monkeypatch):
    monkeypatch.setattr(compiled_tick, "Compiled", lambda step: Broken(step, off_in_one_lane))
    monkeypatch.setattr(plan, "missing_for_compiling", lambda device: ())
    monkeypatch.setattr(plan, "_seconds_an_application", lambda engine, *_: 1e-9 if engine.refusals else 1.0)
    chosen = choose(Quadratic((0.5, 1.0)).build(CPU), SGD(0.1), [(0, 0)], 10**6, 10**4, 16, 1000, "auto", None, 0)
    assert not chosen.compiled
    assert chosen.slowed
    assert "compiled tick gives something else" in chosen.reason


def test_getting_ready_tries_every_lane(monkeypatch):
    monkeypatch.setattr(compiled_tick, "Compiled", lambda step: Broken(step, off_in_one_lane))
    done, engine = ready(Plan("wavefront", 5, compiled=True), Quadratic((0.5, 1.0)).build(CPU), SGD(0.1), [(0, 0)])
    assert not done.compiled
    assert "of lane 4 is" in done.reason
    assert engine.refusals


def breaking() -> ts.ModuleProblem:
    """A problem that breaks the compiler of every process but the one that tests it."""
    if os.environ.get("ALIVE") != str(os.getpid()):
        compiled_tick.Compiled = lambda step: Broken(step, off_in_one_lane, 1)  # type: ignore[misc,assignment]
    return normed("float32")


def test_what_workers_refuse_is_told_and_written_down_by_their_client(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIVE", str(os.getpid()))
    monkeypatch.setattr(
        "trajstore.recording.planning.remembered", lambda *_: Plan("wavefront", 2, compiled=True, workers=1)
    )
    problem = {"family": "factory", "function": "tests.engine.test_proving:breaking"}
    experiment = ts.Experiment.of({**SMALL, "problem": problem})
    with pytest.warns(RefusedWarning, match=r"on tests\.engine\.test_proving:breaking: .*the compiled tick gives"):
        stored = ts.run(experiment, tmp_path / "s.zarr", engine="wavefront")
    (fill,) = stored.attributes["fills"]
    assert (fill["plan"]["compiled"], fill["plan"]["workers"]) == (False, 1)
    monkeypatch.setattr("trajstore.recording.planning.remembered", lambda *_: Plan("reference"))
    eager = ts.run(experiment, tmp_path / "e.zarr", engine="wavefront")
    ours, theirs = (s.dataset()["params"].values for s in (stored, eager))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
