"""Presets are the paper's settings, and each is recorded and drawn at a small scale."""

from __future__ import annotations

from io import BytesIO

import pytest
from trajstore.analysis.figures import draw
from trajstore.analysis.figures._paper import PAPER

import trajstore as ts
from tests.conftest import sampled
from trajstore.errors import ConfigurationError
from trajstore.experiment.configuration import merge
from trajstore.experiment.presets import about, preset_names, preset_table, variants

MLP = {"family": "mlp", "images": {"family": "fashion-mnist"}, "depth": 5, "width": 500, "init": "lecun"}
RESNET, VGG, DEEP = (
    {"family": family, "images": {"family": images}}
    for family, images in (("resnet18", "cifar10"), ("vgg19", "cifar10"), ("resnet50", "cifar100"))
)
# Name → problem, learning rate, batch size, steps, seeds, orders, every: the table of the paper's experiments.
PLAIN = ["forward", "backward"]
SETTINGS = {
    "fig2": (RESNET, 0.025, 8, 2000, 5, PLAIN, 1), "fig12": (RESNET, 0.025, 8, 2000, 5, PLAIN, 1),
    "fig3": (MLP, 0.001, 8, 2000, 5, ["forward", "backward+backward@1000"], 1),
    "fig13": (MLP, 0.001, 8, 2000, 5, ["forward", "backward+backward@1000"], 1),
    "fig4": ({"family": "regression", "curve": "x^2", "depth": 3, "width": 300}, 0.05, 1, 1400, 5, PLAIN, 1),
    "fig5": ({"family": "regression", "curve": "cos(10x)", "depth": 3, "width": 300}, 0.02, 1, 1400, 5, PLAIN, 1),
    "fig6": ({"family": "regression", "curve": "x^3", "depth": 3, "width": 300}, 0.02, 1, 1400, 5, PLAIN, 1),
    "fig7": (MLP, 0.001, 8, 2000, 5, PLAIN, 1), "fig8": (VGG, 0.001, 8, 2000, 5, PLAIN, 1),
    "fig9": (DEEP, 0.001, 16, 2000, 5, PLAIN, 1),
    "fig10": (MLP, 0.001, 8, 2000, 5, ["forward", "forward+backward@1000"], 1),
    "fig11": (RESNET, 0.025, 8, 25000, 1, PLAIN, 100),
}  # fmt: skip
REGULARIZED = {"fig14": (2, 2048), "fig15": (2, 2048), "fig16": (3, 2049), "fig17": (3, 2049),
               "fig18": (4, 2048), "fig19": (4, 2048)}  # fmt: skip


def test_there_is_a_preset_and_a_figure_for_every_figure_of_the_paper():
    figures = [f"fig{n}" for n in range(2, 20)]
    assert list(PAPER) == figures
    assert set(preset_names()) == {*figures, "quadratic", "two-constants"}
    assert [name for name in preset_names() if name.startswith("fig")] == figures
    assert {*SETTINGS, *REGULARIZED} == set(figures)


@pytest.mark.parametrize("name", SETTINGS)
def test_presets_have_the_papers_settings(name):
    problem, lr, batch, steps, seeds, orders, every = SETTINGS[name]
    table = preset_table(name)
    assert merge(table["problem"], problem) == table["problem"]
    assert table["problem"]["batch_size"] == batch
    assert table["operator"] == {"family": "sgd", "lr": lr}
    assert (table["steps"], table["seeds"], table["orders"]) == (steps, list(range(seeds)), orders)
    assert table.get("record", {}).get("every", 1) == every


@pytest.mark.parametrize("name", REGULARIZED)
def test_variants_have_the_papers_settings(name):
    c, batch = REGULARIZED[name]
    tables = {one.partition(".")[2]: preset_table(one) for one in variants(name)}
    assert list(tables) == ["large", "large-slow", "small-batch", "lambda-0.5", "lambda-1", "lambda-2", "lambda-4"]
    for variant, table in tables.items():
        operator, small = table["operator"], variant == "small-batch"
        assert merge(table["problem"], MLP) == table["problem"]
        assert table["problem"]["batch_size"] == (batch // c if small else batch)
        assert operator["lr"] == (0.001 / c if variant in ("large-slow", "small-batch") else 0.001)
        assert table["steps"] / table["record"]["every"] == 200  # so that they are compared at the same examples
        assert table["steps"] == (2000 * c if small else 2000)
        if variant.startswith("lambda"):
            assert (operator["family"], operator["parts"]) == ("order-regularized", c)
            assert operator["strength"] == float(variant.removeprefix("lambda-"))
        else:
            assert operator["family"] == "sgd"


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_builds_at_every_scale(name):
    assert about(name)
    for one in variants(name):
        experiment = ts.Experiment.of(preset_table(one))
        assert experiment.name == one
        assert ts.Experiment.of(experiment.config()).config() == experiment.config()
        if name.startswith("fig"):
            small = ts.Experiment.preset(one, scale="small")
            assert small.name == one.replace(name, f"{name}-small")
            assert small.config()["problem"].get("images", {}).get("family", "shapes") == "shapes"
            assert f"{name[3:]}, small" in preset_table(one, "small")["about"] or "." in one


def tiny(name):
    """Return what makes a preset at small scale a matter of a second."""
    table = preset_table(variants(name)[0], "small")
    problem = {"width": 8} if "width" in table["problem"] else {"narrow": 32}
    if "images" in table["problem"]:
        pixels = 32 if table["problem"]["family"] == "vgg19" else 8
        problem |= {"batch_size": 12, "images": {"train": 24, "test": 10, "pixels": pixels}}
    orders = [order.partition("@")[0] + ("@4" if "@" in order else "") for order in table["orders"]]
    return {"problem": problem, "orders": orders, "steps": 8, "seeds": table["seeds"][:2], "record": {"every": 1}}


TWINS = {"fig2": "fig12", "fig3": "fig13", "fig14": "fig15", "fig16": "fig17", "fig18": "fig19"}
"""Figures of the same recordings: name → the other."""


@pytest.mark.parametrize(("name", "twin"), TWINS.items())
def test_two_figures_are_of_the_same_recordings(name, twin):
    for one, other in zip(variants(name), variants(twin), strict=True):
        here, there = (ts.Experiment.of(preset_table(each)).config() for each in (one, other))
        assert {key for key in here if here[key] != there[key]} <= {"name", "variant_of"}


@pytest.mark.parametrize("name", sampled((name for name in PAPER if name not in TWINS.values()), every=2))
def test_every_figure_is_recorded_and_drawn(name, tmp_path):
    store, changes = tmp_path / "s.zarr", tiny(name)
    for one in variants(name):
        ts.run(ts.Experiment.of(preset_table(one, "small", shared=changes)), store, engine="reference")
    recorded = ts.open(store).variants(f"{name}-small")
    several = len(recorded) > 1
    seeds = len(next(iter(recorded.values())).schema.seeds)
    for one in filter(None, (name, TWINS.get(name))):
        drawn = recorded if several else recorded[f"{name}-small"]
        if one == "fig3":
            with pytest.raises(ts.errors.StatisticError, match="a level needs a leg of 32 recorded steps"):
                draw(one, drawn)
            continue
        figure = draw(one, drawn)
        rows, columns = (1 if one == "fig2" else seeds), (2 if several or one in ("fig4", "fig5", "fig6") else 4)
        assert len(figure.axes) == rows * columns
        assert all(len(ax.lines) == (7 if several else 2) for ax in figure.axes)
        figure.savefig(BytesIO(), format="png")


@pytest.mark.parametrize(
    ("name", "scale", "says"),
    [
        ("fig44", "full", "unknown preset 'fig44'; did you mean 'fig4'"),
        ("fig14", "full", "preset 'fig14' is several experiments; name one: fig14.large, fig14.large-slow, "),
        ("fig14.larg", "full", "unknown preset 'fig14.larg'; did you mean 'fig14.large'"),
        ("fig4.large", "full", "unknown preset 'fig4.large'; there is fig4"),
        ("fig4", "tiny", "unknown scale 'tiny'; there is full, small"),
        ("quadratic", "small", "preset 'quadratic' has no small scale: it takes minutes as it is"),
    ],
)
def test_what_is_no_preset_is_one_clear_line(name, scale, says):
    with pytest.raises(ConfigurationError, match=says):
        ts.Experiment.preset(name, scale=scale)


def test_a_file_begins_with_a_preset_at_a_scale():
    experiment = ts.Experiment.of({"preset": "fig16.lambda-2", "scale": "small", "name": "mine", "steps": 60})
    assert (experiment.name, experiment.steps, experiment.operator.strength) == ("mine", 60, 2.0)
    assert (experiment.operator.lr, experiment.problem.width) == (0.006, 64)
