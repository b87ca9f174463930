"""What could not be stored, drawn or computed is refused in one line at the beginning, or it works."""

from __future__ import annotations

import multiprocessing
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from trajstore.analysis import figures
from trajstore.cli.plotting import save

import trajstore as ts
from trajstore._common import atomic
from trajstore._common.atomic import whole_folder
from trajstore.errors import ConfigurationError
from trajstore.reading.verify import verify

QUADRATIC = {"steps": 3, "seeds": [0], "orders": ["forward"]}


def trained(store: Path, steps: int = 2, order: str = "forward", **metrics: Any) -> ts.StoredExperiment:
    torch.manual_seed(0)
    module = torch.nn.Linear(1, 1)
    with ts.record(store, "mine", module, seed=0, order=order) as rec:
        for k in range(steps):
            with torch.no_grad():
                module.weight += 0.1
            rec.step(loss=1.0 / (k + 1), **metrics)
    return ts.open(store)["mine"]


def test_a_metric_beyond_those_that_have_a_bit_is_refused_when_it_is_first_given(tmp_path: Path) -> None:
    own = len(trained(tmp_path / "own.zarr").schema.metrics)
    most: dict[str, Any] = {f"m{k}": float(k) for k in range(63 - own)}
    ds = trained(tmp_path / "most.zarr", **most).dataset().load()
    assert all(float(ds[name][0, 0, 1]) == value for name, value in most.items())
    with pytest.raises(ConfigurationError, match="64 metrics, the last of them 'beyond': an experiment has at most 63"):
        trained(tmp_path / "more.zarr", **most, beyond=1.0)
    assert list(verify(ts.Store(tmp_path / "most.zarr"))) == []


@pytest.mark.parametrize("name", ["resume", "Resume", "batch_index", "committed", "zarr_committed"])
def test_a_metric_with_the_name_of_something_else_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"metric '({name}|zarr)': an array or column has that name"):
        trained(tmp_path / "s.zarr", **dict[str, Any]({name: 1.0, "zarr": 2.0}))
    module = torch.nn.Linear(1, 1)
    with ts.record(tmp_path / "late.zarr", "mine", module, seed=0) as rec:
        rec.step(zarr=2.0)
        with pytest.raises(ConfigurationError, match=f"metric '{name}': an array or column has that name"):
            rec.step(**dict[str, Any]({name: 1.0}))


@pytest.mark.parametrize("name", ["declare.lock", "Declare.Lock"])
def test_an_experiment_with_the_name_of_a_lock_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="a lock of the store has that name"):
        ts.run(ts.Experiment.preset("quadratic", {**QUADRATIC, "name": name}), tmp_path / "s.zarr")
    ts.run(ts.Experiment.preset("quadratic", QUADRATIC), tmp_path / "s.zarr")  # nothing is in the way


@pytest.mark.parametrize("figure", ["learning-curves", "distances"])
def test_a_label_is_never_a_formula(figure: str, tmp_path: Path) -> None:
    for order in ("plain", r"a$\frac$b", "l" * 100):
        experiment = trained(tmp_path / "s.zarr", steps=6, order=order)
    drawn: Any = figures.draw(figure, experiment)
    save(drawn, tmp_path / "a.svg", force=False)  # a formula would end here
    assert r"a\$\frac\$b" in {text.get_text() for legend in drawn.legends for text in legend.get_texts()}
    one = figures.draw(figure, experiment, order=[r"a$\frac$b"])
    save(one, tmp_path / "b.svg", force=False)


def test_a_figure_replaces_no_file_unless_by_force(trajstore: Any, tmp_path: Path) -> None:
    ts.run(ts.Experiment.preset("quadratic", {**QUADRATIC, "steps": 20}), tmp_path / "s.zarr")
    plot = ("plot", "s.zarr", "quadratic", "learning-curves", "-o", "thesis.pdf")
    (tmp_path / "thesis.pdf").write_text("years of work")
    code, out, err = trajstore(*plot)
    assert (code, out) == (2, "")
    assert err == "trajstore: thesis.pdf exists already; give --force to replace it\n"
    assert (tmp_path / "thesis.pdf").read_text() == "years of work"
    assert trajstore(*plot, "--force")[0] == 0
    assert (tmp_path / "thesis.pdf").read_bytes().startswith(b"%PDF")
    assert sorted(file.name for file in tmp_path.iterdir() if file.name.startswith(".")) == []


@pytest.mark.parametrize("exchanging", [True, False])
def test_a_folder_that_is_replaced_by_force_is_always_there(
    exchanging: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = tmp_path / "out", list[bool]()
    if not exchanging:  # as on a file system that cannot: then there is a moment of neither
        monkeypatch.setattr(atomic, "_exchanged", lambda one, other: False)
    rename = Path.rename

    def watched(path: Path, target: Any) -> Path:
        seen.append(folder.is_dir())
        moved = rename(path, target)
        seen.append(folder.is_dir())
        return moved

    monkeypatch.setattr(Path, "rename", watched)
    for text in ("old", "new"):
        with whole_folder(folder, force=True, ours=lambda folder: True) as partial:
            (partial / "a").write_text(text)
        if text == "old":
            seen.clear()
    assert (folder / "a").read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert all(seen) == exchanging


def _in_fork(ds: Any, answers: Any) -> None:
    answers.put(float(ds["params"].sum().compute()))


def test_a_fork_computes_what_its_parent_has_computed_before(tmp_path: Path) -> None:
    """Dask's threads are not in it: it would wait for them for ever."""
    experiment = ts.run(ts.Experiment.preset("quadratic", QUADRATIC), tmp_path / "s.zarr")
    ds = experiment.dataset()
    total = float(ds["params"].sum().compute())
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=_in_fork, args=(ds, answers))
    with warnings.catch_warnings():  # Python says that a fork of a process with threads may hang
        warnings.simplefilter("ignore")
        process.start()
    try:
        assert answers.get(timeout=60) == total
    finally:
        process.kill()
        process.join()
