"""Figures show every slab's recorded values, and say what they cannot show."""

from __future__ import annotations

import re
from itertools import combinations, product

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from trajstore.analysis import local_variance_ratio
from trajstore.analysis.figures import draw, figure_names, order_colour, style
from trajstore.analysis.figures._paper import PAPER
from trajstore.analysis.figures.learning_curves import draw as learning_curves
from trajstore.analysis.writing import interval, number

import trajstore as ts
from tests.conftest import SMALL_NET
from trajstore import analysis
from trajstore.errors import ConfigurationError, NotFoundError, StatisticError


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


OF_DATASETS = [name for name in figure_names() if name != "contraction" and name not in PAPER]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Two parameters, three orders, three seeds; every state is stored. Backward settles for certain, at 0.9 a step."""
    config = {
        "name": "runs", "steps": 200, "seeds": [0, 1, 2], "orders": ["forward", "backward", "backward+backward@100"],
        "problem": {"family": "quadratic", "spectrum": [1.0, 0.5], "noise": 1.0},
        "operator": {"family": "sgd", "lr": 0.2},
    }  # fmt: skip
    return ts.run(ts.Experiment.of(config), tmp_path_factory.mktemp("figures") / "runs.zarr")


@pytest.fixture(scope="module")
def runs(stored):
    return stored.dataset()


@pytest.fixture(scope="module")
def laws(tmp_path_factory):
    """One parameter, from one start, 30 seeds."""
    experiment = ts.Experiment.preset("quadratic", {"steps": 20, "seeds": list(range(30)), "init_seed": 0})
    return ts.run(experiment, tmp_path_factory.mktemp("laws") / "runs.zarr", durability="none").dataset()


def without_states(ds):
    return ds.assign_coords(stored=ds["stored"] & (ds["snapshot"] == 0))


def lines(ax):
    return {line.get_label(): line for line in ax.lines}


def plain(ax):
    """The title of a panel in one line."""
    return " ".join(ax.get_title("left").split())


def test_rolling_variance_draws_the_statistic_of_each_seed_and_order(runs):
    figure = draw("rolling-variance", runs, window=40)
    expected = analysis.rolling_variance(runs, "train_loss", 40)
    ratio = analysis.variance_ratio(runs, "train_loss").sel(seed=0)
    for ax, seed in zip(figure.axes, (0, 1, 2), strict=True):
        assert ax.get_title("left").startswith(f"seed {seed}\n")
        for order in runs["order"].values:
            curve = expected.sel(order=order, seed=seed)
            line = lines(ax)[order]
            assert np.array_equal(line.get_xdata(), curve["step"])
            assert np.array_equal(line.get_ydata(), curve, equal_nan=True)
    assert figure.axes[0].get_ylabel() == "tail variance of train loss\nover 40 recorded steps"
    written = interval(*(float(ratio[name]) for name in ("ratio", "low", "high")))
    assert f"forward/backward {' '.join(written.split())}" in plain(figure.axes[0])


def test_the_bound_of_the_theorem_lies_over_the_distances_of_backward_where_there_is_one(runs, record):
    """Maps of the quadratic contract by 0.9 = 1 − 0.2 · 0.5."""
    far = runs.traj.distances(to="last").compute()
    for ax, seed in zip(draw("distances", runs).figure.axes, (0, 1, 2), strict=True):
        bound = lines(ax)["bound $C k^n$"]
        steps, heights = bound.get_xdata(), bound.get_ydata()
        assert len(steps) > 100
        assert np.exp(np.diff(np.log(heights))) == pytest.approx(0.9)
        assert (heights >= far.sel(order="backward", seed=seed, snapshot=steps)).all()
    rows = record({**SMALL_NET, "name": "rows", "problem": {"family": "least-squares"}, "steps": 60}).dataset()
    for ds in (runs.sel(order=["forward"]), rows):
        assert all("bound $C k^n$" not in lines(ax) for ax in draw("distances", ds).axes)


def test_layers_and_outputs_have_distances_too(runs, record):
    ds = record({**SMALL_NET, "steps": 60}).dataset()
    far = ds.traj.distances(to="last", layers="2.*").compute()
    said = analysis.outputs(ds)
    expected = ((said - said.isel(snapshot=-1)) ** 2).sum("output").mean("probe") ** 0.5
    for metric, values in (("layer:2.*", far), ("outputs", expected)):
        for ax, seed in zip(draw("distances", ds, metric=metric).axes, (0, 1), strict=True):
            assert lines(ax)["backward"].get_ydata() == pytest.approx(values.sel(order="backward", seed=seed).values)
    with pytest.raises(StatisticError, match="no slab has 3 stored states, and sketches know of no layers"):
        draw("distances", without_states(ds), metric="layer:2.*")


def test_a_slab_that_is_not_finished_takes_nothing_off_the_others(runs):
    """The others keep their exact distances and their verdicts; it says that it is not finished."""
    at, late = {"order": "backward", "seed": 1}, runs["step"] > 1
    here = (runs["order"] == at["order"]) & (runs["seed"] == at["seed"])
    half = runs.assign_coords(
        recorded=runs["recorded"] & ~(here & late), stored=runs["stored"] & ~(here & (runs["snapshot"] > 1))
    )
    left, middle, _ = draw("distances", half).axes
    whole = runs.traj.distances(to="last").compute()
    assert np.array_equal(lines(left)["backward"].get_ydata(), whole.sel(order="backward", seed=0))
    assert "backward: point, rate" in plain(left)
    assert "(steps 101–200)" in plain(left)
    assert "backward: not finished" in plain(middle)
    assert "forward:" in plain(middle)
    assert not len(lines(middle)["backward"].get_ydata())


def test_what_rests_early_in_a_short_run_is_drawn(record):
    ds = record("quadratic", steps=60, seeds=[0], operator={"lr": 0.9}).dataset()
    assert "backward: point, at rest from step 2" in plain(draw("distances", ds).axes[0])


def test_another_window_is_said_beside_what_it_is_of(record):
    (ax,) = draw("distances", record("quadratic", steps=800, seeds=[0]).dataset()).axes
    assert plain(ax).startswith("seed 0, on steps 401–800:")
    assert "(steps 1–800)" in plain(ax)


def test_metrics_that_were_computed_afterwards_are_drawn_where_they_are(record):
    stored = record({**SMALL_NET, "steps": 20})
    analysis.compute(stored, "gradient_norm", every=5)
    ds = stored.store["net"].dataset()
    for ax in draw("learning-curves", ds, metric="gradient_norm").axes:
        line = lines(ax)["backward"]
        assert line.get_xdata().tolist() == [0, 5, 10, 15, 20]
        assert np.isfinite(line.get_ydata()).all()
    assert len(draw("learning-curves", ds).axes) == 4  # the problem's own two metrics, for two seeds


def test_distances_are_those_of_the_stored_states_and_the_rate_is_the_one_that_was_fitted(runs):
    """Of backward the answer is a point, at the rate 0.9; 100 steps that depend on ten others tell no law."""
    figure = draw("distances", runs)
    expected = runs.traj.distances(to="last").compute()
    found = analysis.convergence(runs, "parameters")
    backward = ["backward", "backward+backward@100"]
    assert set(found["verdict"].sel(order=backward).values.flat) == {"point"}
    for ax, seed in zip(figure.axes, (0, 1, 2), strict=True):
        assert np.array_equal(lines(ax)["forward"].get_ydata(), expected.sel(order="forward", seed=seed))
        rates = found["rate"].sel(order=backward, seed=seed).values
        assert abs(rates - 0.9).max() < 0.01
        assert re.search(r"forward: undecided\b", plain(ax))
        for order in backward:
            rate = (float(found[name].sel(order=order, seed=seed)) for name in ("rate", "rate_low", "rate_high"))
            assert f" {order}: point, rate {' '.join(interval(*rate).split())}" in plain(ax)
        slopes = {np.round(np.exp(np.diff(np.log(line.get_ydata()))[0]), 12)
                  for line in ax.lines if line.get_linestyle() == "--"}  # fmt: skip
        assert slopes == set(np.round(rates, 12))
    assert figure.axes[0].get_ylabel() == "distance to the\nlast stored state"


def test_what_has_a_law_is_called_a_distribution_and_has_no_rate(record):
    """30 parameters whose steps hardly depend on each other, so that 200 steps tell."""
    ds = record("quadratic", steps=400, seeds=[0, 1], orders=["forward"], operator={"lr": 0.9},
                problem={"spectrum": [1.0] * 30}).dataset()  # fmt: skip
    assert analysis.convergence(ds)["verdict"].values.tolist() == [["distribution"] * 2]
    for ax, seed in zip(draw("distances", ds).axes, (0, 1), strict=True):
        assert plain(ax) == f"seed {seed}, on steps 201–400: forward: distribution"
        assert not [line for line in ax.lines if line.get_linestyle() == "--"]


def test_what_came_to_rest_shows_the_rate_at_which_it_did(record):
    ds = record("quadratic", steps=400, seeds=[0], operator={"family": "sgd", "lr": 0.5}).dataset()
    assert np.isnan(analysis.convergence(ds)["rate"].sel(order="backward", seed=0))
    (ax,) = draw("distances", ds).axes
    assert "backward: point, rate 0.5" in plain(ax)
    assert "at rest" in plain(draw("distances", ds, window=100).axes[0])


def test_distances_of_a_metric_are_differences_to_its_last_value(runs):
    ax = draw("distances", runs, metric="train_loss", seed=1, order="forward").axes[0]
    loss = runs["train_loss"].sel(order="forward", seed=1)
    assert np.array_equal(lines(ax)["forward"].get_ydata(), abs(loss - loss[-1]))
    assert ax.get_ylabel() == "|train loss − that of\nthe last iterate|"


def test_where_states_are_not_stored_the_sketch_is_drawn_and_named(runs):
    few = without_states(runs)
    ax = draw("distances", few, seed=0, order="backward").axes[0]
    expected = runs.traj.sketch_distances(to="last").sel(order="backward", seed=0)
    assert np.array_equal(lines(ax)["backward"].get_ydata(), expected)
    assert "from the sketch, which is exact" in ax.get_ylabel()
    matrix = draw("distance-matrix", few, seed=0, order="backward")
    assert "from the sketch" in matrix.axes[-1].get_ylabel()
    exact = draw("distance-matrix", runs, seed=0, order="backward")
    assert np.allclose(mesh(matrix.axes[0]), mesh(exact.axes[0]))
    assert "from the sketch" in plain(draw("plane", few, seed=0).axes[0])


def mesh(ax):
    return np.asarray(ax.collections[0].get_array())


def test_a_distance_matrix_is_that_of_an_even_choice_of_states(runs, monkeypatch):
    monkeypatch.setattr("trajstore.analysis.figures.distance_matrix._MOST", 21)
    figure = draw("distance-matrix", runs, seed=[0, 2], order=["forward", "backward"])
    *panels, bar = figure.axes
    expected = analysis.distance_matrix(runs.sel(snapshot=slice(None, None, 10)))
    for ax, (seed, order) in zip(panels, product((0, 2), ("forward", "backward")), strict=True):
        assert ax.get_title("left") == f"seed {seed}, {order}"
        assert np.array_equal(mesh(ax), expected.sel(seed=seed, order=order))
    assert bar.get_ylabel() == "distance of states $n$ and $m$"


def test_a_reset_shows_the_levels_before_and_after(runs):
    figure = draw("reset", runs)
    found = analysis.resets(runs, "train_loss")
    for number_of, ax in enumerate(figure.axes):
        reset = found.isel(reset=number_of)
        assert set(lines(ax)) >= {"forward", "backward+backward@100"}
        assert "backward" not in lines(ax)
        bars = [line for line in ax.lines if line.get_color() == "black" and line.get_linestyle() == "-"]
        assert [line.get_ydata()[0] for line in bars] == [float(reset["before"]), float(reset["after"])]
        assert [list(line.get_xdata()) for line in bars] == [[51, 100], [151, 200]]
        between = f"forward between the levels: {float(reset['forward_between']):.0%}"
        assert (between in plain(ax)) == (reset["settles"] == "elsewhere")


def test_the_law_is_that_of_forward_with_backward_ends_as_marks(runs, laws, monkeypatch):
    few = runs.sel(order=["forward", "backward"])
    (ax,) = draw("law", few, metric="param_norm").axes
    assert np.array_equal(lines(ax)["backward, step 200 of 3 seeds"].get_xdata(), few["param_norm"][1, :, -1])
    bars = ax.patches
    half = few["param_norm"].sel(order="forward", step=slice(100, None)).values.ravel()
    drawn = np.concatenate([half, few["param_norm"].values[1, :, -1]])
    counted, _ = np.histogram(half, len(bars), (drawn.min(), drawn.max()))
    assert np.allclose([bar.get_height() * bar.get_width() for bar in bars], counted / len(half))
    assert plain(ax) == "no test: 3 seeds are too few to compare laws"

    monkeypatch.setattr("trajstore.analysis.figures.law._MANY", 30)
    (ax,) = draw("law", laws).axes
    forward, backward = laws["params"].sel(snapshot=20).values[..., 0]
    assert np.array_equal(lines(ax)["backward, step 20 of 30 seeds"].get_xdata(), backward)
    assert min(bar.get_x() for bar in ax.patches) == min(forward.min(), backward.min())
    assert ax.patches[0].get_label() == "forward, step 20 of 30 seeds"
    p = float(analysis.law(laws)["p_swap"][0, 0])
    assert plain(ax) == f"test of equal law at step 20: swap $p$ = {number(p)}"


def test_a_law_of_two_values_has_two_bars(record):
    (ax,) = draw("law", record("two-constants", steps=60, seeds=[0, 1]).dataset()).axes
    assert sorted(bar.get_x() + bar.get_width() / 2 for bar in ax.patches) == [-1, 1]
    assert sum(bar.get_height() for bar in ax.patches) == pytest.approx(1)


def test_paths_in_the_plane_keep_their_distances_where_there_are_two_parameters(runs):
    figure = draw("plane", runs)
    params = runs["params"].transpose("seed", "order", "snapshot", "param").values
    for ax, states in zip(figure.axes, params, strict=True):
        drawn = np.concatenate([line.get_xydata() for line in ax.lines if line.get_linestyle() == "-"])
        whole = states.reshape(-1, 2)
        assert np.allclose(np.linalg.norm(drawn - drawn[0], axis=1), np.linalg.norm(whole - whole[0], axis=1))
        shares = [float(re.search(r"([\d.]+)%", label)[1]) for label in (ax.get_xlabel(), ax.get_ylabel())]
        assert sum(shares) == pytest.approx(100, abs=0.11)


def test_a_plane_is_of_the_parameters_alone_and_does_not_depend_on_chunks(runs):
    whole = draw("plane", runs, seed=0).axes[0]
    parts = draw("plane", runs.chunk({"param": 1, "snapshot": 7}), seed=0).axes[0]
    for one, other in zip(whole.lines, parts.lines, strict=True):
        assert np.allclose(np.abs(one.get_xydata()), np.abs(other.get_xydata()))


@pytest.mark.parametrize("name", [name for name in OF_DATASETS if name != "reset"])
def test_one_slab_is_drawn_from_any_selection_of_it(name, runs):
    ds = runs.sel(order=["forward", "backward"])
    by_option = draw(name, ds, seed=1)
    by_selection = draw(name, ds.sel(seed=[1]), seed=ds["seed"].values[1])
    assert by_option._repr_png_() == by_selection._repr_png_()  # also what a notebook shows
    if name != "law":
        draw(name, ds.sel(seed=1, order="forward"))


@pytest.mark.parametrize("name", OF_DATASETS)
def test_figures_are_drawn_on_axes_that_are_passed_in(name, runs):
    ds = runs.sel(order=["forward", "backward"]) if name == "law" else runs.sel(order=runs["order"].values[[0, 2]])
    own = Figure()
    count = {"distance-matrix": 2}.get(name, 1)
    axes = own.subplots(1, count)
    assert draw(name, ds, seed=0, axes=axes) is own
    assert all(ax.has_data() for ax in np.atleast_1d(axes))
    assert not own.legends
    with pytest.raises(ConfigurationError, match=f"5 axes were passed in; this figure takes {count}"):
        draw(name, ds, seed=0, axes=Figure().subplots(5))


@pytest.mark.parametrize("name", [name for name in figure_names() if name not in PAPER])
def test_at_print_size_no_text_lies_on_another_and_no_legend_over_data(name, stored, laws):
    figure = draw(name, laws if name == "law" else stored)
    with style():
        figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    for (one, box), (other, second) in combinations(boxes, 2):
        shared = Bbox.intersection(box, second)
        assert shared is None or min(shared.width, shared.height) < 1, (one, other)
    for legend in figure.legends:
        assert not any(legend.get_window_extent().overlaps(ax.get_window_extent()) for ax in figure.axes)
    assert figure.get_figwidth() < 8.5


def texts(figure):
    """Everything that is written and shown."""
    hidden = set()
    for ax in figure.axes:
        hidden |= set(outside(ax.xaxis) + outside(ax.yaxis) if ax.axison else ax.findobj(Text))
    return [
        text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible() and text not in hidden
    ]


def outside(axis):
    """Labels of ticks that are beyond the axis, and so not drawn."""
    shown = {id(label) for tick in axis._update_ticks() for label in (tick.label1, tick.label2) if label.get_visible()}
    every = [label for tick in (*axis.majorTicks, *axis.minorTicks) for label in (tick.label1, tick.label2)]
    return [label for label in every if id(label) not in shown]


def test_an_option_that_a_figure_does_not_take_is_told_with_those_it_takes(runs):
    with pytest.raises(ConfigurationError, match="'law' takes no option 'window'; it takes metric, seed"):
        draw("law", runs, window=10)
    with pytest.raises(ConfigurationError, match="'rolling-variance' takes one metric, and not 2"):
        draw("rolling-variance", runs, metric=["train_loss", "batch_loss"])
    assert draw("rolling-variance", runs, metric=["train_loss"], window=None, seed=[]).axes


ONE_METRIC = ["learning-curves", "rolling-variance", "distances", "reset", "law"]


@pytest.mark.parametrize("name", ONE_METRIC)
def test_metrics_that_do_not_exist_or_have_no_value_are_one_clear_line(name, runs):
    ds = runs.sel(order=["forward", "backward"]) if name == "law" else runs
    with pytest.raises(NotFoundError, match="no metric 'tran_loss'; did you mean 'train_loss'"):
        draw(name, ds, metric="tran_loss")
    empty = ds.assign(train_loss=(ds["train_loss"] * np.nan).assign_attrs(ds["train_loss"].attrs))
    with pytest.raises(StatisticError, match="train_loss: no value is finite, so there is nothing to draw"):
        draw(name, empty, metric="train_loss")


@pytest.mark.parametrize("name", OF_DATASETS)
def test_what_is_not_there_cannot_be_drawn(name, runs):
    with pytest.raises(NotFoundError, match="no seed 7; there is 0, 1, 2"):
        draw(name, runs, seed=7)
    nothing = runs.assign_coords(recorded=runs["recorded"] & False, stored=runs["stored"] & False)
    with pytest.raises(StatisticError, match="'runs': nothing is recorded yet"):
        draw(name, nothing)


def test_a_metric_without_values_is_left_out(runs):
    ds = runs.assign(
        test_loss=(runs["train_loss"] * np.nan).assign_attrs(runs["train_loss"].attrs),
        measured=runs["measured"].assign_attrs(flag_meanings="train_loss test_loss"),
    )
    assert [ax.get_ylabel() for ax in draw("learning-curves", ds).axes] == ["train loss", "", ""]


def test_figures_ask_for_what_they_need(runs, record):
    with pytest.raises(StatisticError, match="measured at 201 steps, fewer than the window of 900"):
        draw("rolling-variance", runs, window=900)
    late = (runs["order"] == "backward") & (runs["seed"] == 1) & (runs["step"] > 150)
    unfinished = runs.assign_coords(recorded=runs["recorded"] & ~late)
    with pytest.raises(StatisticError, match="order 'backward', seed 1 has no step 151; finish the recording"):
        draw("rolling-variance", unfinished)
    with pytest.raises(StatisticError, match="begins a new leg"):
        draw("reset", runs, order="backward")
    with pytest.raises(StatisticError, match="there is no 'backward' here"):
        draw("law", runs.sel(order=["forward"]))
    with pytest.raises(StatisticError, match="a density is of one number, and 2 of each state are stored"):
        draw("law", runs, metric="parameters")
    with pytest.raises(StatisticError, match="15 forward and 3 backward iterates have a finite value"):
        draw("law", runs.isel(step=slice(0, 10), seed=slice(0, 3)), metric="train_loss")
    short = record("quadratic", steps=6, seeds=[0]).dataset()
    with pytest.raises(StatisticError, match="a plane takes two parameters, and there is one"):
        draw("plane", short)
    with pytest.raises(StatisticError, match="it was measured at 7 steps, fewer than the window of 8"):
        draw("rolling-variance", short)
    assert plain(draw("distances", short).axes[0]) == "seed 0"


def test_a_figure_without_a_ratio_says_why(record):
    short = record("quadratic", steps=20, seeds=[0, 1]).dataset()
    curves = PAPER["fig4"].__class__(("train_loss", "param_norm"))
    for ax, title in zip(curves(short).axes, ["train loss", "param norm", "", ""], strict=True):
        why = "no ratio of variances: it was measured at 21 steps, fewer than the window of 192"
        assert plain(ax) == f"{title} {why if title else ''}".strip()
    assert plain(draw("rolling-variance", short, order="forward").axes[0]) == "seed 0"


def test_what_diverged_is_told(record):
    ds = record("quadratic", steps=120, seeds=[0], operator={"family": "sgd", "lr": 1e6}).dataset()
    for name in ("rolling-variance", "distances"):
        with pytest.raises(StatisticError, match="every slab has diverged, so there is nothing to draw"):
            draw(name, ds)
    with style():
        draw("learning-curves", ds).draw_without_rendering()
        draw("distance-matrix", ds).draw_without_rendering()


def test_more_panels_than_can_be_read_are_refused(laws):
    for name in ("learning-curves", "rolling-variance", "distances", "plane"):
        with pytest.raises(ConfigurationError, match="30 panels are more than can be read; choose fewer seeds"):
            draw(name, laws)
    assert len(draw("learning-curves", laws, seed=range(5)).axes) == 6


def test_a_run_that_ends_between_two_recorded_steps_has_a_rolling_variance(record):
    ds = record("quadratic", steps=100, seeds=[0], record={"every": 7}).dataset()
    assert ds["step"].values[ds["recorded"].values[0, 0]].tolist()[-2:] == [98, 100]
    (ax,) = draw("rolling-variance", ds, window=8).axes
    assert lines(ax)["forward"].get_xdata()[-1] == 98


def test_intervals_have_the_digits_that_they_tell():
    written = [interval(0.94987, 0.9491, 0.9507), interval(12.34, 8.1, 17.3), interval(1.04e19, 7.1e17, 1.53e20)]
    assert [" ".join(text.split()) for text in written] == [
        "0.9499 [0.9491, 0.9507]", "12.3 [8.1, 17.3]", "1e19 [7.1e17, 1.5e20]"
    ]  # fmt: skip
    assert interval(294.1, np.nan, np.nan) == "290"
    assert [number(value) for value in (0.00123, -1e-7, 0.0, 999.0)] == ["0.0012", "-1e-7", "0", "1000"]


def test_the_factors_of_pairs_are_counted(stored, runs):
    from trajstore.analysis import contraction

    figure = draw("contraction", stored, order=["forward", "backward"], pairs=80)
    for ax, order in zip(figure.axes, ("forward", "backward"), strict=True):
        factors = contraction(stored, order, 80)["factor"].values
        bars = [(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height()) for bar in ax.patches]
        counted = [((factors >= low - 1e-12) & (factors < high - 1e-12)).sum() for low, high, _ in bars]
        assert [height for *_, height in bars] == counted
        assert sum(counted) == np.isfinite(factors).sum()
        assert f"of 80 pairs contract, median {np.median(factors):.4g}" in ax.get_title("left")
    own = Figure()
    assert draw("contraction", stored, order="forward", axes=own.subplots()) is own
    with pytest.raises(ConfigurationError, match="the figure 'contraction' computes with the experiment"):
        draw("contraction", runs)
    with pytest.raises(ConfigurationError, match="takes no option 'metric'"):
        draw("contraction", stored, metric="train_loss")
    with pytest.raises(NotFoundError, match="no order 'backwards'; did you mean 'backward'"):
        draw("contraction", stored, order="backwards")


def test_figure_3_says_how_much_less_the_order_with_the_reset_varies(record):
    orders = ["forward", "backward", "backward+backward@200"]
    ds = record("quadratic", steps=400, seeds=[0, 1, 2], orders=orders).dataset()
    levels = PAPER["fig3"].__class__("train_loss", first=2)
    figure = levels(ds)
    assert len(figure.axes) == 2
    ratio = local_variance_ratio(ds, "train_loss", orders=("forward", "backward+backward@200"))
    for ax, seed in zip(figure.axes, (0, 1), strict=True):
        one = ratio.sel(seed=seed)
        told = " ".join(ax.get_title(loc="left").split())
        assert told.startswith(f"seed {seed} settles elsewhere forward between the levels: ")
        number = interval(*(float(one[name]) for name in ("ratio", "low", "high"))).replace("\N{NO-BREAK SPACE}", " ")
        assert told.endswith(f"variance forward/backward+backward@200 {number}, steps 201 to 400")
        assert {line.get_label() for line in ax.lines} >= {"forward", "backward+backward@200"}
