"""ResNet-50 on small images, Figure 9 of the paper."""

from __future__ import annotations

from dataclasses import dataclass

from trajstore.problems import Problem
from trajstore.problems._resnet import ResNet

__all__ = ["FAMILY", "ResNet50"]


@dataclass(frozen=True)
class ResNet50(ResNet):
    """Sixteen bottleneck blocks."""

    blocks = (3, 4, 6, 3)
    bottleneck = True


FAMILY: type[Problem] = ResNet50
