"""The three packages as they are installed: a wheel, unpacked.

Run from the repository root, tools would find only `trajstore/` and call that a success, whatever stands in `analysis/`
and `cli/`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = "trajstore", "analysis", "cli"


def modules() -> list[Path]:
    """Return every module that exists."""
    return [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]


@contextmanager
def unpacked() -> Iterator[Path]:
    """Build a wheel, and yield the folder that it is unpacked in."""
    with tempfile.TemporaryDirectory() as folder:
        tree, wheels, installed = Path(folder, "tree"), Path(folder, "wheels"), Path(folder, "installed")
        for name in PACKAGES:  # a copy, since building leaves files that a later wheel takes in
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, tree)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, tree], check=True)
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            wheel.extractall(installed)
        yield installed
