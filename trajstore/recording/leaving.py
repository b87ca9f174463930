"""Tensors on their way to host memory.

From a GPU they leave through pinned buffers on a stream of their own, while the next iterates are computed; who wants
them waits for the copy alone. Host tensors are there already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Leaving"]

Sent = Callable[[], list[Tensor]]
"""Waits until what was sent has arrived, and returns it."""


class Leaving:
    """Sends tensors to host memory."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def send(self, tensors: Sequence[Tensor]) -> Sent:
        """Begin to copy tensors that nobody writes to any more."""
        if not tensors[0].is_cuda:
            return lambda: list(tensors)
        device = tensors[0].device
        own = self._stream = self._stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        own.wait_stream(torch.cuda.current_stream(device))  # until they are computed
        here = []
        with torch.cuda.stream(own):
            for tensor in tensors:
                room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                here.append(room.copy_(tensor, non_blocking=True))
                tensor.record_stream(own)  # its memory is not given to others before it is copied
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(own)

        def arrived() -> list[Tensor]:
            copied.synchronize()
            return here

        return arrived
