"""A multilayer perceptron on images, Figures 3, 7, 10 and 14 to 19 of the paper: 5 hidden layers of 500 ReLU units."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from trajstore.errors import ConfigurationError
from trajstore.problems import Problem
from trajstore.problems._classifier import Classifier, Shape

__all__ = ["FAMILY", "MLP"]


@dataclass(frozen=True)
class MLP(Classifier):
    """`depth` hidden layers of `width` ReLU units."""

    depth: int = 5
    width: int = 500

    def __post_init__(self) -> None:
        if self.depth < 0 or self.width < 1:
            raise ConfigurationError(
                f"problem mlp: depth {self.depth}, width {self.width}; depth must be at least 0, width at least 1"
            )

    def network(self, shape: Shape, classes: int) -> nn.Module:
        """Return the network."""
        channels, height, width = shape
        sizes = [channels * height * width, *[self.width] * self.depth]
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], classes))


FAMILY: type[Problem] = MLP
