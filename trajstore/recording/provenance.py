"""Where a recording comes from: versions, commit, device, and the settings that move the last bits."""

from __future__ import annotations

import os
import platform
import subprocess
import warnings
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

__all__ = ["now", "provenance"]

_PACKAGES = ("trajstore", "torch", "torchvision", "numpy", "zarr", "numcodecs", "pcodec", "xarray", "duckdb")


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def provenance(device: torch.device) -> dict[str, Any]:
    """Return what to know of the machine and the software that record now."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {package: found for package in _PACKAGES if (found := _version(package))},
        "git_commit": _git_commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "precision": {
            "float32_matmul": _float32_matmul(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "mkldnn": torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
        },
        "environment": {k: v for k, v in os.environ.items() if k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")},
    }


def _float32_matmul() -> str:
    with warnings.catch_warnings():  # torch 2.9 warns whoever asks that one may later have to ask otherwise
        warnings.simplefilter("ignore", UserWarning)
        return torch.get_float32_matmul_precision()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of the working directory's repository, with a mark where files differ from it."""
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip() or None
