"""How the batches of an experiment were drawn, told from what is stored with it.

Nothing of the user's is imported or called for it: a problem that a function of theirs made was described when it was
recorded. What is not stored is not guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trajstore.experiment.configuration import completed
from trajstore.storage.format.metrics import maker_of

__all__ = ["Drawing", "drawing_of"]

_BY_DEFINITION = {"quadratic": "iid", "two-constants": "iid"}
"""Families that leave no choice."""


@dataclass(frozen=True)
class Drawing:
    """How batches were drawn."""

    batch_size: int | None
    """Examples a batch; 0 where batches are noise and hold none; None where it is not stored."""
    sampling: str | None
    """``iid``: each example independently, with replacement. ``shuffle``: without, epoch by epoch. Anything else is a
    word of a problem's own. None where it is not stored."""


def drawing_of(attributes: Mapping[str, Any]) -> Drawing:
    """Return how the batches were drawn, by `attributes` of a stored experiment or `attributes_of` its dataset.

    Of a training loop no more is known than the ``batch_size`` that its `config` may have.
    """
    config = attributes.get("config", {})
    problem = config.get("problem", {})
    if maker_of(config) != "problem" or "schema" not in attributes:
        size = problem.get("batch_size")
        return Drawing(size if isinstance(size, int) and size > 0 else None, None)
    return Drawing(int(attributes["schema"]["batch_size"]), _sampling(problem))


def _sampling(problem: Mapping[str, Any]) -> str | None:
    """Return the word for it in the table of a problem, of the one that a function made, or in what one says itself."""
    for inner in ("made", "describes_itself"):
        if isinstance(problem.get(inner), Mapping):
            return _sampling(problem[inner])
    if "sampling" not in problem and problem.get("family") in _BY_DEFINITION:
        return _BY_DEFINITION[problem["family"]]
    known = problem if "sampling" in problem else completed("problem", problem)
    return known["sampling"] if isinstance(known.get("sampling"), str) else None
