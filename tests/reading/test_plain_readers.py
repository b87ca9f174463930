"""A store is read where trajstore is not: in environments of their own, with zarr, xarray, and pcodec or not."""

from __future__ import annotations

import json
import subprocess
import threading
import venv
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

import trajstore as ts
from tests.conftest import SMALL_NET
from tests.tools.waiting import HANGS

READ = """
import json, sys, warnings
import numpy as np
try:
    import trajstore
    sys.exit("trajstore is here")
except ModuleNotFoundError:
    pass
if sys.argv[2] == "portable":
    try:
        import pcodec
        sys.exit("pcodec is here")
    except ModuleNotFoundError:
        pass
warnings.filterwarnings("ignore", message="Numcodecs codecs")
warnings.simplefilter("error", UserWarning) if sys.argv[2] == "portable" else None
import xarray as xr
ds = xr.open_zarr(sys.argv[1], group="net", consolidated=False, chunks=None)
counts = ds.committed.isel(field=0).values.clip(0).sum(-1)
told = {
    "params": ds.params.values.astype(float).tolist(), "test_loss": ds.test_loss.values.tolist(),
    "orders": ds.order.values.tolist(), "steps": ds.leg.values.tolist(), "counts": counts.tolist(),
}
print(json.dumps(told))
"""


def environment(folder: Path, *names: str) -> Path:
    """Make an environment that has some packages and what they need, and nothing else."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    waiting, known = list(names), set[str]()
    while waiting:
        name = waiting.pop()
        if name.lower() in known:
            continue
        known.add(name.lower())
        found = distribution(name)
        for requirement in map(Requirement, found.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
        for top in {Path(str(file)).parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            place = Path(str(found.locate_file(top)))
            if not (site / top).exists():
                (site / top).symlink_to(place)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def pythons(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("environments")
    bare = environment(folder / "portable", "zarr", "xarray")
    return {"portable": bare, "pcodec": environment(folder / "pcodec", "zarr", "xarray", "pcodec")}


def read(python: Path, store: Path, codec: str) -> dict:
    told = subprocess.run([python, "-I", "-c", READ, store, codec], capture_output=True, text=True, timeout=HANGS)
    assert told.returncode == 0, told.stderr
    assert told.stderr == ""
    return json.loads(told.stdout)


@pytest.mark.parametrize("codec", ["pcodec", "portable"])
def test_a_store_reads_without_trajstore(tmp_path, pythons, codec):
    table = {**SMALL_NET, "record": {"codec": codec}}
    stored = ts.run(ts.Experiment.of(table), tmp_path / "s.zarr", engine="reference", durability="none")
    elsewhere = (tmp_path / "s.zarr").rename(tmp_path / "copied")
    told = read(pythons[codec], elsewhere, codec)
    stored = ts.open(elsewhere)["net"]
    ds = stored.dataset()
    assert np.array_equal(told["params"], ds.params.values)
    assert np.array_equal(told["test_loss"], ds.test_loss.values)
    assert told["orders"] == ["forward", "backward"]
    assert told["counts"] == [[13, 13], [13, 13]]


def test_a_store_reads_while_it_is_being_recorded(tmp_path, pythons, monkeypatch):
    monkeypatch.setattr("trajstore.recording.schema.segment_length", lambda layout: 4)
    whole = ts.run(ts.Experiment.of(SMALL_NET), tmp_path / "whole.zarr", engine="reference", durability="none")
    truth = whole.dataset().load()
    halfway, go_on = threading.Event(), threading.Event()
    done = 0

    def tell(more: int, where: str) -> None:
        nonlocal done
        done += more
        if done > 60:
            halfway.set()
            go_on.wait(HANGS)

    how = {"engine": "reference", "durability": "none", "progress": tell}
    recording = threading.Thread(target=ts.run, args=(ts.Experiment.of(SMALL_NET), tmp_path / "s.zarr"), kwargs=how)
    recording.start()
    assert halfway.wait(HANGS)
    told = read(pythons["pcodec"], tmp_path / "s.zarr", "pcodec")
    go_on.set()
    recording.join()
    counts = np.array(told["counts"])
    assert 0 < counts.sum() < 4 * 13
    for i, k in np.ndindex(*counts.shape):
        steps = np.flatnonzero(np.array(told["steps"][i][k]) >= 0)[: counts[i, k]]
        assert np.array_equal(np.array(told["test_loss"])[i, k, steps], truth.test_loss[i, k, steps])
        assert np.array_equal(np.array(told["params"])[i, k][:, steps], truth.params[i, k][:, steps])


def test_nothing_of_trajstore_is_in_these_environments(pythons):
    for python in pythons.values():
        told = subprocess.run([python, "-I", "-c", "import torch"], capture_output=True, text=True)
        assert "No module named 'torch'" in told.stderr
