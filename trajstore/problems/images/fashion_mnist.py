"""Fashion-MNIST: 28×28 grey images of 10 kinds of clothes, 60,000 and 10,000, in ROOT/FashionMNIST/raw."""

from __future__ import annotations

from dataclasses import dataclass

from trajstore.problems.images import Images
from trajstore.problems.images._torchvision import Torchvision

__all__ = ["FAMILY", "FashionMNIST"]


@dataclass(frozen=True)
class FashionMNIST(Torchvision):
    """The original files."""

    name = "FashionMNIST"


FAMILY: type[Images] = FashionMNIST
