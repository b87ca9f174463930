"""Output that holds less than Unicode: everything is written in what it holds, and nothing ends in a traceback."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from trajstore.cli import writing

import trajstore as ts
from tests.conftest import SMALL_NET

PROGRAM = str(Path(sys.executable).with_name("trajstore"))
COMMANDS = (
    ("ls", "s.zarr"),
    ("info", "s.zarr", "net"),
    ("record", "--help"),
    ("record", "s.toml", "--dry-run"),
    ("claims", "s.zarr"),
    ("sql", "s.zarr", "SELECT 'θ₀' AS \"‖θ‖\" FROM runs LIMIT 1"),
    ("sql", "s.zarr", "SELECT θ"),
    ("verify", "s.zarr"),
    ("presets",),
    ("presets", "--json"),
    ("ls", "θ.zarr"),
    ("record", "s.toml", "--set", "operator.lr=0.1", "--store", "s.zarr"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("outputs")
    (made / "s.toml").write_text(
        'name = "net"\nsteps = 12\nseeds = [0, 1]\noperator = {family = "sgd", lr = 0.05}\n'
        'problem = {family = "regression", width = 8, depth = 2, points = 21}\n'
    )
    ts.run(ts.Experiment.of(SMALL_NET), made / "s.zarr", engine="reference")
    return made


def run_all(encoding: str) -> list[tuple[int, str, str]]:
    """Run the commands in one process, whose output has the encoding: (exit code, output, errors) of each."""
    told = []
    for command in COMMANDS:
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2))
        kept = sys.argv, sys.stdout, sys.stderr
        sys.argv, sys.stdout, sys.stderr = [PROGRAM, *command], out, err
        try:
            from trajstore.cli.main import main

            main()
        except SystemExit as ended:
            code = ended.code
        finally:
            sys.argv, sys.stdout, sys.stderr = kept
        told.append((code, *(stream.buffer.getvalue().decode(encoding) for stream in (out, err))))
    return told


@pytest.fixture(scope="module")
def in_utf8(folder: Path) -> list[tuple[int, str, str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return run_all("utf-8")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_every_command_writes_what_the_output_holds(folder, in_utf8, monkeypatch, encoding):
    monkeypatch.chdir(folder)
    expected, found = in_utf8, run_all(encoding)
    for command, (code, out, err), (full_code, full_out, full_err) in zip(COMMANDS, found, expected, strict=True):
        assert code == full_code, command
        if command[0] != "record":  # seconds differ
            assert (out + err).count("\n") == (full_out + full_err).count("\n"), command
        assert "\\u" not in err
    help_text = found[COMMANDS.index(("record", "--help"))][1]
    assert "One start theta0 for all seeds." in help_text
    table = found[0][1].splitlines()
    assert set(table[1]) == {"-", " "}
    assert list(map(len, table)) == list(map(len, expected[0][1].splitlines()))
    assert json.loads(found[COMMANDS.index(("presets", "--json"))][1]) == json.loads(
        expected[COMMANDS.index(("presets", "--json"))][1]
    )


def test_a_process_of_its_own_ends_well(folder):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([PROGRAM, "ls", "s.zarr"], cwd=folder, env=environment, capture_output=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.splitlines()[1].startswith(b"----------  ----------")


def test_signs_are_spelled_out(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr("sys.stdout", stream)
    writing.spell_out()
    print("‖θ₀ − θₙ‖ ≤ 10⁻⁴ · x², Σ é … ─ \N{NO-BREAK SPACE}漢\udcff")  # noqa: T201
    assert stream.buffer.getvalue().decode("ascii") == (
        "|theta0 - thetan| <= 10^-4 . x^2, Sigma e ... -  \\u6f22\\udcff\n"
    )
    assert writing.as_written("─θ") == "-theta"
    assert not writing.holds(sys.stdout, "θ")


def test_columns_that_become_longer_stay_aligned(monkeypatch):
    from trajstore.cli.console import print_table

    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", write_through=True)
    monkeypatch.setattr("sys.stdout", stream)
    writing.spell_out()
    print_table(["θ", "x"], [["a", 1], ["θθ", 22]])
    assert stream.buffer.getvalue().decode("latin-1") == (
        "theta        x\n----------  --\na            1\nthetatheta  22\n"
    )


def test_a_refusal_names_what_was_written_and_not_what_follows_from_it(trajstore, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for change, told in (
        ("operator.lr=0.1", "operator.lr: 0.05 / 0.1"),
        ("problem.width=9", "problem.width: 8 / 9"),
        ("problem.depth=40", "problem.depth: 2 / 40"),
    ):
        code, _, err = trajstore("record", str(folder / "s.toml"), "--set", change, "--store", str(folder / "s.zarr"))
        assert code == 2
        assert f"differs in {told} (stored / requested)" in err
        assert len(err) < 250
