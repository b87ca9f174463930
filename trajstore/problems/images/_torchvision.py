"""What the data sets of torchvision have in common: their files are looked for, never fetched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any, ClassVar

import numpy as np

from trajstore.errors import ConfigurationError
from trajstore.problems.images import Part, Selection, root_of

__all__ = ["Torchvision"]


@dataclass(frozen=True)
class Torchvision(Selection):
    """The original files of a data set, as torchvision reads them."""

    root: str | None = None
    """A folder; by default that of TRAJSTORE_DATA, or ``data``."""
    name: ClassVar[str]
    """What torchvision calls it."""

    def part(self, train: bool) -> Part:
        """Return the train or the test part."""
        from torchvision import datasets

        kind: Callable[..., Any] = getattr(datasets, self.name)
        root = root_of(self.root)
        try:
            found = kind(str(root), train=train, download=False)
        except RuntimeError as error:
            fetch = f"from torchvision.datasets import {self.name}; {self.name}('{root}', download=True)"
            raise ConfigurationError(
                f"images: {self.name} is not in the folder {root}, or is incomplete ({str(error).partition('.')[0]}); "
                f'fetch it by python -c "{fetch}", set TRAJSTORE_DATA to its folder, or take images = "shapes", which '
                "needs no download"
            ) from None
        except (AssertionError, ValueError, IndexError, EOFError, UnpicklingError) as error:
            told = f"{type(error).__name__}: {error}".rstrip(": ")
            raise ConfigurationError(
                f"images: the files of {self.name} in {root} are damaged ({told}); fetch them again"
            ) from None
        if len(found.targets) != len(found.data):
            counts = f"{len(found.data)} images and {len(found.targets)} labels"
            raise ConfigurationError(f"images: the files of {self.name} in {root} do not fit: they hold {counts}")
        pixels = np.asarray(found.data)
        pixels = pixels[..., None] if pixels.ndim == 3 else pixels  # grey
        return Part(np.asarray(found.targets, dtype=np.int64), len(found.classes), lambda positions: pixels[positions])
