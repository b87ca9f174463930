"""What torch.compile needs of a machine."""

from __future__ import annotations

import os
import shutil
import sysconfig
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from trajstore._common.unpromised import COMPILING

__all__ = ["missing_for_compiling"]


@cache
def missing_for_compiling(device: str = "cpu") -> tuple[str, ...]:
    """Return what torch.compile would need and this machine lacks, as a person would install it."""
    missing = []
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    if not any(map(shutil.which, compilers)):
        missing.append("a C++ compiler (on Debian: apt install g++)")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append("Python's headers (on Debian: apt install python3-dev)")
    if device == "cuda" and find_spec("triton") is None:
        missing.append("Triton (pip install triton)")
    if not missing and (gone := COMPILING.gone()):
        missing.append(gone)
    return tuple(missing)
