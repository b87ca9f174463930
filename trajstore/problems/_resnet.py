"""torchvision's residual networks for small images: the first convolution halves nothing, no pooling follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from trajstore.problems._classifier import Classifier, Shape, divided

__all__ = ["ResNet"]

_FIRST = 64
"""Channels of torchvision's first convolution."""


@dataclass(frozen=True)
class ResNet(Classifier):
    """With batch normalisation: running statistics are part of the state."""

    narrow: int = 1
    """By how much all numbers of channels are divided."""
    blocks: ClassVar[tuple[int, int, int, int]]
    bottleneck: ClassVar[bool]

    def network(self, shape: Shape, classes: int) -> nn.Module:
        """Return the network."""
        from torchvision.models import resnet

        block = resnet.Bottleneck if self.bottleneck else resnet.BasicBlock
        net: nn.Module = _narrow(self.narrow)(block, list(self.blocks))
        first = divided(_FIRST, self.narrow)
        net.conv1 = nn.Conv2d(shape[0], first, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.bn1 = nn.BatchNorm2d(first)
        net.maxpool = nn.Identity()
        net.fc = nn.Linear(divided(512, self.narrow) * block.expansion, classes)
        return net


def _narrow(narrow: int) -> Callable[..., Any]:
    """Return torchvision's class with fewer channels; it has no option for that, but a method that makes all layers."""
    from torchvision.models import resnet

    class Narrow(resnet.ResNet):
        def _make_layer(self, block: Any, planes: int, *more: Any, **options: Any) -> nn.Sequential:  # noqa: ANN401
            if planes == _FIRST:
                self.inplanes = divided(_FIRST, narrow)
            layer: nn.Sequential = super()._make_layer(block, divided(planes, narrow), *more, **options)
            return layer

    return Narrow
