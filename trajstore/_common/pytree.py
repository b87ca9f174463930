"""Nested tuples and dicts of tensors, such as a `State`: all their tensors, and a function of each.

Dicts are taken by name: in which order their entries were put in makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["tree_leaves", "tree_map"]


def tree_leaves(tree: Any) -> list[Tensor]:  # noqa: ANN401
    """Return all tensors of a tree, in an order that depends on its structure and names alone."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = [tree[name] for name in sorted(tree)] if isinstance(tree, dict) else tree
    return [leaf for part in parts for leaf in tree_leaves(part)]


def tree_map(function: Callable[..., Tensor], tree: Any, *others: Any) -> Any:  # noqa: ANN401
    """Return a tree like the first, with a function of its tensors and those at the same places of the others."""
    if isinstance(tree, Tensor):
        return function(tree, *others)
    if isinstance(tree, dict):
        if any(other.keys() != tree.keys() for other in others):
            raise ValueError(f"trees differ: {sorted(tree)} in one, {[sorted(other) for other in others]} in others")
        return {name: tree_map(function, part, *(other[name] for other in others)) for name, part in tree.items()}
    parts = [tree_map(function, *together) for together in zip(tree, *others, strict=True)]
    return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
