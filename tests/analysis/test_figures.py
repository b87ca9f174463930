"""Figures show every slab's recorded values, and say what they cannot show."""

from __future__ import annotations

import numpy as np
import pytest
from trajstore.analysis.figures import draw, figure_names, order_colour
from trajstore.analysis.figures.learning_curves import draw as learning_curves

from trajstore.errors import NotFoundError, StatisticError


def test_learning_curves_draw_every_seed_and_order(record):
    experiment = record(orders=["forward", "backward", "backward/5"], record={"every": 3})
    ds = experiment.dataset()
    figure = draw("learning-curves", ds)
    axes = np.array(figure.axes).reshape(2, 2)
    for row, seed in enumerate((0, 1)):
        assert axes[row, 0].get_ylabel() == f"seed {seed}"
        for column, metric in enumerate(("train_loss", "test_loss")):
            ax = axes[row, column]
            assert ax.get_yscale() == "linear"
            assert [line.get_label() for line in ax.lines] == ["forward", "backward", "backward/5"]
            for line in ax.lines:
                assert line.get_xdata().tolist() == [0, 3, 6, 9, 12]
                here = ds[metric].sel(order=line.get_label(), seed=seed, step=[0, 3, 6, 9, 12])
                assert np.array_equal(line.get_ydata(), here.values)
    assert len({line.get_color() for line in axes[0, 0].lines}) == 3
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["forward", "backward", "backward/5"]


def test_uneven_steps_are_marked(record):
    marks = [
        {line.get_marker() for ax in draw("learning-curves", record(name=f"n{k}", record=grid).dataset()).axes
         for line in ax.lines}
        for k, grid in enumerate(({"every": 5}, {"steps": [3, 4]}))
    ]  # fmt: skip
    assert marks == [{"None"}, {"."}]


def test_the_plain_orders_keep_their_colours():
    assert order_colour("forward", 3) != order_colour("backward", 3)
    assert order_colour("forward", 0) == order_colour("forward", 1)


def test_metrics_can_be_chosen_and_an_axis_is_logarithmic_where_that_serves(record):
    ds = record("quadratic", steps=40, seeds=[0]).dataset()
    figure = learning_curves(ds, ["train_loss"])
    assert figure.axes[0].get_yscale() == "log"
    narrow = ds.assign(train_loss=(1 + ds["train_loss"] / 100).assign_attrs(ds["train_loss"].attrs))
    assert learning_curves(narrow).axes[0].get_yscale() == "linear"
    shifted = ds.assign(train_loss=(ds["train_loss"] - 10).assign_attrs(ds["train_loss"].attrs))
    assert learning_curves(shifted).axes[0].get_yscale() == "linear"
    with pytest.raises(NotFoundError, match="no metric 'tran_loss'; did you mean 'train_loss'"):
        learning_curves(ds, ["tran_loss"])


def test_nothing_recorded_is_nothing_to_draw(record):
    ds = record("quadratic", steps=5, seeds=[0]).dataset()
    with pytest.raises(StatisticError, match="nothing is recorded yet"):
        learning_curves(ds.assign_coords(recorded=ds["recorded"] & False))


def test_an_unknown_figure_is_named():
    assert "learning-curves" in figure_names()
    with pytest.raises(NotFoundError, match="no figure 'learning-curve'; did you mean 'learning-curves'"):
        draw("learning-curve", None)
