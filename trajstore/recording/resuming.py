"""Progress as bytes: what is stored so that a recording can go on."""

from __future__ import annotations

from typing import Any

import torch

from trajstore._common.pytree import tree_map
from trajstore.engine import Iterate
from trajstore.engine.walk import Progress
from trajstore.operators.state import State
from trajstore.recording import resume_state

__all__ = ["pack", "unpack"]


def pack(progress: Progress) -> bytes:
    """Return progress as bytes."""
    kind, start = progress.way[-1]
    # A forward leg goes on from where it stands, a first leg from θ₀: neither needs the state where it started.
    anchor = progress.anchor if kind != "forward" and start > 0 else progress.anchor._replace(state=_NOTHING)
    return resume_state.pack({"way": progress.way, "last": _plain(progress.last), "anchor": _plain(anchor)})


def unpack(content: bytes, device: torch.device) -> Progress | None:
    """Read progress back; None where it is none."""
    try:
        tree = resume_state.unpack(content)
        return Progress(tree["way"], _iterate(tree["anchor"], device), _iterate(tree["last"], device))
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError):
        return None


_NOTHING = State({}, {}, {}, torch.tensor(0))


def _plain(iterate: Iterate) -> tuple[object, ...]:
    return iterate.step, tuple(iterate.state), iterate.metrics


def _iterate(tree: Any, device: torch.device) -> Iterate:  # noqa: ANN401
    step, state, metrics = tree
    return Iterate(step, tree_map(lambda t: t.to(device), State(*state)), metrics)
