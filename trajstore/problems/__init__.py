"""Problems: θ₀ from an init seed, a loss on a batch, a batch stream, evaluation metrics.

One family a file. A family is a declaration: a frozen dataclass whose fields are its configuration, and
whose `build` gives the live problem with its tensors on a device. Your own problem is anything with such a
`build`; for a `torch.nn.Module` on data that fits in memory, `trajstore.ModuleProblem` has it
ready-made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trajstore.operators import Batch
from trajstore.operators.state import Tensors

__all__ = [
    "FAMILIES",
    "PROBES",
    "Batches",
    "DType",
    "Draws",
    "KnowsItsData",
    "LiveProblem",
    "Predicts",
    "Problem",
    "torch_dtype",
]

FAMILIES = (
    "factory",
    "least_squares",
    "mlp",
    "quadratic",
    "regression",
    "resnet18",
    "resnet50",
    "two_constants",
    "vgg19",
)
"""Modules that declare one."""

PROBES = 256
"""Examples that outputs are asked of."""

DType = Literal["float32", "float64"]


def torch_dtype(name: DType) -> torch.dtype:
    """Return the torch dtype of that name."""
    return torch.float64 if name == "float64" else torch.float32


class Batches(Protocol):
    """The batch stream of one data seed, by index i = 1, 2, …"""

    @property
    def batch_size(self) -> int:
        """Examples a batch; 0 where batches are noise and no examples."""

    def __getitem__(self, i: int) -> Batch:
        """Return B_i as tensors on the problem's device."""

    def examples(self, i: int) -> NDArray[np.int64]:
        """Return which examples B_i holds, `batch_size` of them."""


class LiveProblem(Protocol):
    """A problem with its tensors on a device. Every function is pure."""

    @property
    def examples(self) -> Mapping[str, int | None]:
        """Metric → how many examples it averages; None where it is an exact expectation."""

    def initial(self, init_seed: int) -> tuple[Tensors, Tensors]:
        """Return the parameters and buffers of θ₀, the same on every device."""

    def batches(self, data_seed: int) -> Batches:
        """Return the batch stream of a data seed."""

    def loss(self, params: Tensors, buffers: Tensors, batch: Batch) -> tuple[Tensor, Tensors]:
        """Return the loss on a batch, and the buffers after the forward pass."""

    def evaluate(self, params: Tensors, buffers: Tensors) -> Tensors:
        """Return every metric as a 0-dimensional float64 tensor."""


@runtime_checkable
class NamesOfModule(Protocol):
    """What a live problem may add, so that stored states load into its module strictly."""

    @property
    def tied(self) -> Mapping[str, str]:
        """Second name of a shared tensor → the name that is stored."""

    @property
    def transient(self) -> frozenset[str]:
        """Buffers that `state_dict` leaves out."""


@runtime_checkable
class Predicts(Protocol):
    """What a live problem may add: what its model says of a few fixed examples, the probe."""

    def outputs(self, params: Tensors, buffers: Tensors) -> Tensor:
        """Return the outputs on the first `PROBES` test examples, or training examples: (example, …)."""


@runtime_checkable
class Draws(Protocol):
    """What a live problem may add: its loss may draw from torch's global generator, which two threads would share."""

    @property
    def draws(self) -> bool:
        """Whether it does."""


@runtime_checkable
class KnowsItsData(Protocol):
    """What a live problem may add, where its data are read from files that may come to be others."""

    @property
    def data(self) -> str | None:
        """A digest of them."""


class Problem(Protocol):
    """The declaration of a problem."""

    def build(self, device: torch.device) -> LiveProblem:
        """Return the live problem on a device."""
