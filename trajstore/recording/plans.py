"""Plans that were chosen on this machine, kept in the user's cache.

A plan depends on timings, and engines agree only within rounding: without a memory, the same command could choose
differently the second time and give other last bits. Losing the cache loses nothing but that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch

from trajstore._common.cache import user_cache
from trajstore.engine.plan import Plan
from trajstore.storage.format.digest import config_digest

__all__ = ["remembered"]


def remembered(question: Mapping[str, Any], choose: Callable[[], Plan]) -> Plan:
    """Return the plan that answered a question here before, or choose and remember one."""
    here = {
        "trajstore": version("trajstore"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    name = f"{config_digest({**question, **here}).removeprefix('sha256:')[:32]}.json"
    try:
        file = user_cache() / "plans" / name
        return Plan.from_json(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        plan = choose()
    if plan.slowed:
        return plan  # what is missing may be there next time
    try:
        file = user_cache() / "plans" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(plan.to_json()))
        partial.replace(file)
    except OSError:
        pass  # a home that cannot be written to: choose again next time
    return plan
