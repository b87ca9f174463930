"""Distances between iterates of a slab, as statistics that stream.

They are roots of float64 sums of squared differences. Through norms and products, ‖x‖² + ‖y‖² − 2x·y, distances of
iterates that are close would be rounding errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trajstore.errors import ConfigurationError, StatisticError
from trajstore.reading.iterates import Slab
from trajstore.reading.streaming import Block, Need, Statistic

__all__ = ["Distance", "Norm", "Successive", "To", "distance_to"]

To = int | Literal["start", "previous", "last"]
"""What an iterate is compared with: the one at a step, θ₀, the stored one before it, or the last stored one."""
_WHERE = "NaN where no iterate is stored"


def distance_to(to: To) -> Statistic[Any]:
    """Return the statistic for a choice.

    >>> distance_to("last").name
    'distance_to_last'
    """
    if to == "previous":
        return Successive()
    if isinstance(to, bool) or not (isinstance(to, int | np.integer) or to in ("start", "last")):
        raise ConfigurationError(f"to is {to!r}; choose 'start', 'previous', 'last', or a step as a whole number")
    return Distance(to if isinstance(to, str) else int(to))


Squares = tuple[NDArray[np.float64], ...]
"""Sums of squares over parameters, one an iterate, in pieces: joining them at each merge would copy all of them."""


class _Root:
    """What is a root of a sum of squares, at every snapshot."""

    dims = ("snapshot",)

    def finish(self, total: NDArray[np.float64], parameters: int) -> NDArray[np.float64]:
        """Take the root."""
        return np.sqrt(total)


class _RootOfEach(_Root):
    """What is that of each iterate by itself."""

    def merge(self, earlier: Squares, later: Squares) -> Squares:
        """One after the other."""
        return earlier + later

    def close(self, part: Squares) -> NDArray[np.float64]:
        """One sum an iterate."""
        return np.concatenate(part)


@dataclass(frozen=True)
class Norm(_RootOfEach):
    """‖θ_n‖ at every snapshot."""

    name = "norm"

    @property
    def attrs(self) -> Mapping[str, Any]:
        """What the result says of itself."""
        return {"description": f"Euclidean norm of the parameters; {_WHERE}"}

    def need(self, slab: Slab) -> Need:
        """All iterates that there are."""
        return Need(range(len(slab.steps)))

    def block(self, block: Block) -> Squares:
        """Sum squares over parameters."""
        return (np.vecdot(block.values, block.values),)


@dataclass(frozen=True)
class Distance(_RootOfEach):
    """‖θ_n − θ_m‖ at every snapshot n, for one m of the slab."""

    to: int | Literal["start", "last"]

    @property
    def name(self) -> str:
        """What the result is called."""
        return f"distance_to_{self.to}"

    @property
    def attrs(self) -> Mapping[str, Any]:
        """What the result says of itself."""
        to = {"start": "θ₀", "last": "the slab's last stored iterate"}.get(
            str(self.to), f"the iterate at step {self.to}"
        )
        return {"description": f"Euclidean distance of the parameters to {to}; {_WHERE}", "to": self.to}

    def need(self, slab: Slab) -> Need:
        """All iterates that there are, and the one to compare with."""
        if not len(slab.steps):
            return Need(range(0))
        if self.to == "last":
            return Need(range(len(slab.steps)), len(slab.steps) - 1)
        step = 0 if self.to == "start" else self.to
        at = np.flatnonzero(slab.steps == step)
        if not len(at):
            what = "the start, step 0," if self.to == "start" else f"step {step}"
            nearest = int(slab.steps[np.abs(slab.steps - step).argmin()])
            raise StatisticError(
                f"{slab.where}: {what} is not among the stored iterates that are selected; "
                f"the nearest is step {nearest}"
            )
        return Need(range(len(slab.steps)), int(at[0]))

    def block(self, block: Block) -> Squares:
        """Sum squared differences over parameters."""
        assert block.reference is not None
        difference = np.subtract(block.values, block.reference, out=block.scratch)
        return (np.vecdot(difference, difference),)


@dataclass(frozen=True)
class Run:
    """Successive iterates: the first and the last, and the squared distances between neighbours."""

    first: NDArray[np.float64]
    last: NDArray[np.float64]
    gaps: Squares


@dataclass(frozen=True)
class Successive(_Root):
    """‖θ_n − θ_m‖ at every snapshot n, for the stored iterate m before it."""

    name = "distance_to_previous"

    @property
    def attrs(self) -> Mapping[str, Any]:
        """What the result says of itself."""
        what = "Euclidean distance of the parameters to those of the stored iterate before"
        return {"description": f"{what}; {_WHERE}, and at the first one", "to": "previous"}

    def need(self, slab: Slab) -> Need:
        """All iterates that there are."""
        return Need(range(len(slab.steps)))

    def block(self, block: Block) -> Run:
        """Compare neighbours; keep the first and the last for those in the next blocks."""
        steps = np.subtract(block.values[1:], block.values[:-1], out=block.scratch[1:])
        return Run(block.values[0].copy(), block.values[-1].copy(), (np.vecdot(steps, steps),))

    def merge(self, earlier: Run, later: Run) -> Run:
        """Compare across the seam."""
        seam = later.first - earlier.last
        return Run(earlier.first, later.last, (*earlier.gaps, np.atleast_1d(np.vecdot(seam, seam)), *later.gaps))

    def close(self, part: Run) -> NDArray[np.float64]:
        """One sum an iterate; there is nothing before the first."""
        return np.concatenate([[np.nan], *part.gaps])
