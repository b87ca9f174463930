"""Sketches: a small linear projection of θ_n − θ₀, kept at every step whatever the snapshot policy.

A count sketch: parameter j is added with a sign to one of the components. Squared norms and inner products
of differences are kept in expectation, with relative error about √(2 / components). Where there are no more
parameters than components it is the difference itself.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Sketch"]


class Sketch:
    """A projection to `components` numbers, which must be a power of two, or the identity. Not for several threads."""

    def __init__(self, parameters: int, components: int, seed: int) -> None:
        self.components = min(components, parameters)
        self._identity = parameters <= components
        # Raw bits of Philox, whose stream is fixed by its definition, unlike numpy's distributions.
        bits = np.random.Philox(key=seed).random_raw(0 if self._identity else parameters)
        self._bucket = (bits & np.uint64(components - 1)).astype(np.intp)
        self._sign = np.where(bits >> np.uint64(63), -1.0, 1.0)
        self._signed = np.empty_like(self._sign)  # fresh memory would cost more than what is done in it

    def __call__(self, difference: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sketch of a difference of parameters, in float64."""
        if self._identity:
            return difference
        np.multiply(self._sign, difference, out=self._signed)
        sums = np.bincount(self._bucket, weights=self._signed, minlength=self.components)
        return np.asarray(sums, dtype=np.float64)
