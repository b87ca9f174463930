"""What lies in `trajstore.reading.streaming` now: handed on from here for one release."""

from __future__ import annotations

import warnings

from trajstore.reading.streaming import Block, Need, PerLayer, Statistic

__all__ = ["Block", "Need", "PerLayer", "Statistic"]

warnings.warn("trajstore.streaming is trajstore.reading.streaming now", DeprecationWarning, stacklevel=2)
