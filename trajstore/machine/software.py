"""What is installed, and what it can do: versions, checksums, a compiler, a GPU, the terminal."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from trajstore.machine import State, check

__all__: list[str] = []

_BOUND = re.compile(r"^(?P<name>[\w.-]+)(\[[^]]*\])?\s*>=\s*(?P<least>[\d.]+)(\s*;.*extra == .(?P<extra>\w+).)?$")
_DEVELOPING = ("test", "docs", "bench")


def _numbers(release: str) -> tuple[int, ...]:
    """Return a release as numbers that can be compared: 2.14.1+cpu is (2, 14, 1)."""
    whole = re.match(r"\d+(\.\d+)*", release)
    numbers = tuple(map(int, whole[0].split("."))) if whole else ()
    return numbers + (0,) * (4 - len(numbers))


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@check("versions", "Is what trajstore needs installed, in releases that it is tested with?")
def _versions(folder: Path) -> Iterator[tuple[State, str, str, Mapping[str, Any]]]:
    found: dict[str, str] = {"python": platform.python_version(), "trajstore": version("trajstore")}
    sound = True
    for requirement in requires("trajstore") or ():
        bound = _BOUND.match(requirement)
        if bound is None or bound["extra"] in _DEVELOPING:
            continue
        name, least, there = bound["name"], bound["least"], _installed(bound["name"])
        if there is not None:
            found[name] = there
        if there is None and bound["extra"] is None:
            sound = False
            yield "missing", f"{name} is not installed", f"pip install '{name}>={least}'", {name: None}
        elif there is not None and _numbers(there) < _numbers(least):
            sound = False
            told = f"{name} {there} is older than {least}, the oldest that trajstore is tested with"
            yield "doubtful", told, f"pip install --upgrade '{name}>={least}'", {name: there}
    if (pcodec := _installed("pcodec")) is not None:
        found["pcodec"] = pcodec
    else:
        sound = False
        yield "missing", "pcodec is not installed: states cannot be stored with it", "pip install pcodec", {}
    told = ", ".join(f"{name} {there}" for name, there in found.items())
    yield "good" if sound else "doubtful", told, "", found


@check("checksums", "Are checksums right, and computed by compiled code?")
def _checksums(folder: Path) -> Iterator[tuple[State, str, str, Mapping[str, Any]]]:
    import google_crc32c

    if google_crc32c.value(b"123456789") != 0xE3069283:  # the check value of CRC-32C's definition
        yield "wrong", "google-crc32c computes another checksum than CRC-32C", "reinstall google-crc32c", {}
    elif google_crc32c.implementation != "c":
        told = "checksums are computed in Python: writing and reading states takes many times as long"
        yield "slow", told, "pip install --upgrade google-crc32c", {"implementation": google_crc32c.implementation}
    else:
        yield "good", "CRC-32C in compiled code", "", {"implementation": "c"}


@check("threads", "How many cores are there, and does torch use them?")
def _threads(folder: Path) -> Iterator[tuple[State, str, str, Mapping[str, Any]]]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, name = torch.get_num_threads(), "OMP_NUM_THREADS"
    load = os.getloadavg()[0]
    figures = {"cores": cores, "threads": threads, "load": load, name: os.environ.get(name)}
    told = f"torch computes with {threads} of {cores} cores"
    if threads < cores and os.environ.get(name):
        yield "slow", f"{told}, as {name} says", f"unset {name}", figures
    elif load > 1.5 * cores:
        yield "slow", f"{told}, which are busy: a load of {load:.1f}", "end what else runs", figures
    else:
        yield "good", told, "", figures


@check("gpu", "Is there a GPU, and does it compute what it should?")
def _gpu(folder: Path) -> Iterator[tuple[State, str, str, Mapping[str, Any]]]:
    import torch

    from trajstore.machine.computing import exact_product

    if not torch.cuda.is_available():
        cuda = torch.version.cuda
        told = "torch sees no GPU" if cuda else "this torch is built for processors only"
        yield "good", f"none: {told}; recordings run on the processor", "", {"devices": [], "cuda": cuda}
        return
    for k in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(k)
        figures = {"name": properties.name, "bytes": properties.total_memory}
        told = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        if exact_product(torch.device("cuda", k)):
            yield "good", told, "", figures
        else:
            yield "wrong", f"{told}: a product of whole numbers came out wrong", "do not use this GPU", figures


@check("terminal", "Can the terminal show the characters that trajstore prints?")
def _terminal(folder: Path) -> Iterator[tuple[State, str, str, Mapping[str, Any]]]:
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    figures = {"encoding": encoding, "terminal": sys.stdout.isatty()}
    try:
        "─θ₀²×→≥".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        told = f"output is {encoding}, which has no characters such as the Greek theta: they are replaced"
        yield "doubtful", told, "export PYTHONIOENCODING=utf-8", figures
    else:
        yield "good", f"output is {encoding}", "", figures
