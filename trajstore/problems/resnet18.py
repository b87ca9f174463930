"""ResNet-18 on small images, Figures 2, 11 and 12 of the paper."""

from __future__ import annotations

from dataclasses import dataclass

from trajstore.problems import Problem
from trajstore.problems._resnet import ResNet

__all__ = ["FAMILY", "ResNet18"]


@dataclass(frozen=True)
class ResNet18(ResNet):
    """Eight basic blocks."""

    blocks = (2, 2, 2, 2)
    bottleneck = False


FAMILY: type[Problem] = ResNet18
