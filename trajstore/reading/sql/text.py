"""Texts and names as SQL writes them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

__all__ = ["identifier", "literal", "read_parquet"]


def literal(text: str) -> str:
    """Return a text as SQL writes it.

    >>> literal("it's")
    "'it''s'"
    """
    return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
    """Return a name as SQL writes it.

    >>> identifier("order")
    '"order"'
    """
    return '"' + name.replace('"', '""') + '"'


def read_parquet(files: Iterable[Path]) -> str:
    """Return what reads files as one table, a column wherever one of them has it."""
    return f"read_parquet([{', '.join(literal(str(file)) for file in files)}], union_by_name = true)"
