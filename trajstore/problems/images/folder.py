"""A folder of images: ``train/<class>/<image>`` and ``test/<class>/<image>``, in any format that Pillow reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trajstore.errors import ConfigurationError
from trajstore.problems.images import Images, Part, Selection, root_of

__all__ = ["FAMILY", "Folder"]


@dataclass(frozen=True)
class Folder(Selection):
    """Images of one size, in colour; the classes are the sorted names of the folders to train on."""

    path: str = "."
    """Where ``train`` and ``test`` lie; relative to the folder of TRAJSTORE_DATA, or ``data``."""

    def part(self, train: bool) -> Part:
        """Return the train or the test part."""
        from torchvision.datasets import ImageFolder

        where = root_of(None) / self.path / ("train" if train else "test")
        if not where.is_dir():
            raise ConfigurationError(
                f"images: there is no folder {where}; it must hold a folder for each class, and in these the images"
            )
        try:
            found = ImageFolder(str(where))
        except FileNotFoundError as error:
            raise ConfigurationError(f"images: {' '.join(str(error).split())}") from None

        classes = sorted(found.classes if train else (p.name for p in (where.parent / "train").iterdir() if p.is_dir()))
        if strange := [name for name in found.classes if name not in classes]:
            raise ConfigurationError(f"images: {where} has a class {strange[0]!r}, of which there is none to train on")
        labels = np.array([classes.index(name) for name in found.classes], dtype=np.int64)

        def images(positions: NDArray[np.int64]) -> NDArray[np.uint8]:
            first: NDArray[np.uint8] | None = None
            for k, at in enumerate(positions.tolist()):
                path, _ = found.samples[at]
                pixels = np.asarray(found.loader(path), dtype=np.uint8)
                if first is None:
                    first = np.empty((len(positions), *pixels.shape), np.uint8)
                elif first.shape[1:] != pixels.shape:
                    raise ConfigurationError(_of_another_size(Path(path), pixels, first))
                first[k] = pixels
            assert first is not None  # there is at least one image
            return first

        return Part(labels[found.targets], len(classes), images)


def _of_another_size(path: Path, pixels: NDArray[np.uint8], others: NDArray[np.uint8]) -> str:
    height, width = pixels.shape[:2]
    return (
        f"images: {path} is {height}×{width}, and others are {others.shape[1]}×{others.shape[2]}; "
        "all must be of one size"
    )


FAMILY: type[Images] = Folder
