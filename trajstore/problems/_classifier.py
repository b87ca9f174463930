"""What problems that classify images have in common: cross entropy and accuracy, no augmentation, no regularization."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trajstore.errors import ConfigurationError
from trajstore.problems import DType, LiveProblem
from trajstore.problems._module import ModuleProblem
from trajstore.problems.batches import Sampling
from trajstore.problems.images import Images
from trajstore.problems.images.shapes import Shapes

__all__ = ["Classifier", "Shape", "divided"]

Shape = tuple[int, int, int]
"""(channel, height, width)."""

_GAIN: Mapping[str, Literal["linear", "relu"]] = {"lecun": "linear", "he": "relu"}
"""What torch calls weights of variance 1 and 2 over the inputs of their layer."""


@dataclass(frozen=True)
class Classifier(ABC):
    """Which images a network learns, and by which batches; families add the network."""

    images: Images = field(default_factory=Shapes)
    batch_size: int = 8
    sampling: Sampling = "iid"
    drawn_together: int = 1
    """With c, c successive batches are the parts of one c times as large: small batches to pair with large ones."""
    dtype: DType = "float32"
    init: Literal["torch", "lecun", "he"] = "torch"
    """torch's and torchvision's initialisation, or normal weights and zero biases; `lecun` is what Flax does."""
    eval_batch: int = 500
    """Images that are evaluated at a time; it bounds the memory."""

    @abstractmethod
    def network(self, shape: Shape, classes: int) -> nn.Module:
        """Return the network for images of (channel, height, width), initialised from torch's generator."""

    def fresh(self, shape: Shape, classes: int) -> nn.Module:
        """Return the network as `init` asks."""
        net = self.network(shape, classes)
        if self.init != "torch":
            for layer in net.modules():
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity=_GAIN[self.init])
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
        return net

    def build(self, device: torch.device) -> LiveProblem:
        """Return the live problem on a device."""
        data = self.images.load()
        shape, classes = data.shape, data.classes
        return ModuleProblem(
            module=lambda: self.fresh(shape, classes),
            loss=F.cross_entropy,
            train=data.train,
            test=data.test,
            batch_size=self.batch_size,
            sampling=self.sampling,
            drawn_together=self.drawn_together,
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
