"""Data sets of images, one a file: a train and a test part as tensors, with a digest that tells what they are.

A data set is a declaration: where it lies, how many images of each part are taken, and how large they are made. Images
are read as their owners distribute them, mostly by torchvision; pixels become numbers from 0 to 1 and nothing else is
done to them: no augmentation, and no scaling by mean and deviation.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trajstore.errors import ConfigurationError
from trajstore.problems.batches import generator

__all__ = ["FAMILIES", "Images", "Loaded", "Part", "Selection", "root_of"]

FAMILIES = (
    "cifar10",
    "cifar100",
    "fashion_mnist",
    "folder",
    "mnist",
    "shapes",
)
"""Modules that declare one."""

_TOGETHER = 1024
"""Images that are made smaller at a time."""


class Loaded(NamedTuple):
    """A data set in memory."""

    train: tuple[Tensor, Tensor]
    """Images (image, channel, height, width) from 0 to 1, and their labels."""
    test: tuple[Tensor, Tensor]
    classes: int
    digest: str
    """SHA-256 of the pixels and labels that were taken, before they were made smaller."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channel, height, width)."""
        channels, height, width = self.train[0].shape[1:]
        return channels, height, width


class Images(Protocol):
    """The declaration of a data set."""

    def load(self) -> Loaded:
        """Read it."""


class Part(NamedTuple):
    """The train or the test part of a data set, before anything of it is chosen."""

    labels: NDArray[np.int64]
    classes: int
    images: Callable[[NDArray[np.int64]], NDArray[np.uint8]]
    """Positions → their images, (image, height, width, channel)."""


@dataclass(frozen=True)
class Selection(ABC):
    """How much of a data set is taken, and how large it is made; families add where it lies.

    Images are drawn at random and always in the same way, so that a smaller selection is part of a larger one.
    """

    train: int | None = None
    """How many images of the train part; None: all."""
    test: int | None = None
    size: int | None = None
    """Height and width to make them; None: as they are."""

    def __post_init__(self) -> None:
        for name in ("train", "test", "size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigurationError(f"images: {name} is {value}; it must be at least 1")

    @abstractmethod
    def part(self, train: bool) -> Part:
        """Return the train or the test part, of which `load` takes what was selected."""

    def load(self) -> Loaded:
        """Read it, or return what was read before."""
        return _load(self, root_of(None))


def root_of(given: str | None) -> Path:
    """Return the folder where data sets lie: the one given, or that of TRAJSTORE_DATA, or ``data``."""
    return Path(given or os.environ.get("TRAJSTORE_DATA") or "data")


@lru_cache(2)
def _load(chosen: Selection, where: Path) -> Loaded:
    """Read a selection; `where` tells it from one that was read from elsewhere."""
    digest, parts, classes = hashlib.sha256(), [], 0
    for train, wanted in ((True, chosen.train), (False, chosen.test)):
        part = chosen.part(train)
        count = len(part.labels)
        if wanted is not None and wanted > count:
            which = "train" if train else "test"
            raise ConfigurationError(f"images: {which} is {wanted}, but that part has only {count} images")
        if count == 0:
            raise ConfigurationError(f"images: there are none in the {'train' if train else 'test'} part")
        drawn = generator(0, "images", int(train)).permutation(count)[: wanted or count]
        positions = np.sort(drawn) if wanted is None else drawn
        images, labels = part.images(positions), np.ascontiguousarray(part.labels[positions], dtype="<i8")
        for values in (np.array(images.shape, dtype="<i8"), np.ascontiguousarray(images), labels):
            digest.update(values.tobytes())
        parts.append((_numbers(images, chosen.size), torch.from_numpy(labels.astype(np.int64))))
        classes = max(classes, part.classes)
    if parts[0][0].shape[1:] != parts[1][0].shape[1:]:
        first, second = ("×".join(map(str, x.shape[1:])) for x, _ in parts)
        raise ConfigurationError(f"images: training images are {first} and test images {second}; give size")
    return Loaded(parts[0], parts[1], classes, digest.hexdigest())


def _numbers(images: NDArray[np.uint8], size: int | None) -> Tensor:
    """Return pixels as numbers from 0 to 1, (image, channel, height, width)."""
    bytes_ = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    if size is None or bytes_.shape[2:] == (size, size):
        return bytes_.float() / 255
    return torch.cat(
        [
            torch.nn.functional.interpolate(some.float() / 255, (size, size), mode="bilinear", antialias=True)
            for some in torch.split(bytes_, _TOGETHER)
        ]
    )
