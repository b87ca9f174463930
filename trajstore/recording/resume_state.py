"""Nested dicts, lists and tuples of tensors and plain values, as bytes and back: the safetensors format, no pickles.

>>> unpack(pack({"state": {0: (1, 2.5, None)}, "weights": torch.ones(2)}))
{'state': {0: (1, 2.5, None)}, 'weights': tensor([1., 1.])}
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from trajstore.errors import ConfigurationError

__all__ = ["pack", "unpack"]

_SHAPE = "tree"
"""The tensor that holds, as JSON in bytes, everything but the tensors."""


def pack(tree: Any) -> bytes:  # noqa: ANN401
    """Return a tree as bytes; tensors are copied to host memory."""
    tensors: dict[str, Tensor] = {}
    shape = json.dumps(_encoded(tree, tensors, "")).encode()
    return bytes(save({**tensors, _SHAPE: torch.frombuffer(bytearray(shape), dtype=torch.uint8)}))


def unpack(content: bytes) -> Any:  # noqa: ANN401
    """Read a tree back; ValueError where the bytes hold none."""
    try:
        tensors = load(content)
        return _decoded(json.loads(bytes(tensors.pop(_SHAPE).tolist())), tensors)
    except (SafetensorError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a tree: {error}") from None


def _encoded(tree: Any, tensors: dict[str, Tensor], at: str) -> Any:  # noqa: ANN401
    if isinstance(tree, np.ndarray):
        tree = torch.from_numpy(tree.astype(np.int64) if tree.dtype.kind == "u" else tree)
    if isinstance(tree, Tensor):
        name = f"{len(tensors)}{at}"
        # Cloned, since tensors may share their storage, which safetensors refuses.
        tensors[name] = tree.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(tree, dict):
        return {"dict": [[_encoded(k, tensors, at), _encoded(v, tensors, f"{at}/{k}")] for k, v in tree.items()]}
    if isinstance(tree, tuple | list):
        kind = "tuple" if isinstance(tree, tuple) else "list"
        return {kind: [_encoded(v, tensors, f"{at}/{k}") for k, v in enumerate(tree)]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise ConfigurationError(f"{at.strip('/') or 'it'}: {type(tree).__name__} cannot be stored without a pickle")


def _decoded(tree: Any, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_decoded(k, tensors): _decoded(v, tensors) for k, v in content}
    values = [_decoded(v, tensors) for v in content]
    return tuple(values) if kind == "tuple" else values
