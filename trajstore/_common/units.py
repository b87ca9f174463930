"""Numbers as a person reads them."""

from __future__ import annotations

__all__ = ["human_bytes", "human_size"]

_MUCH = 1.5
"""From so many times the content on, what is taken for it is told."""


def human_bytes(count: float) -> str:
    """Return a number of bytes with a decimal unit.

    >>> human_bytes(1_234_567)
    '1.23 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def human_size(content: int, taken: int) -> str:
    """Return how much files hold, with what the disk takes for them where that is much more.

    >>> human_size(4_900_000, 120_000_000), human_size(4_900_000, 5_000_000)
    ('4.9 MB (120 MB on disk)', '4.9 MB')
    """
    return human_bytes(content) + (f" ({human_bytes(taken)} on disk)" if taken > _MUCH * content else "")
