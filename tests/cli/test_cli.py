"""The command line, as its users call it: results, and one clear line for everything that is wrong."""

from __future__ import annotations

import csv
import errno
import gc
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import duckdb
import pytest
import torch
from torch import nn
from trajstore.cli.options import parse_seeds, parse_settings, parse_size

import trajstore as ts
from tests.tools.waiting import HANGS, until
from trajstore.errors import ConfigurationError
from trajstore.storage.places.durable import DurableStore

SMALL = ["--seeds", "0-1", "--steps", "6", "--set", "problem.width=4", "--set", "problem.points=11"]


def test_an_adaptive_recording_with_a_dense_tail_can_be_analysed(trajstore):
    adaptive = ["--adaptive", "train_loss=1e-3", "--dense-tail", "60"]
    asked = ["record", "quadratic", "--steps", "300", "--seeds", "0", "--orders", "forward,backward", *adaptive]
    code, out, err = trajstore(*asked, "--dry-run")
    assert (code, err) == (0, "")
    assert "operator applications  at most 45,450" in out
    assert trajstore(*asked, "--store", "s.zarr")[0] == 0
    assert "to know train_loss to 0.001, and the last 60 of each leg" in trajstore("info", "s.zarr", "quadratic")[1]
    code, out, err = trajstore("analyze", "s.zarr", "quadratic", "convergence", "--json")
    assert (code, err) == (0, "")
    assert '"verdict"' in out  # over the tail
    code, _, err = trajstore("analyze", "s.zarr", "quadratic", "variance", "--metric", "train_loss", "--window", "150")
    assert code == 2
    assert "the longest even window is" in err
    assert trajstore(*asked, "--store", "s.zarr", "--resume")[0] == 0
    code, _, err = trajstore(*asked[:-2], "--store", "s.zarr", "--resume")
    assert code != 0
    assert "record.dense_tail: 60 / None" in err


def test_a_read_that_fails_while_an_experiment_is_declared_is_told_in_one_line(trajstore, monkeypatch, capsys):
    get, reads = DurableStore.get, 0

    async def failing(store: DurableStore, key: str, *more: Any, **named: Any) -> Any:
        nonlocal reads
        reads += key == "zarr.json"
        if reads == 4:  # when Zarr has made ready what it is to write, and not begun
            raise OSError(errno.EIO, os.strerror(errno.EIO), key)
        return await get(store, key, *more, **named)

    monkeypatch.setattr(DurableStore, "get", failing)
    code, _, err = trajstore("record", "quadratic", "--steps", "3", "--seeds", "0", "--store", "s.zarr")
    gc.collect()
    assert code == 1
    assert (err + capsys.readouterr().err).splitlines() == ["trajstore: Input/output error: zarr.json"]


def test_a_session_from_recording_to_the_figure(trajstore):
    code, out, err = trajstore("record", "fig4", "--store", "runs.zarr", "--name", "mine", *SMALL)
    assert (code, err) == (0, "")
    assert out.startswith("mine: 4 slabs complete")

    code, out, _ = trajstore("ls", "runs.zarr", "--json")
    (row,) = json.loads(out)
    assert (row["experiment"], row["slabs"], row["complete"], row["steps"]) == ("mine", 4, 4, 6)
    code, out, _ = trajstore("ls", "runs.zarr")
    assert "forward, backward" in out

    code, out, _ = trajstore("info", "runs.zarr", "mine", "--json")
    told = json.loads(out)
    assert told["config"]["problem"]["width"] == 4
    assert len(told["slabs"]) == 4
    assert told["raw_bytes"] == 4 * 7 * (4 * 2 + 2 * (4 * 5) + 5) * 4
    code, out, _ = trajstore("info", "runs.zarr", "mine")
    assert "reference engine, one chain at a time (little work)" in out
    assert "mean over 11 examples" in out
    assert trajstore("info", "runs.zarr")[1] == trajstore("ls", "runs.zarr")[1]

    query = 'SELECT "order", count(*) AS n FROM metrics GROUP BY ALL ORDER BY ALL'
    code, out, _ = trajstore("sql", "runs.zarr", query, "--json")
    assert json.loads(out) == [{"order": "backward", "n": 14}, {"order": "forward", "n": 14}]
    code, out, _ = trajstore("sql", "runs.zarr", query, "--csv")
    assert list(csv.reader(io.StringIO(out))) == [["order", "n"], ["backward", "14"], ["forward", "14"]]
    code, out, _ = trajstore("sql", "runs.zarr", query)
    assert out.splitlines()[2:] == ["backward  14", "forward   14"]
    code, out, _ = trajstore("sql", "runs.zarr", query, "--parquet", "answer.parquet")
    assert (code, out.strip()) == (0, "answer.parquet")
    assert duckdb.read_parquet("answer.parquet").fetchall() == [("backward", 14), ("forward", 14)]
    code, out, _ = trajstore("sql", "runs.zarr", "--init")
    assert (code, Path(out.strip()).name) == (0, "index.sql")

    for ending in ("png", "pdf", "svg"):
        code, out, _ = trajstore("plot", "runs.zarr", "mine", "learning-curves", "-o", f"figure.{ending}")
        assert (code, out.strip()) == (0, f"figure.{ending}")
        assert Path(f"figure.{ending}").stat().st_size > 5000
    chosen = ["--metric", "test_loss", "--metric", "train_loss", "--seed", "0-1", "--order", "backward"]
    assert trajstore("plot", "runs.zarr", "mine", "learning-curves", *chosen, "-o", "chosen.png")[0] == 0
    assert trajstore("plot", "runs.zarr", "mine", "rolling-variance", "--window", "4", "-o", "variance.pdf")[0] == 0

    code, out, err = trajstore("record", "fig4", "--store", "runs.zarr", "--name", "mine", *SMALL, "--resume")
    assert (code, err) == (0, "")


def test_info_shows_where_a_run_diverged(trajstore):
    command = ["record", "quadratic", "--store", "s.zarr", "--steps", "40", "--seeds", "0", "--set", "operator.lr=1e30"]
    assert trajstore(*command)[0] == 0
    _, out, _ = trajstore("info", "s.zarr", "quadratic")
    (heading,) = (line for line in out.splitlines() if line.startswith("order"))
    assert heading.endswith("diverged at")
    (forward,) = (line for line in out.splitlines() if line.startswith("forward"))
    assert int(forward.split()[-1]) > 1


def test_info_does_not_claim_to_know_what_a_loop_measured(trajstore):
    with ts.record("s.zarr", "mine", nn.Linear(2, 1), snapshots=ts.every(2), steps=40, durability="none") as rec:
        for n in range(1, 5):
            rec.step(loss=1 / n)
        rec.log(1, sharpness=2.0)
    _, out, _ = trajstore("info", "s.zarr", "mine")
    assert "loss: as the loop gave it\n" in out
    assert "sharpness: as the loop gave it, after the step was recorded\n" in out
    assert "start_distance: distance of the parameters to θ₀\n" in out
    assert "steps        40, states stored at 3 of them\n" in out


def test_presets(trajstore):
    code, out, _ = trajstore("presets")
    assert code == 0
    assert {"fig4", "fig5", "fig6", "quadratic", "two-constants"} <= {line.split()[0] for line in out.splitlines()}
    _, out, _ = trajstore("presets", "--json")
    assert {t["name"]: t["steps"] for t in json.loads(out)}["fig4"] == 1400
    _, out, _ = trajstore("presets", "quadratic")
    Path("mine.toml").write_text(out)
    assert trajstore("record", "mine.toml", "--steps", "3", "--store", "s.zarr")[0] == 0
    assert ts.open("s.zarr")["mine"].schema.steps == 3


def test_options_override_the_preset(trajstore):
    arguments = ["--orders", "backward/3,forward", "--init-seed", "4", "--record-every", "2", "--snapshot-every", "4"]
    settings = ["--set", "operator.family=adam", "--set", "record.codec=portable", "--set", "operator.lr=1e-2"]
    code, _, err = trajstore("record", "fig5", "--store", "s.zarr", *SMALL, *arguments, *settings)
    assert (code, err) == (0, "")
    config = ts.open("s.zarr")["fig5"].config
    assert config["orders"] == ["backward/3", "forward"]
    assert config["init_seed"] == 4
    assert config["record"] == {
        "every": 2, "log_until": None, "steps": None, "adaptive": None, "tolerance": None, "snapshot_every": 4,
        "optimizer_state": False, "sketch": 128, "codec": "portable",
    }  # fmt: skip
    assert (config["operator"]["family"], config["operator"]["lr"]) == ("adam", 0.01)


def test_a_dry_run_says_what_it_takes_and_writes_nothing(trajstore):
    code, out, _ = trajstore("record", "fig4", *SMALL, "--dry-run", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["applications"] == 2 * (6 + 21)
    assert told["exact"] is True
    code, out, _ = trajstore("record", "fig4", *SMALL, "--orders", "backward/2?train_loss", "--dry-run")
    assert "at most 42" in out
    assert list(Path().iterdir()) == []


def test_your_own_functions(trajstore):
    Path("mine.py").write_text(
        "import torch, trajstore as ts\nfrom torch import nn\n"
        "def problem():\n"
        "    x = torch.linspace(-1, 1, 9)[:, None]\n"
        "    return ts.ModuleProblem(lambda: nn.Linear(1, 1), nn.functional.mse_loss, (x, x), batch_size=2)\n"
        "def experiment():\n"
        "    return ts.Experiment.preset('quadratic', {'steps': 4, 'name': 'theirs'})\n"
    )
    code, _, err = trajstore(
        "record", "mine:problem", "--store", "s.zarr", "--steps", "3", "--set", "operator.family=sgd",
        "--set", "operator.lr=0.1",
    )  # fmt: skip
    assert (code, err) == (0, "")
    code, _, err = trajstore("record", "mine:experiment", "--store", "s.zarr", "--seeds", "0")
    assert (code, err) == (0, "")
    assert list(ts.open("s.zarr")) == ["problem", "theirs"]


BAD = [
    (["record", "fig44", "--store", "s"], "unknown preset 'fig44'; did you mean 'fig4'?"),
    (["record", "nothing.toml", "--store", "s"], "cannot read nothing.toml"),
    (["record", "no_module:f", "--store", "s"], "no module 'no_module'"),
    (["record", "fig4"], "--store PATH"),
    (["record", "fig4", "--store", "s", "--orders", "forward,bakward"], "order 'bakward': 'bakward' at character 1"),
    (["record", "fig4", "--store", "s", "--orders", "backward/9?train_acc"], "no metric 'train_acc'"),
    (["record", "fig4", "--store", "s", "--orders", "backward+backward@1400"], "the last step is 1400"),
    (["record", "fig4", "--store", "s", "--steps", "-3"], "steps is -3"),
    (["record", "fig4", "--store", "s", "--steps", "many"], "Invalid value for '--steps'"),
    (["record", "fig4", "--store", "s", "--seeds", "a-b"], "'a-b' is not a seed or a range"),
    (["record", "fig4", "--store", "s", "--seeds", "4-0"], "'4-0' is not a seed or a range"),
    (["record", "fig4", "--store", "s", "--seeds", ""], "'' is not a seed or a range"),
    (["record", "fig4", "--store", "s", "--seeds", "1,1"], "each once"),
    (["record", "fig4", "--store", "s", "--init-seed", "-1"], "seed -1"),
    (["record", "fig4", "--store", "s", "--record-every", "0"], "every is 0"),
    (["record", "fig4", "--store", "s", "--name", "../up"], "experiment name '../up'"),
    (["record", "fig4", "--store", "s", "--name", "a/b"], "experiment name 'a/b'"),
    (["record", "fig4", "--store", "s", "--name", ".."], "experiment name '..'"),
    (["record", "fig4", "--store", "s", "--set", "operator.lr"], "write FIELD=VALUE"),
    (["record", "fig4", "--store", "s", "--set", "operator.rate=1"], "no field 'rate'"),
    (["record", "fig4", "--store", "s", "--set", "operator.lr=fast"], "operator sgd: lr is 'fast'"),
    (["record", "fig4", "--store", "s", "--engine", "warp"], "'warp' is not one of"),
    (["record", "fig4", "--store", "s", "--device", "tpu"], "'tpu' is not one of"),
    (["record", "fig4", "--store", "s", "--no-such"], "No such option"),
    (["record"], "Missing argument"),
    (["record", "fig4", "--store", "a-file"], "is a file"),
    (["record", "fig4", "--store", "a-file/below"], "a-file is a file; a store is a folder"),
    (["record", "quadratic", "--store", "/proc/store"], "cannot write to"),
    (["record", "fig4", "--store", "."], "a folder with other contents"),
    (["ls", "nowhere"], "there is no store at nowhere"),
    (["ls", "a-file"], "not a trajstore"),
    (["ls", "."], "not a trajstore"),
    (["info", "s.zarr", "nothing"], "no experiment 'nothing'"),
    (["info", "s.zarr", "../s.zarr"], "no experiment '../s.zarr'"),
    (["plot", "s.zarr", "quadratic", "fig", "-o", "x.png"], "no figure 'fig'"),
    (["plot", "s.zarr", "quadratic", "learning-curves", "-o", "x.gif"], "the ending says the format"),
    (["plot", "s.zarr", "quadratic", "learning-curves", "-o", "no/x.png"], "there is no folder no"),
    (["plot", "s.zarr", "quadratic", "learning-curves"], "Missing option"),
    (["plot", "s.zarr", "quadratic", "law", "--window", "9", "-o", "x.png"], "takes no option 'window'; it takes"),
    (["plot", "s.zarr", "quadratic", "law", "--metric", "a", "--metric", "b", "-o", "x.png"], "takes one metric"),
    (["plot", "s.zarr", "quadratic", "distances", "--metric", "tran_loss", "-o", "x.png"], "mean 'train_loss'?"),
    (["plot", "s.zarr", "quadratic", "reset", "-o", "x.png"], "begins a new leg at a recorded step; record one"),
    (["plot", "s.zarr", "quadratic", "distances", "--seed", "9", "-o", "x.png"], "no seed 9; there is 0"),
    (["plot", "s.zarr", "quadratic", "distances", "--seed", "a", "-o", "x.png"], "--seed 'a': 'a' is not a seed"),
    (["plot", "s.zarr", "quadratic", "plane", "--order", "bakward", "-o", "x.png"], "did you mean 'backward'?"),
    (["plot", "s.zarr", "quadratic", "rolling-variance", "--window", "2", "-o", "x.png"], "'--window'"),
    (["sql", "s.zarr", "SELEC 1"], "Parser Error"),
    (["sql", "s.zarr", "DROP VIEW metrics"], "only SELECT"),
    (["sql", "s.zarr", "SELECT * FROM read_text('a-file')"], "'read_text' cannot be used here"),
    (["sql", "s.zarr", "SELECT * FROM 'a-file.csv'"], "Permission Error"),
    (["sql", "s.zarr", "SELECT 1", "--json", "--csv"], "one of --json, --csv and --parquet"),
    (["sql", "s.zarr", "SELECT 1", "--csv", "--parquet", "a.parquet"], "one of --json, --csv and --parquet"),
    (["sql", "s.zarr", "SELECT 1", "--force"], "--parquet FILE"),
    (["sql", "s.zarr", "SELECT 1", "--init"], "no query"),
    (["sql", "s.zarr"], "give a query"),
    (["sql", "s.zarr", "FROM tail_variance('x', 'y')"], "no experiment 'x'"),
    (["presets", "fig44"], "unknown preset"),
    (["frobnicate"], "No such command"),
    (["record", "no-colon:", "--store", "s"], "not of the form module:function"),
    (["record", ":f", "--store", "s"], "not of the form module:function"),
    (["record", "..a:b", "--store", "s"], "not of the form module:function"),
    (["record", "math:pi", "--store", "s", "--steps", "1"], "is a float, not a function"),
    (["record", "json:loads", "--store", "s", "--steps", "1"], "'json:loads' raised TypeError"),
    (["record", "fig4", "--store", "s", "--set", "operator=5"], "operator: 5 does not say which"),
    (["record", "fig4", "--store", "s", "--set", "operator.schedule=cosine"], "schedule cosine needs total"),
    (["record", "fig4", "--store", "s", "--name", "zarr.json"], "experiment name 'zarr.json'"),
    (["record", "fig4", "--steps", "99999999999999999999", "--dry-run"], "steps is 99999999999999999999"),
    (["record", "quadratic", "--store", "s", "--set", "problem.rotation_seed=-1"], "seed -1 must be"),
    (["record", "quadratic", "--store", "s.zarr", "--steps", "6", "--seeds", "0", "--dry-run"], "steps: 5 / 6"),
    (["sql", "s.zarr", "SELECT CAST('a' AS INT)"], "Conversion Error"),
    (["record", "quadratic", "--store", "s.zarr", "--steps", "5", "--seeds", "0"], "continue it with --resume"),
    (["record", "quadratic", "--store", "s.zarr", "--steps", "6", "--seeds", "0", "--resume"], "steps: 5 / 6"),
    (["record", "fig4", "--store", "s", "--memory", "4 apples"], "--memory '4 apples' is not a size"),
    (["record", "fig4", "--store", "s", "--memory", "500MB", "--workers", "0"], "one process would take about 1."),
    (["record", "fig4", "--store", "s", "--memory", "2GB", "--workers", "2"], "2 worker processes would take about 3"),
    (["record", "fig4", "--store", "s", "--workers", "1", "--scheduler", "tcp://127.0.0.1:1"], "not both"),
    (["record", "fig4", "--store", "s", "--adaptive", "test_loss"], "write METRIC=TOLERANCE"),
    (["record", "fig4", "--store", "s", "--adaptive", "tst_loss=0.1"], "did you mean 'test_loss'"),
    (["record", "fig4", "--store", "s", "--adaptive", "test_loss=-1"], "tolerance is -1.0"),
    (["record", "fig4", "--store", "s", "--dense-tail", "20"], "dense_tail is for adaptive grids"),
    (["demo", "-o", "demo.gif"], "the ending says the format"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_a_wrong_request_gets_one_clear_line_and_writes_nothing(trajstore, tmp_path, arguments, says):
    (tmp_path / "a-file").write_text("x")
    if "s.zarr" in arguments:
        ts.run(ts.Experiment.preset("quadratic", {"steps": 5, "seeds": [0]}), tmp_path / "s.zarr")
        ts.open(tmp_path / "s.zarr").sql("SELECT 1")
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.suffix != ".lock" and f.name != "locks"}
    code, out, err = trajstore(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("trajstore: ")
    assert err.count("\n") == 1
    assert says in err
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.suffix != ".lock" and f.name != "locks"} == before


def test_without_arguments_it_shows_its_help(trajstore):
    code, out, err = trajstore()
    assert code == 2
    assert "Usage: trajstore" in out + err


@pytest.mark.parametrize(("text", "seeds"), [("3", [3]), ("0-2", [0, 1, 2]), ("0,4-5, 9", [0, 4, 5, 9])])
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(("text", "size"), [("4GB", 4 * 10**9), ("1.5 GiB", 3 * 2**29), ("7", 7), ("10kb", 10_000)])
def test_sizes(text, size):
    assert parse_size(text) == size


def test_settings():
    assert parse_settings(["a.b=1", "a.c=[1, 2]", "d=text", 'e="7"']) == {
        "a": {"b": 1, "c": [1, 2]}, "d": "text", "e": "7"
    }  # fmt: skip
    with pytest.raises(ConfigurationError, match="set to a value already"):
        parse_settings(["a=1", "a.b=2"])


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_is_one_line_and_what_was_committed_stays(tmp_path, workers):
    command = [sys.executable, "-m", "trajstore.cli.main", "record", "fig4", "--store", "s.zarr", "--steps", "5000",
               "--set", "problem.width=4", "--workers", str(workers)]  # fmt: skip
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **pipes)
    document = tmp_path / "s.zarr" / "fig4" / "zarr.json"
    until(lambda: document.exists() and "began" in document.read_text(), "recording begins")
    time.sleep(3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: every process of the group hears it
    out, err = process.communicate(timeout=HANGS)
    assert (process.returncode, out) == (130, "")
    told = "interrupted; what was committed is kept; the same command continues (`record` with --resume)"
    assert err == f"trajstore: {told}\n"
    assert not all(s.complete for s in ts.open(tmp_path / "s.zarr")["fig4"].slabs())


@pytest.mark.parametrize(
    ("command", "unit", "says"),
    [
        (["record", "quadratic", "--store", "s.zarr", "--steps", "80"], "operator applications", "10 slabs complete"),
        (["import", "s.zarr", "mine", "1.pt", "2.pt", "--pattern", "{step}.pt", "--seed", "0"], "files", "2 files imp"),
    ],
    ids=["record", "import"],
)
def test_progress_is_shown_on_a_terminal_only_and_on_standard_error(tmp_path, command, unit, says):
    for n in (1, 2):
        torch.save({"w": torch.ones(n)[:1]}, tmp_path / f"{n}.pt")
    command = [sys.executable, "-m", "trajstore.cli.main", *command]
    terminal, end = pty.openpty()
    process = subprocess.Popen(command, cwd=tmp_path, stderr=end, stdout=subprocess.PIPE, text=True)
    os.close(end)
    shown = b""
    try:
        while piece := os.read(terminal, 4096):
            shown += piece
    except OSError:
        pass  # the other end has closed
    out, _ = process.communicate(timeout=HANGS)
    os.close(terminal)
    assert process.returncode == 0
    assert out.count("\n") == 1
    assert says in out
    assert unit in shown.decode()


def test_a_closed_pipe_is_no_error(tmp_path):
    ts.run(ts.Experiment.preset("quadratic", {"steps": 300, "seeds": [0]}), tmp_path / "s.zarr")
    shell = f"{sys.executable} -m trajstore.cli.main sql s.zarr 'SELECT * FROM metrics, range(200)' | head -1"
    told = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True)
    assert told.stderr == ""
    assert len(told.stdout.splitlines()) == 1
