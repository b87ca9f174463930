"""CIFAR-100: 32×32 colour images of 100 classes, 50,000 and 10,000, in ROOT/cifar-100-python."""

from __future__ import annotations

from dataclasses import dataclass

from trajstore.problems.images import Images
from trajstore.problems.images._torchvision import Torchvision

__all__ = ["CIFAR100", "FAMILY"]


@dataclass(frozen=True)
class CIFAR100(Torchvision):
    """The original files."""

    name = "CIFAR100"


FAMILY: type[Images] = CIFAR100
