"""`trajstore analyze` prints what the library says, and refuses in one line."""

from __future__ import annotations

import json
import sys

import pytest
from trajstore.analysis import convergence, resets, variance_ratio
from trajstore.analysis.writing import interval

import trajstore as ts
from tests.conftest import forget


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("analyze") / "runs.zarr"
    orders = ["forward", "backward", "backward+backward@100"]
    ts.run(ts.Experiment.preset("quadratic", {"steps": 240, "seeds": [0, 1], "orders": orders}), path)
    many = {"name": "many", "steps": 20, "seeds": list(range(20)), "init_seed": 0}
    ts.run(ts.Experiment.preset("quadratic", many), path)
    return str(path)


def test_every_analysis_prints_what_the_library_says(store, trajstore):
    ds = ts.open(store)["quadratic"].dataset()
    code, out, _ = trajstore("analyze", store, "quadratic", "convergence")
    assert code == 0
    assert out.startswith("point or distribution: parameters, 120 recorded steps, 121 to 240")
    found = convergence(ds)
    for order in ("forward", "backward"):
        verdict = str(found["verdict"].sel(order=order, seed=1).item())
        assert any(line.split()[:3] == [order, "1", verdict] for line in out.splitlines())
        assert str(found["why"].sel(order=order, seed=1).item()) in out

    _, out, _ = trajstore("analyze", store, "quadratic", "variance", "--metric", "train_loss", "--kind", "level")
    ratio = variance_ratio(ds, "train_loss", kind="level")
    assert f"{float(ratio['ratio'][0]):.4g}" in out
    assert "backward as it is in this window" in out or "too short" in out

    _, out, _ = trajstore("analyze", store, "quadratic", "resets")
    after = resets(ds, "train_loss").isel(reset=1)
    level = interval(*(float(after[name]) for name in ("after", "after_low", "after_high")))
    assert " ".join(level.split()) in " ".join(out.split())
    assert not [line for line in out.splitlines() if line.startswith("  :")]  # why is a column, and stands once

    _, out, _ = trajstore(
        "analyze", store, "many", "law", "--metric", "train_loss", "--metric", "parameters", "--step", "5"
    )
    assert "equal law of forward and backward: 20 seeds" in out
    assert len([line for line in out.splitlines() if line.endswith("no")]) == 2


def test_contraction_is_summarised(store, trajstore):
    code, out, _ = trajstore("analyze", store, "quadratic", "contraction", "--pairs", "20", "--order", "backward")
    assert code == 0
    assert "factors of 20 pairs of backward iterates under one batch; every map contracts by 0.9" in out
    assert "parameters" in out
    assert "0.9 [0.9, 0.9]" in out
    code, out, _ = trajstore("analyze", store, "many", "contraction")
    assert code == 0
    assert "factors of 100 pairs of forward iterates" in out
    assert "along forward iterates: 20 steps are too few for an exponent" in out


def test_json_says_of_what_and_how_sure(store, trajstore):
    _, out, _ = trajstore("analyze", store, "quadratic", "convergence", "--json")
    (told,) = json.loads(out)
    assert (told["metric"], told["window"], told["level"]) == ("parameters", 120, 0.95)
    assert len(told["rows"]) == 6
    assert {"order", "seed", "verdict", "why", "rate", "rate_low", "rate_high"} <= set(told["rows"][0])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["quadratic", "convergance"], "no analysis 'convergance'; did you mean 'convergence'?"),
        (["quadratic", "law", "--window", "50"], "law has no --window"),
        (["quadratic", "law", "--kind", "tail"], "law has no --kind"),
        (["quadratic", "variance", "--metric", "a", "--metric", "b"], "variance takes one --metric"),
        (["quadratic", "variance", "--metric", "train_los"], "did you mean 'train_loss'?"),
        (["quadratic", "variance", "--kind", "tale"], "no variance 'tale'; did you mean 'tail'?"),
        (["quadratic", "convergence", "--window", "9"], "this statistic needs at least 40 steps"),
        (["quadratic", "law"], "2 seeds are too few to compare laws"),
        (["many", "resets"], "begins a new leg at a recorded step"),
        (["absent", "variance"], "absent"),
    ],
)
def test_what_cannot_be_asked_is_one_clear_line(store, trajstore, arguments, told):
    code, out, err = trajstore("analyze", store, *arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1


def test_problems_of_ones_own_compute_again(trajstore, tmp_path):
    (tmp_path / "myown.py").write_text(
        "import torch, trajstore as ts\n"
        "def problem():\n"
        "    x = torch.linspace(-1, 1, 8)[:, None]\n"
        "    return ts.ModuleProblem(lambda: torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, train=(x, 2 * x))\n"
    )
    assert trajstore("record", "myown:problem", "--store", "s.zarr", "--steps", "100", "--set", "operator.lr=0.1",
                     "--set", "operator.family=sgd")[0] == 0  # fmt: skip
    sys.path[:] = [folder for folder in sys.path if folder != str(tmp_path)]
    forget("myown")
    code, out, err = trajstore("analyze", "s.zarr", "problem", "convergence", "--metric", "outputs")
    assert (code, err) == (0, "")
    assert out.startswith("point or distribution: outputs, 50 recorded steps, 51 to 100")
