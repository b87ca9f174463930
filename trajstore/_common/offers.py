"""What a lower floor offers and a higher one does: put in from above, so that nothing below imports it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["offer", "offered"]

_OFFERED: dict[str, Callable[[], Callable[..., Any]]] = {}


def offer(name: str, find: Callable[[], Callable[..., Any]]) -> None:
    """Have something done by what `find` returns, which imports it: only when it is asked for."""
    _OFFERED[name] = find


def offered(name: str) -> Callable[..., Any]:
    """Return what does something that is offered."""
    return _OFFERED[name]()
