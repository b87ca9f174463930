"""Statistics and figures of recorded trajectories, one a file, as functions of a dataset.

>>> from trajstore import analysis
>>> analysis.tail_variance(ds, "test_loss", window=100)   # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trajstore.analysis.averages import rolling_mean, time_average
from trajstore.analysis.comparing import compare
from trajstore.analysis.convergence import convergence
from trajstore.analysis.distance_matrix import DistanceMatrix, distance_matrix
from trajstore.analysis.law import law
from trajstore.analysis.local import local_variance_ratio
from trajstore.analysis.parameter_variance import ParameterLevelVariance, ParameterTailVariance
from trajstore.analysis.resets import resets
from trajstore.analysis.streaming import stream
from trajstore.analysis.variance import (
    level_variance,
    rolling_variance,
    step_variance,
    tail_variance,
    variance,
    variance_ratio,
)

from trajstore._common.lazily import lazily
from trajstore.reading.distances import Distance, Norm, Successive
from trajstore.reading.streaming import PerLayer

if TYPE_CHECKING:
    from trajstore.analysis.afterwards import compute
    from trajstore.analysis.contracting import contraction, limit_bound, lyapunov
    from trajstore.analysis.examining import claims
    from trajstore.analysis.probing import outputs

__all__ = [
    "Distance",
    "DistanceMatrix",
    "Norm",
    "ParameterLevelVariance",
    "ParameterTailVariance",
    "PerLayer",
    "Successive",
    "claims",
    "compare",
    "compute",
    "contraction",
    "convergence",
    "distance_matrix",
    "law",
    "level_variance",
    "limit_bound",
    "local_variance_ratio",
    "lyapunov",
    "outputs",
    "resets",
    "rolling_mean",
    "rolling_variance",
    "step_variance",
    "stream",
    "tail_variance",
    "time_average",
    "variance",
    "variance_ratio",
]

# These compute with torch, which a table of a metric does without.
__getattr__ = lazily(
    __name__,
    {
        "claims": "examining",
        "compute": "afterwards",
        "contraction": "contracting",
        "limit_bound": "contracting",
        "lyapunov": "contracting",
        "outputs": "probing",
    },
)
