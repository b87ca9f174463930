"""Loaded by the processes that start workers: they end when the process that started them is no more.

Dask's own would go on with what they have in hand, long after a client was killed.
"""

from __future__ import annotations

import os
import threading
import time

__all__ = ["dask_setup"]


def dask_setup(nanny: object) -> None:
    """Watch the parent from a thread of its own; the worker ends with its nanny."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
