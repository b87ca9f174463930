"""Operators on batches that are cut into parts of equal size: several small steps, or what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from trajstore.errors import ConfigurationError
from trajstore.operators import Batch, By, require_range
from trajstore.operators.schedules import Schedule
from trajstore.operators.schedules.constant import Constant
from trajstore.operators.state import Memory, Tensors

__all__ = ["OfParts", "cut"]


@dataclass(frozen=True)
class OfParts:
    """The learning rate of the large step, and into how many parts a batch is cut; families add what is done."""

    lr: float
    """h, that of the large step."""
    parts: int = 2
    """c; it must divide the batch size."""
    schedule: Schedule = field(default_factory=Constant)
    by: By = "position"
    name: ClassVar[str]
    """What an error calls the family."""

    def __post_init__(self) -> None:
        require_range(self.name, "lr", self.lr, 0.0)
        if self.parts < 2:
            raise ConfigurationError(f"operator {self.name}: parts is {self.parts}; it must be at least 2")

    def memory(self, params: Tensors) -> Memory:
        """Return nothing: there is none."""
        return {}

    def check(self, batch_size: int, draws: bool) -> None:
        """Refuse a batch that cannot be cut into equal parts, or whose parts would not be parts of the whole."""
        if draws:
            raise ConfigurationError(
                f"operator {self.name}: the model draws at random, as dropout does, and a part of a batch would have "
                "other draws than in the whole; leave the dropout out"
            )
        if batch_size == 0:
            raise ConfigurationError(f"operator {self.name}: batches of this problem hold no examples to cut")
        if batch_size % self.parts:
            raise ConfigurationError(
                f"operator {self.name}: parts is {self.parts} and does not divide the batch size {batch_size}; the "
                f"next batch size it divides is {-(-batch_size // self.parts) * self.parts}"
            )


def cut(batch: Batch, parts: int) -> list[Batch]:
    """Return the parts, in order."""
    size = len(batch[0]) // parts
    return [tuple(t[k * size : (k + 1) * size] for t in batch) for k in range(parts)]
