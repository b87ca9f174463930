"""The exponent of a product of maps: how an infinitely small difference grows per step, once it has turned.

Any difference turns, step by step, into the direction that grows most, and until it has, it grows otherwise than the
exponent says. Whether it has cannot be seen in one difference. So several are followed, from random directions at right
angles, and only what they show by turning into each other counts. In a plane two random directions lie within an angle
of each other with a chance of that angle over a right one: an angle that says something about the maps is a small one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from trajstore.analysis.longrun import ENOUGH, effective_size, line_of, quantile, standard_error
from trajstore.analysis.rounding import of_size
from trajstore.analysis.states import dot, norm

from trajstore.errors import StatisticError
from trajstore.operators.state import Tensors

__all__ = ["LEAST", "Exponent", "Growth", "Push", "directions", "exponent_of", "follow"]

LEAST = 50
"""Steps of the half that is averaged over."""
CERTAIN = 50
"""How many times its rounding a length must be, to be known to a hundredth."""
_NEAR, _ONE = 0.14, 1e-3
"""Sines of the angle between two differences: from the first on they are averaged over, if they come to the second."""
_CHANGING = 0.99
"""So sure it must be that growth changes over what is averaged."""
_NEGLIGIBLE = 0.05
"""Growth that varies by no more than this share of the exponent is known to what it varies by, however correlated."""

Floats = NDArray[np.float64]
Push = Callable[[int, Sequence[Tensors]], Sequence[Tensors]]
"""(n, differences) → what the n-th map makes of them."""


@dataclass(frozen=True)
class Growth:
    """How the first of some differences grows at each step, and how far they are from being one."""

    logarithms: Floats
    """−∞ at the last of them, where nothing is left."""
    apart: Floats
    """The sine of the largest angle between the first and another one, after each step."""
    rounding: Floats
    """By how much each logarithm may be off by rounding."""


@dataclass(frozen=True)
class Exponent:
    """An exponent per step with its interval; NaN where there is none, and why."""

    value: float
    reach: float = 0.0
    why: str = ""


def directions(like: Tensors, count: int, rng: np.random.Generator) -> list[Tensors]:
    """Return random unit vectors at right angles, shaped as some tensors: `count`, or as many as there are dimensions.

    >>> [one] = directions({"x": torch.zeros(1)}, 2, np.random.default_rng(0))
    >>> one["x"].abs()
    tensor([1.])
    """
    ends = np.cumsum([0, *(p.numel() for p in like.values())])
    basis, _ = np.linalg.qr(rng.standard_normal((int(ends[-1]), min(count, int(ends[-1])))))
    return [
        {
            name: torch.from_numpy(one[a:b].reshape(tuple(p.shape))).to(p)
            for (name, p), a, b in zip(like.items(), ends, ends[1:], strict=False)
        }
        for one in np.ascontiguousarray(basis.T)
    ]


def follow(push: Push, differences: Sequence[Tensors], steps: int, what: str) -> Growth:
    """Return how `differences` of unit length grow under the maps 1 … `steps`.

    `push` applies the derivative of the n-th map; `what` is how an error names the product.
    """
    logarithms, apart, rounding = (np.zeros(steps) for _ in range(3))
    dtype = np.result_type(*(p.detach().cpu().numpy().dtype for p in differences[0].values()))
    unit = float(of_size(np.ones(1), dtype)[0])
    for n in range(1, steps + 1):
        moved = push(n, differences)
        sizes = [norm(difference) for difference in moved]
        if not np.isfinite(sizes).all():
            raise StatisticError(f"{what}: at step {n} a difference is no number any more, so there is no exponent")
        left = [k for k, size in enumerate(sizes) if size > 0]
        if not left:  # nor will there ever be anything
            logarithms[n - 1] = -np.inf
            return Growth(logarithms[:n], apart[:n], rounding[:n])
        first = left[0]  # a difference that a map takes to nothing is as any other from there on
        logarithms[n - 1], rounding[n - 1] = np.log(sizes[first]), unit / min(sizes[k] for k in left)
        kept = [k if k in left else first for k in range(len(moved))]
        differences = [_scaled(moved[k], sizes[k]) for k in kept]
        apart[n - 1] = max((_apart(differences[0], other) for other in differences[1:]), default=0.0)
    return Growth(logarithms, apart, rounding)


def exponent_of(grown: Growth, level: float = 0.95) -> Exponent:
    """Return the exponent, per step: the mean growth from where the differences are near each other.

    `grown` is how they grew, and `level` that of the interval. They must be near each other by the middle of the run.
    """
    if grown.logarithms[-1] == -np.inf:
        return Exponent(-np.inf)
    steps = len(grown.logarithms)
    half = steps // 2
    near = _first(grown.apart <= _NEAR)
    if near > half or not (grown.apart <= _ONE).any():
        by = f"by step {half}" if near > half else f"for good by step {steps}"
        end = np.sqrt(max(0.0, 1 - grown.apart[-1] ** 2))
        turned = f"two random differences have not turned into one direction {by}"
        return Exponent(np.nan, np.nan, f"{turned} (cosine {end:.2g} in the end)")
    used = slice(max(near, steps // 4), None)
    values, rounding = grown.logarithms[used], grown.rounding[used]
    if rounding.max() > 1 / CERTAIN:
        at = used.start + int(np.argmax(rounding)) + 1
        return Exponent(np.nan, np.nan, f"at step {at} nearly nothing is left of a difference but rounding")
    varies, value = float(np.ptp(values)), float(values.mean())
    steady = varies <= max(2 * float(rounding.max()), _NEGLIGIBLE * abs(value))
    worth = effective_size(values)
    reach = quantile(level) * float(standard_error(values - value)) + float(rounding.mean())
    (slope,), (error,), _ = line_of(values[:, None])
    if abs(slope) > quantile(_CHANGING) * error and abs(slope) * len(values) > reach:
        change = f"{slope * len(values):+.2g} from step {used.start + 1} to {steps}"
        return Exponent(np.nan, np.nan, f"how a difference grows still changes, by {change}")
    if steady:  # so that the limit is not far from what was seen
        return Exponent(value, max(reach, varies))
    if worth < ENOUGH:
        few = f"growth over steps {used.start + 1} to {steps} is so correlated that it is worth {worth:.0f} independent"
        return Exponent(np.nan, np.nan, f"{few} values, and an interval needs {ENOUGH}; follow it along more steps")
    if abs(slope) > quantile(level) * error:  # it tends to its limit still
        reach += (abs(slope) + quantile(level) * error) * len(values) / 2
    return Exponent(value, float(reach))


def _first(where: NDArray[np.bool_]) -> int:
    """Return the place of the first that is true; how many there are if none is."""
    return int(np.argmax(where)) if where.any() else len(where)


def _apart(one: Tensors, other: Tensors) -> float:
    """Return the sine of the angle between unit vectors, exact where it is small."""
    along = dot(one, other)
    return min(1.0, norm({name: d.double() - along * one[name].double() for name, d in other.items()}))


def _scaled(direction: Tensors, size: float) -> Tensors:
    return {name: d / size for name, d in direction.items()}
