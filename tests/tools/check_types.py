"""Type-check every module of the three packages, as they are installed: fewer than there are is a failure."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.tools.installed import ROOT, modules, unpacked


def main() -> int:
    """Return mypy's exit code, or 1 if it saw fewer files than there are."""
    with unpacked() as installed:
        mypy = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml"]
        told = subprocess.run(
            [*mypy, "--cache-dir", ROOT / ".mypy_cache", "-p", "trajstore"],
            cwd=installed,
            capture_output=True,
            text=True,
        )
    sys.stdout.write(told.stdout + told.stderr)
    seen = re.search(r"(\d+) source files?", told.stdout)
    if seen and int(seen[1]) != len(modules()):
        sys.stdout.write(f"mypy checked {seen[1]} files, but there are {len(modules())} modules\n")
        return 1
    return told.returncode


if __name__ == "__main__":
    sys.exit(main())
