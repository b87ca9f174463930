"""MNIST: 28×28 grey images of 10 digits, 60,000 and 10,000, in ROOT/MNIST/raw."""

from __future__ import annotations

from dataclasses import dataclass

from trajstore.problems.images import Images
from trajstore.problems.images._torchvision import Torchvision

__all__ = ["FAMILY", "MNIST"]


@dataclass(frozen=True)
class MNIST(Torchvision):
    """The original files."""

    name = "MNIST"


FAMILY: type[Images] = MNIST
