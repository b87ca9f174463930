"""What a recorder sees of a training loop's objects: their tensors as flat vectors, their whole state to go on from."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trajstore.errors import ConfigurationError, ConflictError
from trajstore.storage.format.layout import Entry, Layout, Role

__all__ = ["Watched", "random_state"]

Named = tuple[Role, str, Tensor]


class Watched:
    """A model, maybe its optimizer, and what else has a state that a training loop would need to go on."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        also: Mapping[str, Any],
        *,
        layers: Sequence[str] | None,
        memory: bool,
        precision: torch.dtype | None,
    ) -> None:
        self.model, self.optimizer, self._also = model, optimizer, dict(also)
        self._layers, self._memory, self._precision = layers, memory, precision
        for name, thing in self._also.items():
            if not (hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")):
                raise ConfigurationError(f"also: {name!r} has no state_dict and load_state_dict")
        if memory and optimizer is None:
            raise ConfigurationError("optimizer_state: give the optimizer, too")
        self.parameters = [p for _, p in model.named_parameters()]
        if not self.parameters:
            raise ConfigurationError("the model has no parameters")
        if layers is not None and not any(self._chosen(name) for name, _ in model.named_parameters()):
            raise ConfigurationError(f"layers: no parameter is named like {', '.join(map(repr, layers))}")

    @property
    def size(self) -> int:
        """How many parameters there are, stored or not."""
        return sum(p.numel() for p in self.parameters)

    def layout(self) -> Layout:
        """Return how the stored tensors lie in flat vectors, tied ones once."""
        stored = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        names = {id(t): name for name, t in stored.items()}
        full = {n: t for n, t in self.model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
        tied = {n: names[id(t)] for n, t in full.items() if n not in stored and self._chosen(names[id(t)])}
        entries = [
            Entry(name, role, tuple(t.shape), str(t.dtype).removeprefix("torch."), in_state_dict=name in full)
            for role, name, t in self._tensors()
        ]
        return Layout.of(entries, tied)

    def vectors(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Copy the tensors that are stored into (params, counters)."""
        floats = torch.float64 if layout.dtype == np.float64 else torch.float32
        there, device = {(role, name): t for role, name, t in self._tensors()}, self.parameters[0].device
        parts: dict[str, list[Tensor]] = {"params": [], "counters": []}
        for e in layout.entries:
            tensor = there.get((e.role, e.name))
            # Before its first step, an optimizer's memory is as good as zero.
            flat = (torch.zeros(e.shape) if tensor is None else tensor.detach()).reshape(-1).to(device)
            if e.array == "params":
                flat = (flat if self._precision is None else flat.to(self._precision)).to(floats)
            parts[e.array].append(flat if e.array == "params" else flat.to(torch.int64))
        counters = torch.cat(parts["counters"]) if parts["counters"] else torch.zeros(0, dtype=torch.int64)
        return torch.cat(parts["params"]), counters

    def weights(self, params: Tensor | None = None) -> Tensor:
        """Copy all parameters into one vector, on their device, unless `params` of `vectors` begins with them."""
        whole = params is not None and self._layers is None and self._precision is None
        if params is not None and whole and all(p.dtype == params.dtype for p in self.parameters):
            return params[: self.size]
        return torch.cat([p.detach().reshape(-1) for p in self.parameters])

    def marks(self) -> tuple[int, ...]:
        """Return numbers of which one changes whenever a tensor of the model or the optimizer is written to."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        if self.optimizer is not None:
            tensors += [t for slots in self.optimizer.state.values() for t in slots.values() if isinstance(t, Tensor)]
        return tuple(t._version for t in tensors)

    def state(self, randomness: Mapping[str, Any]) -> dict[str, Any]:
        """Return everything that it takes to go on from here."""
        own = {"model": self.model, "optimizer": self.optimizer, **{f"also {k}": v for k, v in self._also.items()}}
        tree = {name: dict(thing.state_dict()) for name, thing in own.items() if thing is not None}
        return {**tree, "random": dict(randomness)}

    def restore(self, tree: Mapping[str, Any], what: str) -> None:
        """Put everything back into the state that was stored."""
        own = {"model": self.model, "optimizer": self.optimizer, **{f"also {k}": v for k, v in self._also.items()}}
        for name, thing in own.items():
            if thing is not None:
                if name not in tree:
                    raise ConflictError(
                        f"{what}: no state of {name!r} was stored; give the objects that were given when it began"
                    )
                thing.load_state_dict(tree[name])
        _set_random_state(tree["random"])

    def _tensors(self) -> list[Named]:
        found: list[Named] = [("parameter", n, p) for n, p in self.model.named_parameters() if self._chosen(n)]
        found += [("buffer", n, b) for n, b in self.model.named_buffers() if self._chosen(n)]
        if self._memory and self.optimizer is not None:
            names = {id(p): n for n, p in self.model.named_parameters()}
            for parameter, slots in (self.optimizer.state or _rehearsed(self.optimizer)).items():
                for slot, value in slots.items():
                    if isinstance(value, Tensor) and self._chosen(names.get(id(parameter), "")):
                        found.append(("memory", f"{slot}/{names[id(parameter)]}", value))
        return found

    def _chosen(self, name: str) -> bool:
        return self._layers is None or any(fnmatchcase(name, pattern) for pattern in self._layers)


def _rehearsed(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
    """Return the memory that an optimizer will have, all zero, from a step of its like on copies without gradient."""
    originals = [p for group in optimizer.param_groups for p in group["params"]]
    copies = {id(p): torch.zeros_like(p).requires_grad_() for p in originals}
    for copy in copies.values():
        copy.grad = torch.zeros_like(copy)
    try:
        groups = [{**g, "params": [copies[id(p)] for p in g["params"]]} for g in optimizer.param_groups]
        like: Any = type(optimizer)
        alike = like(groups)
        alike.step()
    except Exception as error:
        raise ConfigurationError(
            f"optimizer_state: what {type(optimizer).__name__} remembers shows only after its first step "
            f"({type(error).__name__}); take one before the recording begins"
        ) from None
    memory = {p: alike.state[copies[id(p)]] for p in originals if copies[id(p)] in alike.state}
    return {
        p: {k: torch.zeros_like(v) if isinstance(v, Tensor) else v for k, v in m.items()} for p, m in memory.items()
    }


def random_state() -> dict[str, Any]:
    """Return the state of every generator that training draws from."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
