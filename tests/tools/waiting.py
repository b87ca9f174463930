"""Waiting for what happens elsewhere, without a guess at how long it takes on a machine that is busy."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["HANGS", "until"]

HANGS = 600.0
"""Seconds after which something hangs. A test that passes never waits for it."""


def until(there: Callable[[], object], what: str) -> None:
    """Wait until something is there."""
    deadline = time.monotonic() + HANGS
    while not there():
        assert time.monotonic() < deadline, f"{what}: not after {HANGS:.0f} s"
        time.sleep(0.02)
