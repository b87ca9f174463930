"""Type-check every module of the three packages, as they are installed.

Run from the repository root, mypy would find only `trajstore/` and call that a success, whatever stands in
`analysis/` and `cli/`. So a wheel is built and unpacked, mypy runs on it, and the number of files that it
checked must be the number of modules that exist.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> int:
    """Return mypy's exit code, or 1 if it saw fewer files than there are."""
    modules = [f for package in ("trajstore", "analysis", "cli") for f in (ROOT / package).rglob("*.py")]
    with tempfile.TemporaryDirectory() as folder:
        tree, wheels = Path(folder, "tree"), Path(folder, "wheels")
        for name in ("trajstore", "analysis", "cli"):  # a copy, since building leaves files that a later wheel takes in
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, tree)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, tree], check=True)
        installed = Path(folder, "installed")
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            wheel.extractall(installed)
        mypy = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml"]
        told = subprocess.run(
            [*mypy, "--cache-dir", ROOT / ".mypy_cache", "-p", "trajstore"],
            cwd=installed,
            capture_output=True,
            text=True,
        )
    sys.stdout.write(told.stdout + told.stderr)
    seen = re.search(r"(\d+) source files?", told.stdout)
    if seen and int(seen[1]) != len(modules):
        sys.stdout.write(f"mypy checked {seen[1]} files, but there are {len(modules)} modules\n")
        return 1
    return told.returncode


if __name__ == "__main__":
    sys.exit(main())
