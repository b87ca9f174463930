"""Ten kinds of shapes, drawn by a formula: a data set that needs no download.

Disk, ring, square, frame, triangle, cross, diagonal cross, horizontal and vertical stripes, chequers: each about the
middle, of a random size and brightness, blurred at its edge, on a noisy background. An image is a function of its
number alone. A linear classifier gets 97% of the test images right and a small network 98%: easy, as short runs need.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trajstore.problems.batches import generator
from trajstore.problems.images import Images, Part, Selection

__all__ = ["FAMILY", "Shapes"]

_CLASSES, _TRAIN, _TEST = 10, 4_000, 1_000


@dataclass(frozen=True)
class Shapes(Selection):
    """4,000 images to train on and 1,000 to test on, balanced."""

    pixels: int = 28
    """Height and width as they are drawn."""
    channels: int = 1
    """1 for grey; with 3, shapes and backgrounds have colours that say nothing of the class."""

    def part(self, train: bool) -> Part:
        """Return the train or the test part."""
        count = _TRAIN if train else _TEST
        labels = np.arange(count) % _CLASSES
        first = 0 if train else _TRAIN

        def images(positions: NDArray[np.int64]) -> NDArray[np.uint8]:
            return np.stack([self._draw(first + at, int(labels[at])) for at in positions.tolist()])

        return Part(labels, _CLASSES, images)

    def _draw(self, number: int, kind: int) -> NDArray[np.uint8]:
        rng = generator(number, "images", 2)
        radius, centre = rng.uniform(0.5, 0.8), rng.uniform(-0.15, 0.15, 2)
        axis = (np.arange(self.pixels) + 0.5) * 2 / self.pixels - 1
        y, x = np.meshgrid((axis - centre[0]) / radius, (axis - centre[1]) / radius, indexing="ij")
        edge = radius * self.pixels / 2
        inside = np.clip(_depth(kind, x, y) * edge + 0.5, 0, 1)[..., None]
        ink, paper = rng.uniform(0.5, 1, self.channels), rng.uniform(0, 0.3, self.channels)
        noise = rng.normal(0, 0.08, (self.pixels, self.pixels, self.channels))
        return (255 * np.clip(inside * ink + (1 - inside) * paper + noise, 0, 1)).round().astype(np.uint8)


def _depth(kind: int, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how far inside the shape of radius 1 each point is, negative outside."""
    far, box = np.hypot(x, y), np.maximum(np.abs(x), np.abs(y))
    u, v = (x + y) / np.sqrt(2), (x - y) / np.sqrt(2)
    bars = np.minimum(1 - box, 0.2 - np.minimum(np.abs(x), np.abs(y)))
    crossed = np.minimum(1 - far, 0.2 - np.minimum(np.abs(u), np.abs(v)))
    return (
        1 - far,
        0.25 - np.abs(far - 0.75),
        1 - box,
        np.minimum(1 - box, box - 0.6),
        np.minimum(0.8 - y, (y + 1 - 1.8 * np.abs(x)) / 2),
        bars,
        crossed,
        np.minimum(1 - box, 0.2 - np.abs((y * 1.5) % 1 - 0.5)),
        np.minimum(1 - box, 0.2 - np.abs((x * 1.5) % 1 - 0.5)),
        np.minimum(1 - box, np.sin(np.pi * x * 1.5) * np.sin(np.pi * y * 1.5)),
    )[kind]


FAMILY: type[Images] = Shapes
