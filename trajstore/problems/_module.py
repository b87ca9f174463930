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
that draw random numbers in training are keyed by (data seed, i): dropout modules draw their masks from
`trajstore._common.keyed`, anything else from torch's generator, seeded at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trajstore._common.keyed import keyed_uniform
from trajstore.errors import ConfigurationError, TrajstoreError
from trajstore.operators import Batch
from trajstore.operators.state import Tensors
from trajstore.problems import PROBES, Batches, DType, LiveProblem, torch_dtype
from trajstore.problems._streams import RowBatches
from trajstore.problems.batches import Sampling, draws

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
    they appear as ``train_<name>`` and ``test_<name>``. With `drawn_together` = c, c successive batches are the parts
    of one that is c times as large. `eval_batch` bounds the memory of an evaluation. `dtype` casts module and data;
    None leaves them as they are. Frozen parameters (``requires_grad = False``) stay as they are.
    """

    module: Callable[[], nn.Module]
    loss: Score
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor] | None = None
    batch_size: int = 1
    sampling: Sampling = "iid"
    drawn_together: int = 1
    metrics: Mapping[str, Score] = field(default_factory=dict)
    eval_batch: int = 1000
    dtype: DType | None = None
    data: str | None = None
    """A digest of the data, for the record of where a recording comes from."""

    def __post_init__(self) -> None:
        for name, pair in self.splits.items():
            if not (isinstance(pair, tuple | list) and len(pair) == 2):
                raise ConfigurationError(f"{name} data: give a pair (inputs, targets), not a {type(pair).__name__}")
            x, y = pair
            if len(x) != len(y) or len(x) == 0:
                raise ConfigurationError(f"{name} data: {len(x)} inputs and {len(y)} targets; need as many, and some")
        if self.eval_batch < 1:
            raise ConfigurationError(f"eval_batch is {self.eval_batch}; it must be at least 1")
        draws(
            self.sampling, len(self.train[0]), self.batch_size, 0, self.drawn_together
        )  # refuses what cannot be drawn

    @property
    def splits(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The data sets that metrics are evaluated on."""
        return {"train": self.train} | ({} if self.test is None else {"test": self.test})

    def build(self, device: torch.device) -> LiveProblem:
        """Return the live problem on a device, once its first batch has gone through."""
        try:
            return _Live(self, device)
        except TrajstoreError:
            raise
        except Exception as error:
            message = " ".join(str(error).split())
            raise ConfigurationError(
                f"the module fails on its first batch: {type(error).__name__}: {message}"
            ) from error


class _Live:
    def __init__(self, family: ModuleProblem, device: torch.device) -> None:
        self._family = family
        self._device = device
        self.data = family.data
        self._splits = {k: (self._cast(x), self._cast(y)) for k, (x, y) in family.splits.items()}
        self._scores: dict[str, Score] = {"loss": family.loss, **family.metrics}
        self.examples: dict[str, int | None] = {
            f"{split}_{score}": len(x) for score in self._scores for split, (x, _) in self._splits.items()
        }
        self._module = self._build(0)
        stored = dict(self._module.named_parameters()) | dict(self._module.named_buffers())
        names = {id(t): name for name, t in stored.items()}
        full = {n: t for n, t in self._module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
        self.tied = {name: names[id(t)] for name, t in full.items() if name not in stored}
        self.transient = frozenset(stored) - frozenset(full)
        self._dropouts = _key_dropouts(self._module, device)
        self.draws = False
        self.draws = self._first_batch_draws()

    def initial(self, init_seed: int) -> tuple[Tensors, Tensors]:
        module = self._build(init_seed)
        params = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        frozen = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
        return params, frozen | {name: b.clone() for name, b in module.named_buffers()}

    def batches(self, data_seed: int) -> Batches:
        f = self._family
        draw = draws(f.sampling, len(f.train[0]), f.batch_size, data_seed, f.drawn_together)
        keyed = bool(self._dropouts) or self.draws
        return RowBatches(draw, f.batch_size, self._splits["train"], data_seed if keyed else None)

    def loss(self, params: Tensors, buffers: Tensors, batch: Batch) -> tuple[Tensor, Tensors]:
        x, y, *key = batch
        self._module.train()
        after = {name: b.clone() for name, b in buffers.items()}  # BatchNorm writes into them
        keys: Tensors = {}
        for name, dropout in self._dropouts.items():
            keys[f"{name}.key" if name else "key"] = key[0]
            dropout.calls = 0
        if not self.draws:
            return self._family.loss(self._call(params, after | keys, x), y), after
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(int(key[0]))
            return self._family.loss(self._call(params, after | keys, x), y), after

    def evaluate(self, params: Tensors, buffers: Tensors) -> Tensors:
        self._module.eval()
        return {
            f"{split}_{name}": self._mean(score, params, buffers, x, y)
            for name, score in self._scores.items()
            for split, (x, y) in self._splits.items()
        }

    def outputs(self, params: Tensors, buffers: Tensors) -> Tensor:
        self._module.eval()
        x, _ = self._splits.get("test", self._splits["train"])
        return self._call(params, buffers, x[:PROBES])

    def _mean(self, score: Score, params: Tensors, buffers: Tensors, x: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for at in range(0, len(x), self._family.eval_batch):
            inputs, targets = x[at : at + self._family.eval_batch], y[at : at + self._family.eval_batch]
            total = total + len(inputs) * score(self._call(params, buffers, inputs), targets).double()
        return total / len(x)

    def _call(self, params: Tensors, buffers: Tensors, x: Tensor) -> Tensor:
        outputs: Tensor = torch.func.functional_call(self._module, (params, buffers), (x,))
        return outputs

    def _build(self, seed: int) -> nn.Module:
        module = seeded(self._family.module, seed).to(self._device)
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters()):
            raise ConfigurationError("the module has lazy layers; give them their input sizes, so that θ₀ is defined")
        if not any(p.requires_grad for p in module.parameters()):
            raise ConfigurationError("the module has no parameter to train")
        return module if self._family.dtype is None else module.to(torch_dtype(self._family.dtype))

    def _cast(self, data: Tensor) -> Tensor:
        dtype = self._family.dtype
        return data.to(self._device, torch_dtype(dtype) if dtype and data.is_floating_point() else data.dtype)

    def _first_batch_draws(self) -> bool:
        """Try a batch, and tell whether it draws from torch's generator besides the dropout modules."""
        x, y = (t[: self._family.batch_size] for t in self._splits["train"])
        key = torch.zeros((), dtype=torch.int64, device=self._device)
        devices = [self._device] if self._device.type == "cuda" else []
        params, buffers = self.initial(0)
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            before = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]
            loss, _ = self.loss(params, buffers, (x, y, key))
            after = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]
            self._module.eval()
            for name, score in self._scores.items():
                value = score(self._call(params, buffers, x), y)
                if value.ndim:
                    raise ConfigurationError(
                        f"metric {name!r} gives a tensor of shape {tuple(value.shape)}; "
                        "it must give one number, the mean over the examples"
                    )
        if loss.ndim:
            raise ConfigurationError(f"the loss gives a tensor of shape {tuple(loss.shape)}; it must give one number")
        return not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


class _KeyedDropout(nn.Dropout):
    """Dropout whose mask is a function of a key, of which dropout it is, and of how often it was called.

    The key is a buffer, so that `functional_call` can set it, for a stack of chains too.
    """

    key: Tensor

    def __init__(self, p: float, salt: int, channels: bool) -> None:
        super().__init__(p)
        self._salt, self._channels, self.calls = salt, channels, 0
        self.register_buffer("key", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        # Channels are the first dimension after the examples.
        shape = (*input.shape[:2], *(1 for _ in input.shape[2:])) if self._channels else tuple(input.shape)
        kept = keyed_uniform(self.key, 1024 * self._salt + self.calls, shape) >= self.p
        self.calls += 1
        return torch.where(kept, input / (1 - self.p), 0) if self.p < 1 else input * 0


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def _key_dropouts(module: nn.Module, device: torch.device) -> dict[str, _KeyedDropout]:
    """Replace torch's dropout modules by keyed ones, and return these by name.

    Subclasses keep what they do; they draw from torch's generator.
    """
    salt = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _DROPOUTS) and type(child) in _DROPOUTS:
                setattr(parent, name, _KeyedDropout(child.p, salt, type(child) is not nn.Dropout).to(device))
                salt += 1
    return {name: m for name, m in module.named_modules() if isinstance(m, _KeyedDropout)}
