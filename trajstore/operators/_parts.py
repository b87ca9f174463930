"""Batches cut into parts of equal size, for operators that take several small steps, or what becomes of them."""

from __future__ import annotations

from torch import Tensor

from trajstore.errors import ConfigurationError
from trajstore.operators import Batch

__all__ = ["check_parts", "cut"]


def check_parts(operator: str, parts: int, batch_size: int) -> None:
    """Refuse a batch that cannot be cut into parts of equal size."""
    if batch_size == 0:
        raise ConfigurationError(f"operator {operator}: batches of this problem hold no examples, and cannot be cut")
    if batch_size % parts:
        raise ConfigurationError(
            f"operator {operator}: parts is {parts} and does not divide the batch size {batch_size}; the next one that "
            f"it divides is {-(-batch_size // parts) * parts}"
        )


def cut(batch: Batch, parts: int) -> list[Batch]:
    """Return the parts, in order. What has no examples, the key of random draws, is the same for all."""
    size = len(batch[0]) // parts
    return [tuple(_rows(t, k * size, size) for t in batch) for k in range(parts)]


def _rows(t: Tensor, begin: int, size: int) -> Tensor:
    return t[begin : begin + size] if t.ndim else t
