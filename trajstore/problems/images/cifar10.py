"""CIFAR-10: 32×32 colour images of 10 classes, 50,000 and 10,000, in ROOT/cifar-10-batches-py."""

from __future__ import annotations

from dataclasses import dataclass

from trajstore.problems.images import Images
from trajstore.problems.images._torchvision import Torchvision

__all__ = ["CIFAR10", "FAMILY"]


@dataclass(frozen=True)
class CIFAR10(Torchvision):
    """The original files."""

    name = "CIFAR10"


FAMILY: type[Images] = CIFAR10
