"""What problems that classify images have in common: cross entropy and accuracy, no augmentation, no regularization."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trajstore.batches import Sampling
from trajstore.errors import ConfigurationError
from trajstore.images import Images
from trajstore.images.shapes import Shapes
from trajstore.problems import DType, LiveProblem
from trajstore.problems._module import ModuleProblem

__all__ = ["Classifier", "Shape", "divided"]

Shape = tuple[int, int, int]
"""(channel, height, width)."""


@dataclass(frozen=True)
class Classifier(ABC):
    """Which images a network learns, and by which batches; families add the network."""

    images: Images = field(default_factory=Shapes)
    batch_size: int = 8
    sampling: Sampling = "iid"
    dtype: DType = "float32"
    eval_batch: int = 500
    """Images that are evaluated at a time; it bounds the memory."""

    @abstractmethod
    def network(self, shape: Shape, classes: int) -> nn.Module:
        """Return the network for images of (channel, height, width), freshly initialised from torch's generator."""

    def build(self, device: torch.device) -> LiveProblem:
        """Return the live problem on a device."""
        data = self.images.load()
        shape, classes = data.shape, data.classes
        return ModuleProblem(
            module=lambda: self.network(shape, classes),
            loss=F.cross_entropy,
            train=data.train,
            test=data.test,
            batch_size=self.batch_size,
            sampling=self.sampling,
            metrics={"accuracy": _accuracy},
            eval_batch=self.eval_batch,
            dtype=self.dtype,
            data=data.digest,
        ).build(device)


def _accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs.argmax(-1) == labels).double().mean()


def divided(channels: int, narrow: int) -> int:
    """Return a number of channels over `narrow`, which must divide it."""
    if narrow < 1 or channels % narrow:
        raise ConfigurationError(f"narrow is {narrow}; it must divide {channels} channels")
    return channels // narrow
