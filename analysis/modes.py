"""Training and evaluation: where a loss in training is another function than in evaluation, and what is drawn for it.

Under dropout each step has masks of its own, and under batch normalisation the loss of an example depends on the others
of its batch. Gradients of batches are then no samples of the gradient of ``train_loss``, which is evaluated without
either, and nothing may be told from the difference of the two.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from trajstore.analysis.states import signs

from trajstore.errors import StatisticError
from trajstore.operators import Batch
from trajstore.problems import Batches, Draws
from trajstore.problems._streams import RowBatches
from trajstore.problems.batches import Sampling, generator
from trajstore.reading.drawing import drawing_of
from trajstore.replay.reviving import Revived

__all__ = ["fresh_batches", "trains_otherwise"]

_FRESH = 2**62
"""Data seeds from here on are for fresh draws."""
_AWAY = 0.1
"""How far from θ₀ each parameter is moved: what is built of zeros does not show there what it does."""
_UNITS = 1_000
"""Losses nearer than so many units in the last place are the same."""


def fresh_batches(revived: Revived, seed: int, sampling: Sampling | None = None) -> Batches:
    """Return a stream of batches that no recording uses: drawn as the experiment's are, or as is asked for."""
    stream = revived.live.batches(_FRESH + seed)
    if sampling is None:
        return stream
    if isinstance(stream, RowBatches):
        fits = stream.batch_size <= len(stream.tensors[0])
        return stream.redrawn(sampling if fits else "iid", _FRESH + seed)
    if sampling == "iid" and drawing_of(revived.stored.attributes).sampling != "iid":
        raise StatisticError(
            f"experiment {revived.name!r}: its problem draws batches in its own way, which is not known to be "
            "independently, and its loss in training is not that in evaluation, so its noise cannot be told"
        )
    return stream


def trains_otherwise(revived: Revived) -> bool:
    """Tell whether the loss in training is no mean over examples of the loss in evaluation.

    It is not if it draws at random, if it changes buffers (running statistics), or if the loss of two batches together
    is not the mean of theirs.
    """
    live, stream = revived.live, revived.live.batches(_FRESH)
    batch = stream[1]
    if (isinstance(live, Draws) and live.draws) or any(tensor.ndim == 0 for tensor in batch):
        return True
    start = revived.start(revived.schema.seeds[0])
    moves = signs(start.params, generator(0, "analysis"))
    params = {name: p + _AWAY * moves[name].to(p) for name, p in start.params.items()}
    with torch.no_grad():
        loss, buffers = live.loss(params, start.buffers, batch)
        if any(not torch.equal(b, buffers[name]) for name, b in start.buffers.items()):
            return True
        if not isinstance(stream, RowBatches):
            return False
        other, _ = live.loss(params, start.buffers, stream[2])
        together, _ = live.loss(params, start.buffers, _joined(batch, stream[2]))
    gap = abs(together.double() - (loss.double() + other.double()) / 2)
    return bool(gap > _UNITS * torch.finfo(loss.dtype).eps * max(abs(loss), abs(other)))


def _joined(one: Batch, other: Batch) -> Batch:
    return cast(tuple[Tensor, ...], tuple(torch.cat(pair) for pair in zip(one, other, strict=True)))
