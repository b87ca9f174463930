"""States as vectors: inner products, norms, distances, random directions. In float64, whatever the tensors are."""

from __future__ import annotations

import numpy as np
import torch

from trajstore.operators.state import State, Tensors

__all__ = ["distance", "dot", "norm", "signs"]


def dot(left: Tensors, right: Tensors) -> float:
    """Return the inner product."""
    return float(sum((left[name].double() * right[name].double()).sum() for name in left))


def norm(tensors: Tensors) -> float:
    """Return the Euclidean norm."""
    return float(np.sqrt(dot(tensors, tensors)))


def distance(x: State, y: State) -> float:
    """Return the Euclidean distance of the parameters."""
    return norm({name: p.double() - y.params[name].double() for name, p in x.params.items()})


def signs(like: Tensors, rng: np.random.Generator) -> Tensors:
    """Return random signs, shaped as some tensors."""
    return {name: torch.from_numpy(rng.choice([-1.0, 1.0], p.shape)).to(p) for name, p in like.items()}
