"""Policies: at which steps the state is stored. Values that combine.

>>> policy = every(100) | window(0, 3)
>>> [n for n in range(201) if n in policy]
[0, 1, 2, 3, 100, 200]
>>> str(log_then_every(1000) & window(10, 5000))
'log_then_every(1000) & window(10, 5000)'
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

from trajstore.errors import ConfigurationError
from trajstore.experiment import grids

__all__ = ["Policy", "every", "log_then_every", "policy_of", "window"]


class Policy(ABC):
    """A set of steps; step 0 is always stored besides."""

    @abstractmethod
    def __contains__(self, step: int) -> bool:
        """Tell whether the state of a step is stored."""

    def __or__(self, other: Policy) -> Policy:
        return _Either(self, other)

    def __and__(self, other: Policy) -> Policy:
        return _Both(self, other)


@dataclass(frozen=True)
class every(Policy):  # noqa: N801  a value that reads as a word
    """Every k-th step."""

    k: int = 1

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigurationError(f"every({self.k}): give a number of steps, at least 1")

    def __contains__(self, step: int) -> bool:
        return step % self.k == 0

    def __str__(self) -> str:
        return f"every({self.k})"


@dataclass(frozen=True)
class log_then_every(Policy):  # noqa: N801
    """Ten steps a decade, evenly spaced in the logarithm, up to k; from there every k-th."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigurationError(f"log_then_every({self.k}): give a number of steps, at least 1")

    def __contains__(self, step: int) -> bool:
        return step in self._first if step <= self.k else step % self.k == 0

    @cached_property
    def _first(self) -> frozenset[int]:
        return frozenset(grids.log_then_every(self.k, self.k, self.k))

    def __str__(self) -> str:
        return f"log_then_every({self.k})"


@dataclass(frozen=True)
class window(Policy):  # noqa: N801
    """Every step from a to b, both included."""

    a: int
    b: int

    def __post_init__(self) -> None:
        if not 0 <= self.a <= self.b:
            raise ConfigurationError(f"window({self.a}, {self.b}): give a first step and a last one, not before it")

    def __contains__(self, step: int) -> bool:
        return self.a <= step <= self.b

    def __str__(self) -> str:
        return f"window({self.a}, {self.b})"


@dataclass(frozen=True)
class _Either(Policy):
    one: Policy
    other: Policy

    def __contains__(self, step: int) -> bool:
        return step in self.one or step in self.other

    def __str__(self) -> str:
        return f"{self.one} | {self.other}"


@dataclass(frozen=True)
class _Both(Policy):
    one: Policy
    other: Policy

    def __contains__(self, step: int) -> bool:
        return step in self.one and step in self.other

    def __str__(self) -> str:
        left, right = (f"({p})" if isinstance(p, _Either) else str(p) for p in (self.one, self.other))
        return f"{left} & {right}"


def policy_of(given: Policy | int | None) -> Policy:
    """Return a policy that was given, or in short: a number k stands for every k-th step, None for every step.

    >>> str(policy_of(10))
    'every(10)'
    """
    if given is None:
        return every(1)
    if isinstance(given, int) and not isinstance(given, bool):
        return every(given)
    if not isinstance(given, Policy):
        raise ConfigurationError(
            f"snapshots is {given!r}; give a number k for every k-th step, or every(k), log_then_every(k) and "
            "window(a, b), combined with | and &"
        )
    return given
