"""A preset that is several experiments is recorded, drawn and examined by one name."""

from __future__ import annotations

import json

import trajstore as ts
from tests.recording.test_resume import contents, stop_after
from trajstore.recording import running

TINY = ("--scale", "small", "--seeds", "0-2", "--steps", "8", "--record-every", "2", "--engine", "reference",
        "--set", "problem.width=4", "--set", "problem.batch_size=12", "--set", "problem.images.train=24",
        "--set", "problem.images.test=10")  # fmt: skip
VARIANTS = ["large", "large-slow", "small-batch", "lambda-0.5", "lambda-1", "lambda-2", "lambda-4"]


def test_a_preset_of_several_experiments(trajstore, tmp_path):
    code, out, err = trajstore("record", "fig14", *TINY, "--store", "s.zarr", "--name", "mine", "--json")
    assert (code, err) == (0, "")
    assert [told["experiment"] for told in json.loads(out)] == [f"mine.{variant}" for variant in VARIANTS]
    code, out, err = trajstore("plot", "s.zarr", "mine", "fig15", "-o", "f.png")
    assert (code, out, err) == (0, "f.png\n", "")
    assert (tmp_path / "f.png").stat().st_size > 10_000
    code, out, _ = trajstore("claims", "s.zarr", "mine.large", "--claim", "stronger", "--json")
    rows = json.loads(out)
    assert {row["experiment"] for row in rows} == {"mine"}
    assert rows[0]["about"] == "lambda-1 against lambda-0.5, train_loss"
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
    code, out, _ = trajstore("record", "fig14.lambda-2", *TINY, "--store", "s.zarr")
    assert out.startswith("fig14-small.lambda-2: 3 slabs complete")
    half = ts.open(tmp_path / "s.zarr")["mine.small-batch"].config  # follows what is changed for all
    assert (half["steps"], half["problem"]["batch_size"], half["operator"]["lr"]) == (16, 6, 0.01)
    assert (half["record"]["every"], half["record"]["snapshot_every"]) == (4, None)
    for arguments, says in (
        (
            ("record", "fig16", *TINY, "--set", "problem.batch_size=13", "--store", "t.zarr"),
            "fig16.small-batch: problem: batch_size is 13, and this variant divides it by 3",
        ),
        (
            ("record", "fig14", *TINY, "--set", "operator=adam", "--store", "t.zarr"),
            "fig14.large-slow: operator is 'adam', and this variant divides it by",
        ),
        (
            ("plot", "s.zarr", "mine", "learning-curves", "-o", "g.png"),
            "is of one experiment; choose a variant: lambda",
        ),
        (
            ("plot", "s.zarr", "mine.large", "fig14", "-o", "g.png"),
            "compares the variants of an experiment; this is one",
        ),
        (("plot", "s.zarr", "mine", "fig99", "-o", "g.png"), "no figure 'fig99'; did you mean 'fig9'?"),
        (
            ("plot", "s.zarr", "mine.large", "fig4", "-o", "g.png", "--metric", "loss"),
            "takes no option 'metric'; it takes",
        ),
        (("plot", "s.zarr", "yours", "fig14", "-o", "g.png"), "no experiment 'yours'"),
        (("record", "fig14.larg", "--store", "s.zarr"), "unknown preset 'fig14.larg'; did you mean 'fig14.large'?"),
        (
            ("record", "mine.toml", "--scale", "small", "--store", "s.zarr"),
            "--scale applies to presets, and mine.toml is not one",
        ),
        (("record", "quadratic", "--scale", "small", "--store", "s.zarr"), "preset 'quadratic' has no small scale"),
        (("record", "fig3", "--steps", "500", "--store", "s.zarr"), "the last step is 500"),
    ):
        code, out, err = trajstore(*arguments)
        assert (code, out) == (2, "")
        assert says in err
        assert err.count("\n") == 1


def test_an_interrupted_preset_goes_on_where_it_stopped(trajstore, tmp_path, monkeypatch):
    assert trajstore("record", "fig14", *TINY, "--store", "whole.zarr")[0] == 0
    begun, really = [], running.run

    def interrupted(experiment, store, *, progress, **how):
        begun.append(experiment.name)
        return really(experiment, store, progress=stop_after(9) if len(begun) == 3 else progress, **how)

    command = ("record", "fig14", *TINY, "--store", "s.zarr", "--workers", "0")
    with monkeypatch.context() as patch:
        patch.setattr(running, "run", interrupted)
        code, out, err = trajstore(*command)
    assert code == 130
    assert out.count("complete") == 2
    assert "--resume" in err
    assert begun == [f"fig14-small.{variant}" for variant in VARIANTS[:3]]
    assert contents(tmp_path / "s.zarr") != contents(tmp_path / "whole.zarr")
    code, out, err = trajstore(*command, "--resume")
    assert (code, err) == (0, "")
    assert out.count("3 slabs complete") == 7
    assert contents(tmp_path / "s.zarr") == contents(tmp_path / "whole.zarr")


def test_presets_are_listed_and_printed(trajstore):
    code, out, _ = trajstore("presets")
    names = [line.split()[0] for line in out.splitlines()[2:]]
    assert code == 0
    assert names == [*(f"fig{n}" for n in range(2, 20)), "quadratic", "two-constants"]
    assert "[small]" in trajstore("presets", "fig3")[1]
    tables = json.loads(trajstore("presets", "fig16", "--json")[1])
    assert [table["name"] for table in tables] == [f"fig16.{variant}" for variant in VARIANTS]
    assert json.loads(trajstore("presets", "fig3", "--json")[1])["name"] == "fig3"
