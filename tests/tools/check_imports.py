"""Imports go down the floors that `pyproject.toml` names, and never round: in all modules, as they are installed.

The contracts are import-linter's, which counts imports inside functions and those for the type checker as well. Beyond
them, no module may import, over whatever way, one that imports it; and fewer modules than there are is a failure.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.tools.installed import ROOT, modules, unpacked

GRAPH = """
import grimp
graph = grimp.build_graph("trajstore", cache_dir=None)
print(len(graph.modules))
for module in sorted(graph.modules):
    if module in graph.find_upstream_modules(module) or any(
        graph.chain_exists(importer=other, imported=module) for other in graph.find_modules_directly_imported_by(module)
    ):
        print(f"{module} imports itself, by way of others")
"""


def main() -> int:
    """Return 1 where an import goes up or round, or where modules were not seen."""
    program = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or "lint-imports"
    with unpacked() as installed:
        there = os.environ | {"PYTHONPATH": str(installed)}
        contracts = subprocess.run(
            [program, "--no-cache", "--no-logo", str(ROOT / "pyproject.toml")], cwd=installed, env=there
        )
        told = subprocess.run(
            [sys.executable, "-c", GRAPH], cwd=installed, env=there, capture_output=True, text=True, check=True
        )
    seen, *circles = told.stdout.splitlines()
    sys.stdout.writelines(f"{line}\n" for line in circles)
    if int(seen) != len(modules()):
        sys.stdout.write(f"{seen} modules were looked at, but there are {len(modules())}\n")
    return int(contracts.returncode != 0 or circles != [] or int(seen) != len(modules()))


if __name__ == "__main__":
    sys.exit(main())
