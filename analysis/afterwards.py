"""Metrics that are computed afterwards, from stored states: declarations of what is measured at one state.

The loss is the mean over all training examples, ``train_loss`` as the problem evaluates it. Draws are fresh: batches of
a stream that no recording uses, the same whenever a metric is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trajstore.batches import generator
from trajstore.computing import compute_late
from trajstore.errors import ConfigurationError, NotFoundError, choices
from trajstore.operators import Batch
from trajstore.reviving import Revived, revive
from trajstore.state import State, Tensors
from trajstore.store import StoredExperiment

__all__ = ["METRICS", "At", "StateMetric", "compute"]

_FRESH = 2**62
"""Data seeds from here on are for fresh draws."""
_TOLERANCE, _MOST = 1e-4, 200
"""Of power iteration: the relative change at which it ends, and after so many products at the latest."""


class At(NamedTuple):
    """A stored state and where it stands."""

    state: State
    seed: int
    """The data seed."""
    step: int
    samples: int

    def fresh(self, revived: Revived) -> list[tuple[int, Batch]]:
        """Return fresh batches, with an index each."""
        stream = revived.live.batches(_FRESH + self.seed)
        return [(i, stream[i]) for i in range(self.step * self.samples + 1, (self.step + 1) * self.samples + 1)]

    def directions(self) -> list[Tensors]:
        """Return random signs, shaped as the parameters."""
        rng = generator(_FRESH + self.seed, "noise", self.step)
        return [
            {name: torch.from_numpy(rng.choice([-1.0, 1.0], p.shape)).to(p) for name, p in self.state.params.items()}
            for _ in range(self.samples)
        ]


@dataclass(frozen=True)
class StateMetric:
    """What is measured at a state. How many samples it took is stored beside it, as ``<name>_samples``."""

    about: str
    measure: Callable[[Revived, At], tuple[float, int]]
    """→ the value, and the number of samples."""


def _gradient_norm(revived: Revived, at: At) -> tuple[float, int]:
    return float(np.sqrt(_dot(gradient := _full_gradient(revived, at.state), gradient))), _examples(revived)


def _gradient_noise(revived: Revived, at: At) -> tuple[float, int]:
    """√E‖g_i − ∇L‖² of a single example, from fresh batches: their variance times their size."""
    mean, size = _full_gradient(revived, at.state), revived.batches(revived.stored.schema.seeds[0]).batch_size or 1
    draws = [revived.gradient(at.state, batch) for _, batch in at.fresh(revived)]
    squares = [_dot(gap, gap) for gap in ({name: g[name].double() - mean[name] for name in g} for g in draws)]
    return float(np.sqrt(size * np.mean(squares))), len(draws)


def _sharpness(revived: Revived, at: At) -> tuple[float, int]:
    """The largest absolute eigenvalue of the Hessian, by power iteration."""
    product = _hessian(revived, at.state)
    vector, before = _unit(at._replace(samples=1).directions()[0]), np.inf
    for _ in range(_MOST):
        image = product(vector)
        value = float(np.sqrt(_dot(image, image)))
        if value == 0 or abs(value - before) <= _TOLERANCE * value:
            return value, _examples(revived)
        vector, before = _unit(image), value
    return float("nan"), _examples(revived)  # it did not settle: no number, rather than one that is wrong


def _hessian_trace(revived: Revived, at: At) -> tuple[float, int]:
    """The trace of the Hessian by Hutchinson's estimate: the mean of vᵀHv over random signs v."""
    product = _hessian(revived, at.state)
    values = [_dot(v, product(v)) for v in at.directions()]
    return float(np.mean(values)), len(values)


def _invariance_gap(revived: Revived, at: At) -> tuple[float, int]:
    """L(θ) less the mean of L(T θ) over fresh draws of the operator T.

    Its mean over a stationary window is 0. With the realised next iterate it would telescope, and test nothing.
    """
    after = [_loss(revived, revived.apply(at.state, batch, i)) for i, batch in at.fresh(revived)]
    return _loss(revived, at.state) - float(np.mean(after)), len(after)


METRICS: Mapping[str, StateMetric] = {
    "gradient_norm": StateMetric("Euclidean norm of the gradient of train_loss", _gradient_norm),
    "gradient_noise": StateMetric(
        "root mean squared distance of one example's gradient from the mean", _gradient_noise
    ),
    "sharpness": StateMetric("largest absolute eigenvalue of the Hessian of train_loss", _sharpness),
    "hessian_trace": StateMetric("trace of the Hessian of train_loss", _hessian_trace),
    "invariance_gap": StateMetric("train_loss less its mean after one fresh step", _invariance_gap),
}
"""Name → metric. Another one is another line."""


def _examples(revived: Revived) -> int:
    return revived.live.examples["train_loss"] or 0


def _train_loss(revived: Revived, params: Tensors, buffers: Tensors) -> Tensor:
    values = revived.live.evaluate(params, buffers)
    if "train_loss" not in values:
        raise ConfigurationError(f"{revived.stored.name!r}: its problem has no train_loss to differentiate")
    return values["train_loss"]


def _loss(revived: Revived, state: State) -> float:
    with torch.no_grad():
        return float(_train_loss(revived, state.params, state.buffers))


def _full_gradient(revived: Revived, state: State) -> Tensors:
    with torch.enable_grad():
        leaves = {name: p.detach().requires_grad_() for name, p in state.params.items()}
        gradients = torch.autograd.grad(_train_loss(revived, leaves, state.buffers), list(leaves.values()))
    return {name: g.double() for name, g in zip(leaves, gradients, strict=True)}


def _hessian(revived: Revived, state: State) -> Callable[[Tensors], Tensors]:
    """Return v ↦ Hv; no matrix is formed."""
    with torch.enable_grad():
        leaves = {name: p.detach().requires_grad_() for name, p in state.params.items()}
        inputs = list(leaves.values())
        loss = _train_loss(revived, leaves, state.buffers)
        gradients = torch.autograd.grad(loss, inputs, create_graph=True)

    def product(inputs: list[Tensor], vector: Tensors) -> Tensors:
        weights = [vector[name].to(p) for name, p in leaves.items()]
        images = torch.autograd.grad(gradients, inputs, weights, retain_graph=True, materialize_grads=True)
        return {name: image.double() for name, image in zip(leaves, images, strict=True)}

    return partial(product, inputs)


def _dot(left: Tensors, right: Tensors) -> float:
    return float(sum((left[name].double() * right[name].double()).sum() for name in left))


def _unit(vector: Tensors) -> Tensors:
    length = np.sqrt(_dot(vector, vector))
    return {name: v / length for name, v in vector.items()}


def compute(
    stored: StoredExperiment,
    metric: str,
    every: int = 1,
    samples: int = 32,
    threads: int | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> int:
    """Compute a metric at every `every`-th stored state, write it beside the others, and return at how many.

    `samples` is how many fresh batches, or random directions, an estimate takes; how many it was stands beside it, as
    ``<metric>_samples``. What is there already is left alone, so an interrupted call can be made again.
    """
    if metric not in METRICS:
        raise NotFoundError(f"no metric {metric!r} to compute; {choices(metric, METRICS)}")
    if samples < 1:
        raise ConfigurationError(f"samples is {samples}; it must be at least 1")
    revived, schema, wanted = revive(stored), stored.schema, METRICS[metric]

    def measure(order: str, seed: int, step: int) -> dict[str, float]:
        (state,) = revived.states(order, seed, [step])
        data_seed = schema.data_seeds[schema.seeds.index(seed)]
        value, taken = wanted.measure(revived, At(state, data_seed, step, samples))
        return {metric: value, f"{metric}_samples": float(taken)}

    return compute_late(stored, [metric, f"{metric}_samples"], measure, every, threads, progress)
