"""Variants are compared at the same examples, seed by seed, and over seeds with an interval."""

from __future__ import annotations

import numpy as np
import pytest
import trajstore.analysis.figures as figures
from scipy.stats import ttest_1samp
from trajstore.analysis import compare

import trajstore as ts
from trajstore.errors import ConfigurationError, NotFoundError, StatisticError

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
        table = {**ROWS, "name": f"rows.{name}"}
        ts.run(ts.Experiment.of(ts.configuration.merge(table, changes)), place, engine="reference")
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
