"""Execute the notebooks afresh: `make notebooks` writes them in place, the tests compare.

The kernel is this very Python, whatever kernels and settings a user has, and all that it writes goes into a temporary
folder. Timings, versions and paths stay out of the files.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import matplotlib as mpl
import matplotlib.font_manager
import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[2] / "analysis" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_FONTS = mpl.get_cachedir()
_OWN = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")


class ThisPython(AsyncKernelManager):
    """Starts a kernel of the Python that runs here."""

    kernel_spec = KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])


def read(path: Path) -> NotebookNode:
    """Return a notebook as it stands."""
    return nbformat.read(path, as_version=4)


def execute(path: Path) -> NotebookNode:
    """Return a notebook with what its cells give now."""
    notebook = read(path)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    with tempfile.TemporaryDirectory() as folder:  # not pytest's: a socket's path must be short
        own = {name: f"{folder}/{name.lower()}" for name in _OWN}
        client = NotebookClient(
            notebook,
            km=ThisPython(transport="ipc", connection_file=f"{folder}/kernel"),
            timeout=3000,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        client.execute(cleanup_kc=True, env=os.environ | own | {"MPLCONFIGDIR": _FONTS})
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def main() -> None:
    """Execute the notebooks named, or all, in place."""
    for path in [Path(name) for name in sys.argv[1:]] or NOTEBOOKS:
        nbformat.write(execute(path), path)


if __name__ == "__main__":
    main()
