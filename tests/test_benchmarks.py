"""Benchmarks run: a GPU is seldom at hand, and not to be found waiting for a script that fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_that_of_the_engine_tells_what_an_application_costs(tmp_path):
    arguments = ["--problem", "regression", "--repeats", "1", "--lanes", "2", "--json", str(tmp_path / "told.json")]
    told = subprocess.run(
        [sys.executable, BENCHMARKS / "engine.py", *arguments], capture_output=True, text=True, check=True
    ).stdout
    assert "wavefront 2" in told
    assert "of CPU time" in told
    assert (tmp_path / "told.json").stat().st_size > 100
