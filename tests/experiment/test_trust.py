"""What a store names is neither imported nor called, unless the user said so or recorded it here."""

from __future__ import annotations

import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import xarray as xr

import trajstore as ts
from tests.conftest import SMALL_NET, Record, forget
from tests.tools.hostile import Document, attributes_of, rewrite, strangers
from tests.tools.waiting import HANGS
from trajstore._common.cache import user_cache
from trajstore.errors import ConfigurationError, FormatError, UntrustedError
from trajstore.replay.compare import replay
from trajstore.replay.recipe import Recipe

Program = Callable[..., tuple[Any, str, str]]

OWN = """
from pathlib import Path
import trajstore as ts

Path({told!r}).write_text("imported")

def make(width=8):
    Path({told!r}).write_text(f"called with {{width}}")
    return ts.Experiment.of({net!r}).problem
"""


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's own, `canary`, that leaves this file when it is imported, and when it is called."""
    told, modules = tmp_path / "sang", tmp_path / "modules"
    modules.mkdir()
    (modules / "canary.py").write_text(OWN.format(told=str(told), net=SMALL_NET))
    monkeypatch.syspath_prepend(str(modules))
    return told


def names_canary(attributes: Document) -> None:
    attributes["config"]["problem"] = {
        "family": "factory", "function": "canary:make", "arguments": {"width": 7},
        "made": attributes["config"]["problem"],
    }  # fmt: skip


@pytest.fixture
def strange(canary: Path, record: Record) -> Path:
    """A store whose experiment names `canary:make`, and was not recorded by this user."""
    store = Path(str(record(SMALL_NET, seeds=[0]).store))
    rewrite(store, "net", names_canary)
    return store


def commands(store: Path, out: Path) -> Iterator[list[str]]:
    """Every command, on the experiment `net` of a store."""
    at = str(store)
    yield ["ls", at]
    yield ["ls", at, "--json"]
    yield ["info", at, "net"]
    yield ["info", at, "net", "--json"]
    yield ["sql", at, "SELECT * FROM runs, experiments"]
    yield ["sql", at, "--init"]
    for analysis in ("variance", "convergence", "resets", "law", "contraction"):
        yield ["analyze", at, "net", analysis]
    yield ["analyze", at, "net", "convergence", "--metric", "outputs"]
    yield ["claims", at]
    for metric in ("gradient_norm", "gradient_noise", "sharpness", "hessian_trace", "invariance_gap"):
        yield ["compute", metric, at, "net"]
    yield ["plot", at, "net", "learning-curves", "-o", str(out / "a.png")]
    yield ["plot", at, "net", "contraction", "-o", str(out / "b.png")]
    yield ["export", at, "net", "-o", str(out / "a.parquet")]
    yield ["export", at, "net", "-o", str(out / "a.safetensors"), "--order", "forward", "--seed", "0", "--step", "3"]
    yield ["export", at, "net", "-o", str(out / "arrays"), "--numpy"]
    yield ["copy", at, str(out / "copy.zarr")]
    yield ["merge", at, str(out / "other.zarr")]
    yield ["import", at, "net", str(out / "seed0" / "step1.pt"), "--pattern", "seed{seed}/step{step}.pt"]
    yield ["record", "quadratic", "--store", at, "--name", "net", "--steps", "5", "--resume"]
    yield ["record", "quadratic", "--store", at, "--name", "net", "--steps", "5", "--extend"]
    yield ["pack", at]
    yield ["pack", at, "--undo"]
    yield ["unlock", at]
    yield ["verify", at]
    yield ["verify", at, "--replay"]
    yield ["verify", at, "net", "--replay"]
    yield ["verify", at, "--repair"]
    yield ["rm", at, "net", "--yes"]


def test_no_command_imports_or_calls_what_a_store_names(
    strange: Path, canary: Path, trajstore: Program, tmp_path: Path
) -> None:
    from trajstore.cli.main import app

    asked = list(commands(strange, tmp_path))
    apart = {"demo", "presets", "doctor"}  # these take no store, or no more than its place
    assert {command.name for command in typer.main.get_command(app).commands.values()} <= {c[0] for c in asked} | apart  # type: ignore[attr-defined]
    for command in asked:
        code, _, err = trajstore(*command)
        assert code in (0, 1, 2), (command, err)
        assert not canary.exists(), command
        assert "canary" not in sys.modules, command
        if "--replay" in command or command[0] == "compute":
            assert code == 2, command
            assert "call canary:make(width=7)" in err
            assert "--trust" in err


REVIVING: dict[str, Callable[[ts.StoredExperiment], object]] = {
    "replay": lambda stored: list(replay(stored)),
    "recipe": Recipe.of,
    "recipe of a dataset": lambda stored: Recipe.of(stored.dataset()),
    "recipe of xarray's engine": lambda stored: Recipe.of(
        xr.open_dataset(str(stored.store), engine="trajstore", group=stored.name)
    ),
    "compute": lambda stored: ts.analysis.compute(stored, "gradient_norm"),
    "contraction": lambda stored: ts.analysis.contraction(stored),
    "lyapunov": lambda stored: ts.analysis.lyapunov(stored.dataset(), 0),
    "outputs": lambda stored: ts.analysis.outputs(stored.dataset()),
    "of a dataset that travelled": lambda stored: Recipe.of(_travelled(stored.dataset())),
}


def _travelled(ds: xr.Dataset) -> xr.Dataset:
    """A dataset as it comes out of a file or from another process: nothing but its values and attributes."""
    return xr.Dataset(attrs=dict(ds.attrs))


@pytest.mark.parametrize("name", REVIVING)
def test_no_function_does_either(name: str, strange: Path, canary: Path) -> None:
    with pytest.raises(UntrustedError, match=r"call canary:make\(width=7\).*--trust.*trust=True"):
        REVIVING[name](ts.open(strange)["net"])
    assert not canary.exists()


def test_trust_calls_exactly_what_was_named(strange: Path, canary: Path) -> None:
    Recipe.of(ts.open(strange, trust=True)["net"].dataset())
    assert canary.read_text() == "called with 7"


def test_trust_is_an_option_of_every_command_that_computes(strange: Path, canary: Path, trajstore: Program) -> None:
    _, _, err = trajstore("verify", str(strange), "net", "--replay", "--trust")
    assert canary.read_text() == "called with 7", err
    for command in (
        ["compute", "gradient_norm", str(strange), "net"],
        ["analyze", str(strange), "net", "contraction"],
        ["claims", str(strange), "--claim", "lemma"],
        ["plot", str(strange), "net", "contraction", "-o", "c.png"],
    ):
        assert "trust" not in (trajstore(*command, "--trust")[2])


def test_claims_say_what_would_be_called_and_examine_the_rest(strange: Path, canary: Path, trajstore: Program) -> None:
    code, out, _ = trajstore("claims", str(strange), "--json")
    assert code == 0
    assert "call canary:make(width=7)" in out
    assert not canary.exists()


@pytest.fixture
def recorded(canary: Path, tmp_path: Path) -> Path:
    """A store that this user recorded, of `canary:make`."""
    store = tmp_path / "own.zarr"
    problem = {"family": "factory", "function": "canary:make", "arguments": {"width": 7}}
    ts.run(ts.Experiment.of({**SMALL_NET, "seeds": [0], "problem": problem}), store)
    forget("canary")
    canary.unlink()
    return store


def test_what_was_recorded_here_needs_no_trust_wherever_the_store_goes(
    recorded: Path, canary: Path, tmp_path: Path
) -> None:
    list(replay(ts.open(recorded)["net"]))
    assert canary.exists()
    shutil.move(recorded, tmp_path / "moved.zarr")
    list(replay(ts.open(tmp_path / "moved.zarr")["net"]))
    from trajstore.exchange.merge import merge

    merge(ts.open(tmp_path / "moved.zarr"), ts.Store(tmp_path / "merged.zarr"))
    list(replay(ts.open(tmp_path / "merged.zarr")["net"]))


def test_a_strangers_store_at_the_path_of_my_own_is_a_strangers(recorded: Path, canary: Path) -> None:
    strangers(recorded, "net")
    with pytest.raises(UntrustedError):
        list(replay(ts.open(recorded)["net"]))
    assert not canary.exists()


def test_other_arguments_than_mine_are_a_strangers(recorded: Path, canary: Path) -> None:
    def other(attributes: Document) -> None:
        attributes["config"]["problem"]["arguments"] = {"width": 1}

    rewrite(recorded, "net", other)
    with pytest.raises(UntrustedError, match=r"canary:make\(width=1\)"):
        list(replay(ts.open(recorded)["net"]))
    assert not canary.exists()


def test_a_module_of_the_same_name_elsewhere_is_a_strangers(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unpacked").mkdir()
    (tmp_path / "unpacked" / "canary.py").write_text(f"open({str(tmp_path / 'other')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path / "unpacked"))
    with pytest.raises(UntrustedError):
        list(replay(ts.open(recorded)["net"]))
    assert not (tmp_path / "other").exists()


def test_without_its_memory_one_asks_again_and_resuming_remembers_again(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    with pytest.raises(UntrustedError):
        list(replay(ts.open(recorded)["net"]))
    problem = {"family": "factory", "function": "canary:make", "arguments": {"width": 7}}
    ts.run(ts.Experiment.of({**SMALL_NET, "seeds": [0], "problem": problem}), recorded, resume=True)
    assert list(replay(ts.open(recorded)["net"]))


def test_where_there_is_no_home_recording_and_computing_go_on(
    canary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    problem = {"family": "factory", "function": "canary:make", "arguments": {"width": 7}}
    ts.run(ts.Experiment.of({**SMALL_NET, "seeds": [0], "problem": problem}), tmp_path / "own.zarr")
    with pytest.raises(UntrustedError, match="was not recorded here"):
        list(replay(ts.open(tmp_path / "own.zarr")["net"]))
    with pytest.raises(OSError, match="XDG_CACHE_HOME"):
        user_cache()


def nobody(number: int) -> None:
    raise KeyError(f"getpwuid(): uid not found: {number}")


def test_a_store_says_of_no_folder_that_its_images_be_read(record: Record, tmp_path: Path) -> None:
    store = Path(str(record(SMALL_NET, seeds=[0]).store))
    images = {"family": "folder", "path": str(tmp_path), "train": None, "test": None, "size": None}

    def other(attributes: Document) -> None:
        attributes["config"]["problem"] = {"family": "mlp", "images": images}

    rewrite(store, "net", other)
    with pytest.raises(UntrustedError, match="read the images in"):
        Recipe.of(ts.open(store)["net"])


@pytest.mark.parametrize("family", ["os", "os.path", "../factory", "_module", "__init__", "factory:make", "Factory", 7])
def test_a_family_is_a_file_of_trajstore_and_nothing_else(family: object, record: Record, canary: Path) -> None:
    store = Path(str(record(SMALL_NET, seeds=[0]).store))
    for kind in ("problem", "operator"):

        def other(attributes: Document, kind: str = kind) -> None:
            attributes["config"][kind] = {"family": family, "function": "canary:make", "arguments": {}}

        rewrite(store, "net", other)
        with pytest.raises((ConfigurationError, FormatError)):
            Recipe.of(ts.open(store, trust=True)["net"])
        assert not canary.exists()


def test_an_experiment_without_foreign_code_asks_for_nothing(record: Record) -> None:
    store = Path(str(record(SMALL_NET, seeds=[0]).store))
    strangers(store, "net")
    assert attributes_of(store, "net")["fills"][0]["id"].startswith("stranger")
    assert Recipe.of(ts.open(store)["net"]).name == "net"


def test_trust_is_of_one_store_and_not_of_all_that_name_the_same(strange: Path, canary: Path, tmp_path: Path) -> None:
    shutil.copytree(strange, tmp_path / "other.zarr")
    strangers(tmp_path / "other.zarr", "net")
    ts.open(strange, trust=True)["net"]
    with pytest.raises(UntrustedError):
        Recipe.of(ts.open(tmp_path / "other.zarr")["net"])
    assert not canary.exists()


def test_trust_in_a_store_of_which_nothing_is_recorded_is_of_its_place(strange: Path, tmp_path: Path) -> None:
    rewrite(strange, "net", lambda attributes: attributes.update(fills=[]))
    shutil.copytree(strange, tmp_path / "other.zarr")
    Recipe.of(ts.open(strange, trust=True)["net"])
    with pytest.raises(UntrustedError):
        Recipe.of(ts.open(tmp_path / "other.zarr")["net"])


def test_a_module_that_cannot_be_found_is_not_taken_for_mine(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not entry.endswith("modules")])
    with pytest.raises(UntrustedError, match="'canary', which cannot be found"):
        list(replay(ts.open(recorded)["net"]))


def test_a_refusal_is_short_whatever_the_arguments(strange: Path) -> None:
    def long(attributes: Document) -> None:
        attributes["config"]["problem"]["arguments"] = {f"a{k}" * 99: "x" * 10_000 for k in range(99)}

    rewrite(strange, "net", long)
    with pytest.raises(UntrustedError, match="and 93 more") as refused:
        Recipe.of(ts.open(strange)["net"])
    assert len(str(refused.value)) < 2_000


def test_what_is_not_trusted_is_left_out_of_a_replay_and_the_others_are_replayed(
    strange: Path, canary: Path, trajstore: Program
) -> None:
    ts.run(ts.Experiment.of({**SMALL_NET, "name": "plain", "seeds": [0]}), strange)
    code, out, _ = trajstore("verify", str(strange), "--replay")
    assert code == 0
    assert "experiment 'plain', " in out
    assert "experiment 'net' was not recorded here" in out
    assert not canary.exists()


SCRIPT = """
import sys
import trajstore as ts
from trajstore.replay.compare import replay

def make(width):
    return ts.Experiment.of({net!r}).problem

problem = {{"family": "factory", "function": "__main__:make", "arguments": {{"width": 7}}}}
ts.run(ts.Experiment.of({{**{net!r}, "seeds": [0], "problem": problem}}), sys.argv[1], engine="reference")
assert all(slab.differs_from is None for slab in replay(ts.open(sys.argv[1])["net"]))
print("replayed")
"""


def test_a_function_of_a_script_needs_no_trust_there_and_is_nobody_elses(tmp_path: Path, trajstore: Program) -> None:
    """A notebook records with a function of its own, and analyses; later another process opens what it recorded."""
    (tmp_path / "script.py").write_text(SCRIPT.format(net=SMALL_NET))
    store = tmp_path / "runs.zarr"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(tmp_path / "script.py"), str(store)],
        capture_output=True, text=True, check=False, timeout=HANGS,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "replayed"), done.stderr
    assert ts.open(store)["net"].dataset()["train_loss"].notnull().all()
    told = "would call __main__:make(width=7), defined in a script or notebook, and no other process can import it"
    commands = (["verify", str(store), "net", "--replay"], ["compute", "gradient_norm", str(store), "net"])
    for command in commands:
        code, _, err = trajstore(*command)
        assert (code, err.count("\n")) == (2, 1)
        assert told in err
        assert "--trust" not in err, "it would not help"
    for command in commands:
        code, _, err = trajstore(*command, "--trust")
        assert (code, err.count("\n")) == (2, 1)
        assert "'__main__:make': it was defined in a script or notebook, and what runs here has no 'make'" in err


def test_a_script_is_asked_about_a_function_that_only_has_the_name_of_one_of_its_own(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Path(str(record(SMALL_NET, seeds=[0]).store))
    rewrite(store, "net", names_canary)
    rewrite(store, "net", lambda attributes: attributes["config"]["problem"].update(function="__main__:make"))

    def make(width: int) -> object:
        raise AssertionError(width)

    monkeypatch.setattr(sys.modules["__main__"], "make", make, raising=False)
    with pytest.raises(UntrustedError, match=r"was not recorded here.*call __main__:make\(width=7\).*give --trust"):
        list(replay(ts.open(store)["net"]))
