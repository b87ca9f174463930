"""Statistics and figures of recorded trajectories, one a file, as functions of a dataset.

>>> from trajstore import analysis
>>> analysis.tail_variance(ds, "test_loss", window=100)   # doctest: +SKIP
"""

from __future__ import annotations

from trajstore.analysis.convergence import convergence
from trajstore.analysis.law import law
from trajstore.analysis.resets import resets
from trajstore.analysis.variance import (
    forward_over_backward,
    level_variance,
    rolling_variance,
    step_variance,
    tail_variance,
    variance,
    variance_ratio,
)

__all__ = [
    "convergence",
    "forward_over_backward",
    "law",
    "level_variance",
    "resets",
    "rolling_variance",
    "step_variance",
    "tail_variance",
    "variance",
    "variance_ratio",
]
