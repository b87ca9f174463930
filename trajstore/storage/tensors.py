"""States as torch takes them: named tensors with the dtypes that the model has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trajstore.storage.format.layout import Layout

if TYPE_CHECKING:
    import torch

__all__ = ["state_dict"]


def state_dict(layout: Layout, params: NDArray[Any], counters: NDArray[np.int64]) -> dict[str, torch.Tensor]:
    """Return a flat state for `module.load_state_dict`, strict."""
    import torch

    dtypes = {e.name: getattr(torch, e.dtype) for e in layout.entries if e.role in ("parameter", "buffer")}
    arrays = layout.unflatten(params, counters)
    return {name: torch.from_numpy(a).to(dtypes[layout.tied.get(name, name)]) for name, a in arrays.items()}
