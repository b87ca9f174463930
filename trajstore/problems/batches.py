"""The batch stream: which examples B_i holds, as a pure function of (data seed, i).

Backward composition walks the stream from n down to 1, so every B_i must be had without the ones before
it. Each draw therefore gets a counter-based generator of its own (Philox), keyed by the data seed and the
purpose, positioned by i. `i` counts from 1, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trajstore.errors import ConfigurationError

__all__ = ["Draw", "Sampling", "draws", "generator"]

Sampling = Literal["iid", "shuffle"]
Draw = Callable[[int], NDArray[np.int64]]

# One number per purpose keeps streams of one seed independent. Part of what a recorded seed means: never reuse.
PURPOSES = {"examples": 1, "shuffle": 2, "noise": 3, "start": 4, "problem": 5, "analysis": 6, "images": 7}


def generator(seed: int, purpose: str, i: int = 0) -> np.random.Generator:
    """Return the generator for draw `i` of one purpose under one seed."""
    if not 0 <= seed < 2**63:
        raise ConfigurationError(f"seed {seed} must be a whole number from 0 to 2^63 − 1")
    key = np.array([seed, PURPOSES[purpose]], dtype=np.uint64)
    counter = np.array([0, 0, i, 0], dtype=np.uint64)  # a draw may use 2^128 numbers before it meets the next
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def draws(sampling: Sampling, examples: int, batch_size: int, data_seed: int, together: int = 1) -> Draw:
    """Return the function i ↦ indices of the examples in B_i.

    ``iid`` draws with replacement, so that the operators are i.i.d., as the theory wants them. ``shuffle``
    walks through a new permutation every epoch and drops an incomplete last batch, as a DataLoader with
    ``drop_last`` does. With `together` = c, B_{c(i−1)+1} … B_{ci} are the parts of one draw: of the i-th batch that is
    c times as large.
    """
    for name, value in (("batch_size", batch_size), ("drawn_together", together)):
        if not value >= 1:
            raise ConfigurationError(f"{name} is {value}; it must be at least 1")
    if together > 1:
        whole = draws(sampling, examples, batch_size * together, data_seed)

        def part(i: int) -> NDArray[np.int64]:
            n, k = divmod(i - 1, together)
            return whole(n + 1)[k * batch_size : (k + 1) * batch_size]

        return part
    if sampling == "iid":
        return _remember(lambda i: generator(data_seed, "examples", i).integers(examples, size=batch_size))
    if batch_size > examples:
        raise ConfigurationError(f"batch_size {batch_size} is larger than an epoch of {examples} examples")
    per_epoch = examples // batch_size
    permutation = _remember(lambda epoch: generator(data_seed, "shuffle", epoch).permutation(examples))

    def shuffled(i: int) -> NDArray[np.int64]:
        epoch, k = divmod(i - 1, per_epoch)
        return permutation(epoch)[k * batch_size : (k + 1) * batch_size]

    return shuffled


def _remember(draw: Draw) -> Draw:
    """Keep the draws: a backward recording asks for each of them once per chain."""
    known: dict[int, NDArray[np.int64]] = {}

    def remembered(i: int) -> NDArray[np.int64]:
        if i not in known:
            known[i] = draw(i)
        return known[i]

    return remembered
