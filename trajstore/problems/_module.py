"""A problem from any `torch.nn.Module` and tensors that fit in memory: the quickest way to your own.

::

    def make() -> ts.ModuleProblem:
        return ts.ModuleProblem(
            module=lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
            loss=nn.functional.cross_entropy,
            train=(X, y), test=(X_test, y_test), batch_size=8,
            metrics={"accuracy": lambda out, y: (out.argmax(-1) == y).double().mean()},
        )

and then ``problem = "my_file:make"`` in an experiment. The module is built after seeding torch with the init
seed, and called through `torch.func.functional_call`, so BatchNorm statistics are part of the state. Modules
that draw random numbers in training (dropout) are seeded from (data seed, i) at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trajstore.batches import Sampling, draws, generator
from trajstore.errors import ConfigurationError
from trajstore.operators import Batch
from trajstore.problems import Batches, LiveProblem
from trajstore.problems._streams import RowBatches
from trajstore.state import Tensors

__all__ = ["ModuleProblem", "seeded"]

Score = Callable[[Tensor, Tensor], Tensor]


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a module under a seed, on the CPU, and leave torch's global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


@dataclass(frozen=True)
class ModuleProblem:
    """θ₀ and the loss of a module on (inputs, targets).

    `metrics` are extra scores besides the loss, each a mean over the examples given `(outputs, targets)`;
    they appear as ``train_<name>`` and ``test_<name>``. `eval_batch` bounds the memory of an evaluation.
    """

    module: Callable[[], nn.Module]
    loss: Score
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor] | None = None
    batch_size: int = 1
    sampling: Sampling = "iid"
    metrics: Mapping[str, Score] = field(default_factory=dict)
    eval_batch: int = 1000

    def __post_init__(self) -> None:
        for name, (x, y) in self.splits.items():
            if len(x) != len(y) or len(x) == 0:
                raise ConfigurationError(f"{name} data: {len(x)} inputs and {len(y)} targets; need as many, and some")
        draws(self.sampling, len(self.train[0]), self.batch_size, 0)  # refuses a batch that cannot be drawn

    @property
    def splits(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The data sets that metrics are evaluated on."""
        return {"train": self.train} | ({"test": self.test} if self.test else {})

    def build(self, device: torch.device) -> LiveProblem:
        """Return the live problem on a device."""
        return _Live(self, device)


class _Live:
    def __init__(self, family: ModuleProblem, device: torch.device) -> None:
        self._family = family
        self._device = device
        self._splits = {k: (x.to(device), y.to(device)) for k, (x, y) in family.splits.items()}
        self._scores: dict[str, Score] = {"loss": family.loss, **family.metrics}
        self.examples: dict[str, int | None] = {
            f"{split}_{score}": len(x) for score in self._scores for split, (x, _) in self._splits.items()
        }
        self._module = seeded(family.module, 0).to(device)
        stored = dict(self._module.named_parameters()) | dict(self._module.named_buffers())
        names = {id(t): name for name, t in stored.items()}
        full = self._module.state_dict(keep_vars=True)
        self.tied = {name: names[id(t)] for name, t in full.items() if name not in stored}
        self.transient = frozenset(stored) - frozenset(full)
        self._stochastic = any(isinstance(m, nn.modules.dropout._DropoutNd) for m in self._module.modules())

    def initial(self, init_seed: int) -> tuple[Tensors, Tensors]:
        module = seeded(self._family.module, init_seed)
        params = {name: p.detach().clone().to(self._device) for name, p in module.named_parameters()}
        return params, {name: b.clone().to(self._device) for name, b in module.named_buffers()}

    def batches(self, data_seed: int) -> Batches:
        f = self._family
        rows = RowBatches(
            draws(f.sampling, len(f.train[0]), f.batch_size, data_seed), f.batch_size, self._splits["train"]
        )
        return _Keyed(rows, data_seed) if self._stochastic else rows

    def loss(self, params: Tensors, buffers: Tensors, batch: Batch) -> tuple[Tensor, Tensors]:
        x, y, *key = batch
        self._module.train()
        after = {name: b.clone() for name, b in buffers.items()}  # BatchNorm writes into them
        if not key:
            return self._family.loss(self._call(params, after, x), y), after
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(key[0]))
            return self._family.loss(self._call(params, after, x), y), after

    def evaluate(self, params: Tensors, buffers: Tensors) -> Tensors:
        self._module.eval()
        return {
            f"{split}_{name}": self._mean(score, params, buffers, x, y)
            for name, score in self._scores.items()
            for split, (x, y) in self._splits.items()
        }

    def _mean(self, score: Score, params: Tensors, buffers: Tensors, x: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for at in range(0, len(x), self._family.eval_batch):
            inputs, targets = x[at : at + self._family.eval_batch], y[at : at + self._family.eval_batch]
            total = total + len(inputs) * score(self._call(params, buffers, inputs), targets).double()
        return total / len(x)

    def _call(self, params: Tensors, buffers: Tensors, x: Tensor) -> Tensor:
        outputs: Tensor = torch.func.functional_call(self._module, (params, buffers), (x,))
        return outputs


class _Keyed:
    """A batch stream with the noise key of (data seed, i) behind the rows."""

    def __init__(self, rows: RowBatches, data_seed: int) -> None:
        self.batch_size, self.examples = rows.batch_size, rows.examples
        self._rows, self._seed = rows, data_seed

    def __getitem__(self, i: int) -> Batch:
        key = int(generator(self._seed, "noise", i).integers(2**62))
        return (*self._rows[i], torch.tensor(key))
