"""Operators T_i: one optimizer step as a pure map state → state.

One family a file. An operator gets the gradient as a function, so that it may ask for it at any point, as
often as it likes. `index` is the i of T_i; the position in the chain is in the state. By default learning
rate schedules and bias corrections follow the position, which gives forward and backward iterates the same
law at each n; ``by="index"`` ties them to the batch index.
"""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from trajstore.errors import ConfigurationError
from trajstore.operators.schedules import Schedule
from trajstore.operators.state import Memory, State, Tensors

__all__ = [
    "FAMILIES",
    "Batch",
    "By",
    "ChecksBatches",
    "Gradient",
    "Operator",
    "Pushes",
    "applications",
    "learning_rate",
    "require_range",
]

FAMILIES = (
    "adam",
    "adamw",
    "order_mean",
    "order_regularized",
    "sgd",
)
"""Modules that declare one."""

Batch = tuple[Tensor, ...]
By = Literal["position", "index"]


class Gradient(Protocol):
    """The gradient of the batch loss, and the buffers after the forward pass that gave it.

    A parameter that the loss does not use has gradient zero (so weight decay acts on it).
    """

    def __call__(self, params: Tensors, buffers: Tensors, batch: Batch) -> tuple[Tensors, Tensors]:
        """Return (gradients by parameter name, new buffers)."""

    def along(self, params: Tensors, buffers: Tensors, batch: Batch, direction: Tensors) -> Tensors:
        """Return the Hessian of the batch loss times a direction."""


class Operator(Protocol):
    """T_i, for every i."""

    def memory(self, params: Tensors) -> Memory:
        """Return what the optimizer remembers at θ₀: slot → tensors by parameter name."""

    def apply(self, gradient: Gradient, state: State, batch: Batch, index: Tensor) -> State:
        """Return T_index(state)."""


@runtime_checkable
class ChecksBatches(Protocol):
    """What an operator may add that cannot take all batches."""

    def check(self, batch_size: int, draws: bool) -> None:
        """Raise a ConfigurationError if it cannot take batches of so many examples, or losses that draw at random."""


@runtime_checkable
class Pushes(Protocol):
    """What an operator may add that knows its derivative: it is had without it too, at several times the cost."""

    def push(self, gradient: Gradient, state: State, tangent: Tensors, batch: Batch, index: Tensor) -> Tensors:
        """Return what T_index makes of an infinitely small difference of the parameters."""


def applications(by: By, state: State, index: Tensor) -> Tensor:
    """Return k, the count that schedules and bias corrections follow: 0 at the first application."""
    return state.position if by == "position" else index - 1


def learning_rate(lr: float, schedule: Schedule, k: Tensor, like: Tensor) -> Tensor | float:
    """Return the learning rate at count k, rounded once, to the precision of the parameters."""
    factor = schedule.factor(k)
    return (lr * factor).to(like.dtype) if isinstance(factor, Tensor) else lr * factor


def require_range(operator: str, field: str, value: float, low: float, high: float = float("inf")) -> None:
    """Refuse a hyperparameter outside [low, high)."""
    if not low <= value < high:
        limits = f"at least {low}" if high == float("inf") else f"in [{low}, {high})"
        raise ConfigurationError(f"operator {operator}: {field} is {value}; it must be finite and {limits}")
