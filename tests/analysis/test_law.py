"""The law tests: exact under the null, on the dependent pairs that training really gives, and able to see a shift."""

from __future__ import annotations

import numpy as np
import pytest
from trajstore.analysis import law
from trajstore.analysis.law import adjusted, disjoint_test, swap_test

import trajstore as ts
from tests.analysis.processes import LAWS, compositions, iterate_pairs
from trajstore.errors import ConfigurationError, NotFoundError, StatisticError


@pytest.mark.parametrize("n", [5, 20, 60])
def test_equal_laws_are_rejected_as_often_as_the_level_says(n):
    rng = np.random.default_rng(n)
    swapped, apart = [], []
    for _ in range(2_000):
        forward, backward = iterate_pairs(rng, n, 40)
        swapped.append(swap_test(forward, backward, 199, rng) <= 0.05)
        apart.append(disjoint_test(forward, backward, 199, rng) <= 0.05)
    assert 0.03 <= np.mean(swapped) <= 0.07
    assert 0.03 <= np.mean(apart) <= 0.07


@pytest.mark.parametrize("n", [5, 20, 60])
def test_a_shift_of_half_a_deviation_is_seen(n):
    rng, seen = np.random.default_rng(n), []
    for _ in range(100):
        forward, backward = iterate_pairs(rng, n, 100)
        seen.append(swap_test(forward, backward + 0.5 * forward.std(), 199, rng) <= 0.05)
    assert np.mean(seen) >= 0.85


def test_a_smaller_spread_is_seen():
    rng, seen = np.random.default_rng(0), []
    for _ in range(50):
        forward, backward = iterate_pairs(rng, 60, 200)
        seen.append(swap_test(forward, backward.mean() + 0.6 * (backward - backward.mean()), 199, rng) <= 0.05)
    assert np.mean(seen) >= 0.85


def test_unpaired_tests_would_have_no_size():
    """Why swaps: at n = 5 the pairs are so alike that a two-sample test never rejects, whatever the level."""
    from scipy.stats import ks_2samp

    rng = np.random.default_rng(0)
    p = [ks_2samp(*(side[:, 0] for side in iterate_pairs(rng, 5, 100))).pvalue for _ in range(200)]
    assert np.mean(np.array(p) <= 0.05) < 0.005


def test_p_values_are_corrected_for_their_number():
    assert adjusted(np.array([[0.01, 0.04], [0.03, 0.5]])) == pytest.approx(np.array([[0.04, 0.09], [0.09, 0.5]]))


@pytest.fixture(scope="module")
def ds(tmp_path_factory):
    many = {"steps": 30, "seeds": list(range(40)), "init_seed": 0}
    return ts.run(ts.Experiment.preset("quadratic", many), tmp_path_factory.mktemp("law") / "runs.zarr").dataset()


def test_a_recorded_experiment_is_asked(ds):
    found = law(ds, ["train_loss", "parameters"], steps=[1, 5, 30], permutations=499)
    assert found["p_swap"].dims == ("metric", "step")
    assert found["p_swap"].sel(step=1).values.tolist() == [1.0, 1.0]  # at n = 1 they are the same iterate
    assert not found["rejected"].any()
    again = law(ds, ["train_loss", "parameters"], steps=[1, 5, 30], permutations=499)
    assert found.identical(again)
    moved = ds.assign(
        train_loss=ds["train_loss"]
        .where(ds["order"] != "backward", ds["train_loss"] + 1)
        .assign_attrs(ds["train_loss"].attrs)
    )
    assert bool(law(moved, ["train_loss"], steps=[30])["rejected"].all())


def test_it_is_refused_where_the_theorem_does_not_hold(ds, record):
    for change, why in (
        ({"sampling": "shuffle"}, "batches are drawn by 'shuffle' and depend on each other"),
        ({"family": "loop"}, "how these iterates were made is not known"),
        ({"family": None, "object": "mine:Own"}, "how batches are drawn is not stored"),
        ({"family": "factory", "made": {"object": "mine:Own", "sampling": "shuffle"}}, "are drawn by 'shuffle'"),
        ({"family": "factory", "made": {"object": "mine:Own"}}, "how batches are drawn is not stored"),
    ):
        stored = ds.attrs["trajstore"]
        problem = {**stored["config"]["problem"], **change}
        other = ds.assign_attrs(trajstore={**stored, "config": {**stored["config"], "problem": problem}})
        with pytest.raises(StatisticError, match=why):
            law(other)
    operator = {"family": "sgd", "lr": 0.1, "schedule": {"family": "cosine"}, "by": "index"}
    stored = ds.attrs["trajstore"]
    with pytest.raises(StatisticError, match="change with the batch index"):
        law(ds.assign_attrs(trajstore={**stored, "config": {**stored["config"], "operator": operator}}))
    own = {"object": "mine:Step", "lr": 0.1}
    with pytest.raises(StatisticError, match="whether the operators change with the batch index is not stored"):
        law(ds.assign_attrs(trajstore={**stored, "config": {**stored["config"], "operator": own}}))
    with pytest.raises(StatisticError, match="how these iterates were made is not known"):
        law(ds.drop_attrs())
    with pytest.raises(StatisticError, match="start from several"):
        law(record("quadratic", name="several", steps=5, seeds=list(range(12))).dataset())
    with pytest.raises(StatisticError, match="5 seeds are too few"):
        law(ds.isel(seed=slice(5)))
    with pytest.raises(StatisticError, match="there is no 'backward'"):
        law(ds.sel(order=["forward"]))
    with pytest.raises(NotFoundError, match="no step 31; the last one is 30"):
        law(ds, steps=[31])
    with pytest.raises(NotFoundError, match="no metric 'train_los'; did you mean"):
        law(ds, ["train_los"])


def test_all_tests_are_corrected_together():
    """Two tests of one step: without the correction, one of them would reject in 9% to 10%."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(500):
        forward, backward = rng.standard_normal((2, 40, 1))
        p = np.array([swap_test(forward, backward, 199, rng), disjoint_test(forward, backward, 199, rng)])
        wrong += bool((adjusted(p) <= 0.05).any())
    assert wrong <= 0.07 * 500


def test_scales_do_not_matter(ds):
    plain = law(ds, "train_loss", 20, permutations=199)
    for scale in (1e-200, 1e160):
        scaled = ds.assign(train_loss=(scale * ds["train_loss"]).assign_attrs(ds["train_loss"].attrs))
        assert law(scaled, "train_loss", 20, permutations=199)["p_swap"].equals(plain["p_swap"])


def test_what_makes_no_test_is_refused(ds):
    for asked in ({"metrics": []}, {"steps": []}, {"permutations": 0}):
        with pytest.raises(ConfigurationError, match="a test needs a metric, a step, and 99 permutations"):
            law(ds, **asked)


@pytest.mark.parametrize("name", [next(iter(LAWS)), *(pytest.param(n, marks=pytest.mark.slow) for n in [*LAWS][1:])])
def test_theorem_2_6_holds_and_compositions_with_another_law_are_rejected(record, name):
    """A fixed permutation of the operators has the same law and is no counterexample; these are."""
    many = {**LAWS[name], "name": "law", "steps": 20, "seeds": list(range(200)), "init_seed": 0}
    found = compositions(record(many, record={"every": 20}), 20)
    forward, rng = found.pop("forward"), np.random.default_rng(0)
    p = {other: [test(forward, ends, 999, rng) for test in (swap_test, disjoint_test)] for other, ends in found.items()}
    assert min(p.pop("backward")) > 0.05
    assert len(p) == 2
    for other in p.values():
        assert max(other) <= 0.01


def test_measures_of_more_than_the_iterate_are_refused_since_their_laws_differ_where_the_theorem_holds(ds, record):
    """On the quadratic the batch loss of θ_n has mean (1 − h)²ⁿ/2 less h for forward's B_n, the newest in its sum."""
    import matplotlib.pyplot as plt
    import trajstore.analysis.figures as figures

    for metric in ("batch_loss", "step_distance"):
        for ask in (
            lambda m=metric: law(ds, ["train_loss", m], [30]),
            lambda m=metric: figures.draw("law", ds, metric=m),
        ):
            with pytest.raises(StatisticError, match=f"^{metric} is no function of θ_n alone"):
                ask()
    plt.close("all")
    for metric in ("param_norm", "start_distance", "train_loss", "parameters"):
        assert not law(ds, metric, [30], permutations=199)["rejected"].any()
    # What the refusal is for: independent runs of forward and backward, whose iterates have one law.
    rng, h, n, seeds = np.random.default_rng(0), 0.1, 30, 400
    noise = rng.standard_normal((2, seeds, n))
    weights = h * (1 - h) ** np.arange(n)
    forward, backward = (1 - h) ** n + noise[0] @ weights[::-1], (1 - h) ** n + noise[1] @ weights
    newest = [end**2 / 2 - drawn[:, -1] * end for end, drawn in zip((forward, backward), noise, strict=True)]
    same = swap_test(forward[:, None], backward[:, None], 499, rng)
    apart = swap_test(newest[0][:, None], newest[1][:, None], 499, rng)
    assert same > 0.05
    assert apart <= 0.01


def test_a_problem_of_ones_own_with_shuffled_epochs_is_refused_and_its_claim_left_open(record, tmp_path, monkeypatch):
    from trajstore.analysis.examining import examine

    (tmp_path / "own_law.py").write_text(
        "import torch, trajstore as ts\n"
        "x = torch.linspace(-1, 1, 12, dtype=torch.float64)[:, None]\n"
        "def make(sampling):\n"
        "    return ts.ModuleProblem(lambda: torch.nn.Linear(1, 1).double(), torch.nn.functional.mse_loss,\n"
        "                            (x, x**3), batch_size=4, sampling=sampling)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    many = {"operator": {"family": "sgd", "lr": 0.1}, "steps": 4, "seeds": list(range(12)), "init_seed": 0}
    for sampling, verdicts in (("shuffle", ["not decidable here"]), ("iid", ["not decidable here"] * 4)):
        problem = {"family": "factory", "function": "own_law:make", "arguments": {"sampling": sampling}}
        stored = record({**many, "name": sampling, "problem": problem})
        found = list(examine(stored.store, [sampling], ["law"]))
        assert [one.verdict for one in found] == verdicts  # 12 seeds see little
        assert ("depend on each other" in found[0].evidence) == (sampling == "shuffle")
