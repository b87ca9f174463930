"""Variants are compared at the same examples, seed by seed, and over seeds with an interval."""

from __future__ import annotations

import numpy as np
import pytest
import trajstore.analysis.figures as figures
from scipy.stats import ttest_1samp
from trajstore.analysis import compare
from trajstore.analysis.seeds import DECIDES

import trajstore as ts
from tests.tools.calibration import effects
from trajstore.errors import ConfigurationError, NotFoundError, StatisticError
from trajstore.experiment.configuration import merge

ROWS = {
    "problem": {"family": "least-squares", "n": 30, "d": 3, "batch_size": 6},
    "orders": ["forward"],
    "seeds": [0, 1, 2, 3],
    "steps": 40,
    "operator": {"family": "sgd", "lr": 0.1},
    "record": {"every": 2},
}
VARIANTS = {
    "large": {}, "slow": {"operator": {"lr": 0.005}},
    "small": {"problem": {"batch_size": 2}, "operator": {"lr": 0.1 / 3}, "steps": 120, "record": {"every": 6}},
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    place = tmp_path_factory.mktemp("comparing") / "s.zarr"
    for name, changes in VARIANTS.items():
        table = {**ROWS, "name": f"rows.{name}", "variant_of": "rows"}
        ts.run(ts.Experiment.of(merge(table, changes)), place, engine="reference")
    return ts.open(place)


def test_differences_are_at_the_same_examples(store):
    variants = {name: stored.dataset() for name, stored in store.variants("rows").items()}
    assert list(variants) == ["large", "slow", "small"]
    found = compare(variants, "train_loss")
    assert found["step"].values.tolist() == list(range(0, 41, 2))
    small = variants["small"]["train_loss"].sel(order="forward", step=range(0, 121, 6)).values
    large = variants["large"]["train_loss"].sel(order="forward", step=range(0, 41, 2)).values
    assert np.array_equal(found["difference"].sel(variant="small"), small - large)
    last = (small - large)[:, -5:].mean(1)
    assert found["last"].sel(variant="small").values == pytest.approx(last, rel=1e-12)
    one = found.sel(variant="small")
    low, high = ttest_1samp(last, 0).confidence_interval(0.95)
    assert [float(one[k]) for k in ("mean", "low", "high")] == pytest.approx([last.mean(), low, high], rel=1e-9)
    assert bool((found["last"].sel(variant="slow") > 0).all())  # a twentieth of the learning rate is behind
    assert np.isnan(found["turned"].sel(variant="slow"))  # and always was


def test_the_step_is_told_at_which_a_difference_turns(store):
    variants = {name: store.variants("rows")[name].dataset() for name in ("large", "slow")}
    crossing = variants["slow"]["train_loss"] * 0 + np.where(variants["slow"]["step"] < 25, 1e6, -1e6)
    found = compare({**variants, "slow": variants["slow"].assign(train_loss=crossing)}, "train_loss")
    assert found["turned"].sel(variant="slow") == 24
    assert found["mean"].sel(variant="slow") < 0
    assert [found.attrs[k] for k in ("from_step", "to_step")] == [32, 40]
    assert np.isnan(found["turned"].sel(variant="large"))
    diverged = crossing.where(variants["slow"]["step"] < 38)
    found = compare({**variants, "slow": variants["slow"].assign(train_loss=diverged)}, "train_loss")
    assert np.isnan(found[["mean", "low", "high"]].sel(variant="slow").to_array()).all()


def test_two_seeds_have_no_interval(store):
    variants = {name: stored.dataset().isel(seed=[0, 1]) for name, stored in store.variants("rows").items()}
    found = compare(variants, base="slow")
    assert found.attrs == {"metric": "train_loss", "base": "slow", "level": 0.95, "from_step": 32, "to_step": 40}
    assert np.isnan(found["low"]).all()
    assert np.isfinite(found["mean"]).all()


def test_what_cannot_be_compared_is_refused(store):
    variants = {name: stored.dataset() for name, stored in store.variants("rows").items()}
    with pytest.raises(NotFoundError, match="no variant 'larg'; did you mean 'large'"):
        compare(variants, base="larg")
    with pytest.raises(StatisticError, match="the steps of variants 'large' and 'small' are not the same"):
        compare({**variants, "small": variants["small"].sel(step=slice(0, 60))}, "train_loss")
    with pytest.raises(StatisticError, match="the seeds of variants 'large' and 'slow' are not the same"):
        compare({**variants, "slow": variants["slow"].isel(seed=[0, 1])}, "train_loss")


def test_figures_tell_one_experiment_from_several(store):
    variants = store.variants("rows")
    figure = figures.draw("fig14", variants, seed=[1, 2])
    assert [ax.get_title(loc="left") for ax in figure.axes] == [
        f"{what}"
        for seed in (1, 2)
        for what in (f"seed {seed}, train loss", "less that of 'large'; beyond the panel: slow")
    ]
    assert {line.get_label().partition(":")[0] for line in figure.axes[0].lines} == {"large", "slow", "small"}
    with pytest.raises(ConfigurationError, match="'learning-curves' is of one experiment; choose a variant: large, "):
        figures.draw("learning-curves", variants)
    with pytest.raises(ConfigurationError, match="'fig14' compares the variants of an experiment; this is one alone"):
        figures.draw("fig14", variants["large"])
    with pytest.raises(NotFoundError, match="has no test_loss, which this figure shows; it has train_loss"):
        figures.draw("fig15", variants)


def test_own_problems_are_compared_at_the_same_examples(tmp_path, monkeypatch):
    (tmp_path / "own_sizes.py").write_text(
        "import torch, trajstore as ts\n"
        "x = torch.linspace(-1, 1, 30, dtype=torch.float64)[:, None]\n"
        "def make(size):\n"
        "    return ts.ModuleProblem(lambda: torch.nn.Linear(1, 1).double(), torch.nn.functional.mse_loss,\n"
        "                            (x, x**3), batch_size=size)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {}
    for name, size, steps in (("large", 6, 20), ("small", 2, 60)):
        problem = {"family": "factory", "function": "own_sizes:make", "arguments": {"size": size}}
        table = {"name": f"own.{name}", "problem": problem, "operator": {"family": "sgd", "lr": 0.1},
                 "steps": steps, "seeds": [0, 1], "orders": ["forward"], "record": {"every": steps // 20}}  # fmt: skip
        found[name] = ts.run(ts.Experiment.of(table), tmp_path / "s.zarr").dataset()
    compared = compare(found, "train_loss")
    assert compared["step"].values.tolist() == list(range(21))  # 60 steps of a third of the examples
    small, large = (found[name]["train_loss"].sel(order="forward").values[:, ::every]
                    for name, every in (("small", 3), ("large", 1)))  # fmt: skip
    assert np.array_equal(compared["difference"].sel(variant="small"), small - large)
    with pytest.raises(ConfigurationError, match="batch_sizes: 6 for variant 'small', whose batches hold 2"):
        compare(found, "train_loss", batch_sizes={"small": 6})


def test_what_a_loop_does_not_say_is_asked_for(tmp_path):
    import torch

    for name, steps in (("a", 4), ("b", 8)):
        with ts.record(tmp_path / "s.zarr", name, torch.nn.Linear(2, 1), steps=steps) as rec:
            for n in range(steps):
                rec.step(loss=float(n), told=float(10 * n))
    store = ts.open(tmp_path / "s.zarr")
    found = {
        name: store[name].dataset().sel(step=range(every, 4 * every + 1, every)) for name, every in (("a", 1), ("b", 2))
    }
    with pytest.raises(StatisticError, match="variant 'a': how many examples a batch holds is not stored"):
        compare(found, "told")
    with pytest.raises(NotFoundError, match="batch_sizes: no variant 'c'"):
        compare(found, "told", batch_sizes={"c": 1})
    with pytest.raises(ConfigurationError, match="batch_sizes: 0 for variant 'a'; it must be at least 1"):
        compare(found, "told", batch_sizes={"a": 0, "b": 1})
    assert (
        compare({"a": found["a"], "again": found["a"]}, "told", batch_sizes={"a": 3, "again": 3})["mean"].values[1] == 0
    )


def test_noise_is_not_set_against_examples(store, tmp_path):
    noise = ts.run(ts.Experiment.preset("quadratic", {"steps": 20, "seeds": [0, 1, 2, 3]}), tmp_path / "s.zarr")
    rows = store.variants("rows")["large"].dataset()
    with pytest.raises(StatisticError, match="the batches of variant 'noise' are noise and hold no examples"):
        compare({"rows": rows, "noise": noise.dataset()}, "train_loss")
    ds = noise.dataset()
    assert float(compare({"a": ds, "b": ds}, "train_loss")["mean"].sel(variant="b")) == 0


@pytest.mark.parametrize(("name", "least"), [("normal", 0.92), ("Student's t, 3 degrees", 0.92), ("exponential", 0.83)])
@pytest.mark.parametrize("seeds", [3, 5, 20])
def test_intervals_over_seeds_hold_as_the_table_says_and_those_that_decide_are_hardly_ever_wrong(name, seeds, least):
    low, high = effects(3_000, name, seeds, 0.95)
    assert ((low <= 0) & (high >= 0)).mean() >= least
    low, high = effects(3_000, name, seeds, DECIDES)
    assert max((high < -0.5).mean(), (low > 0.5).mean()) <= 0.02
