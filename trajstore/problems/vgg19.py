"""VGG-19 on small images, Figure 8 of the paper: torchvision's convolutions, and one linear layer on their 512 outputs.

The two hidden layers of 4,096 units that torchvision adds are for ImageNet: they would have 120 of 139 million
parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from trajstore.errors import ConfigurationError
from trajstore.problems import Problem
from trajstore.problems._classifier import Classifier, Shape, divided

__all__ = ["FAMILY", "VGG19"]

_HALVINGS = 5


@dataclass(frozen=True)
class VGG19(Classifier):
    """Configuration E without batch normalisation."""

    narrow: int = 1
    """By how much all numbers of channels are divided."""

    def network(self, shape: Shape, classes: int) -> nn.Module:
        """Return the network."""
        from torchvision.models import vgg

        channels, height, width = shape
        if min(height, width) < 2**_HALVINGS:
            raise ConfigurationError(
                f"problem vgg19: images are {height}×{width}, too small to halve {_HALVINGS} times; set images.size"
            )
        plan = [layer if isinstance(layer, str) else divided(layer, self.narrow) for layer in vgg.cfgs["E"]]
        features = vgg.make_layers(plan)
        if channels != 3:
            features[0] = nn.Conv2d(channels, features[0].out_channels, kernel_size=3, padding=1)
        net = nn.Sequential(
            features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(divided(512, self.narrow), classes)
        )
        for layer in net.modules():  # as torchvision.models.VGG does
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0, 0.01)
                nn.init.zeros_(layer.bias)
        return net


FAMILY: type[Problem] = VGG19
