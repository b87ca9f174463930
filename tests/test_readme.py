"""The README's commands run as they stand, in order, as a new user would type them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import trajstore as ts

README = Path(__file__).parent.parent / "README.md"


def test_the_first_five_minutes(tmp_path):
    blocks = re.findall(r"```(bash|python)\n(.*?)```", README.read_text(), re.DOTALL)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    assert len(blocks) >= 6
    for language, text in blocks:
        if text.startswith("# mine.py"):
            (tmp_path / "mine.py").write_text(text)
            continue
        command = ["bash", "-euc", text] if language == "bash" else [sys.executable, "-c", text]
        told = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert told.returncode == 0, f"{text}\n{told.stderr}"
        assert told.stderr == "" or "open_zarr" in text, told.stderr  # plain zarr warns of numcodecs codecs
    assert list(ts.open(tmp_path / "runs.zarr")) == ["my-loop", "problem", "quadratic", "small"]
    assert all((tmp_path / name).exists() for name in ("small.png", "model.safetensors", "metrics.parquet"))
