"""The demonstration shows the paper's effect, and shows it again without recording twice."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from trajstore.analysis import tail_variance

import trajstore as ts
from tests.conftest import unexpected


def test_the_effect_is_there_for_both_seeds(tmp_path):
    command = [sys.executable, "-m", "trajstore.cli.main", "demo"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (told.returncode, unexpected(told.stderr)) == (0, [])
    ds = ts.open(tmp_path / "demo.zarr")["demo"].dataset()
    assert ds.sizes["snapshot"] == ds.sizes["step"] == 301
    deviation = np.sqrt(tail_variance(ds, "test_loss", 100))
    ratio = deviation.sel(order="forward") / deviation.sel(order="backward")
    assert (ratio.values > 5).all()
    assert (tmp_path / "demo.png").stat().st_size > 20_000

    store = tmp_path / "demo.zarr"
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in store.rglob("*") if file.is_file()}
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.stdout == told.stdout
    after = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in store.rglob("*") if file.is_file()}
    assert after == before  # nothing was recorded, or even written
