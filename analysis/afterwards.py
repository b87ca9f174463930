"""Metrics that are computed afterwards, from stored states: declarations of what is measured at one state.

The loss is the mean over all training examples, ``train_loss`` as the problem evaluates it. Draws are fresh: batches of
a stream that no recording uses, the same whenever a metric is computed again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from trajstore.analysis.states import dot, norm, signs

from trajstore.batches import generator
from trajstore.computing import compute_late
from trajstore.errors import ConfigurationError, NotFoundError, StatisticError, choices
from trajstore.operators import Batch
from trajstore.problems import Draws
from trajstore.reviving import Revived, revive
from trajstore.state import State, Tensors
from trajstore.store import StoredExperiment

__all__ = ["METRICS", "At", "StateMetric", "compute"]

_FRESH = 2**62
"""Data seeds from here on are for fresh draws."""
_DENSE, _TOLERANCE, _MOST = 32, 1e-4, 100
"""Of Lanczos' method: below so many parameters the whole Hessian is made; the relative error; restarts at most."""


class At(NamedTuple):
    """A stored state and where it stands."""

    state: State
    seed: int
    """The data seed."""
    step: int
    samples: int

    def fresh(self, revived: Revived) -> list[Batch]:
        """Return fresh batches."""
        stream = revived.live.batches(_FRESH + self.seed)
        return [stream[i] for i in range(self.step * self.samples + 1, (self.step + 1) * self.samples + 1)]

    def directions(self) -> list[Tensors]:
        """Return random signs, shaped as the parameters."""
        rng = generator(self.seed, "analysis", self.step)
        return [signs(self.state.params, rng) for _ in range(self.samples)]


@dataclass(frozen=True)
class StateMetric:
    """What is measured at a state. How many samples it took is stored beside it, as ``<name>_samples``."""

    measure: Callable[[Revived, At], tuple[float, int]]
    """→ the value, and the number of samples."""
    sampled: bool = True
    """Whether the number of samples is the caller's choice."""


def _gradient_norm(revived: Revived, at: At) -> tuple[float, int]:
    return norm(_full_gradient(revived, at.state)), _examples(revived)


def _gradient_noise(revived: Revived, at: At) -> tuple[float, int]:
    """√E‖g_i − ∇L‖² of a single example, from fresh batches: their variance times their size."""
    mean, size = _full_gradient(revived, at.state), float(revived.stored.schema.batch_size or 1)
    if revived.stored.config["problem"].get("sampling", "iid") != "iid":  # drawn without replacement
        examples = _examples(revived)
        if size >= examples:
            raise StatisticError(
                f"experiment {revived.stored.name!r}: a batch holds all examples, so there is no noise"
            )
        size *= (examples - 1) / (examples - size)
    draws = [revived.gradient(at.state, batch) for batch in at.fresh(revived)]
    squares = [dot(gap, gap) for gap in ({name: g[name].double() - mean[name] for name in g} for g in draws)]
    return float(np.sqrt(size * np.mean(squares))), len(draws)


def _sharpness(revived: Revived, at: At) -> tuple[float, int]:
    """The largest absolute eigenvalue of the Hessian, by Lanczos' method, which says when it has found it.

    Power iteration would stop at the eigenvalues below wherever it passes them slowly.
    """
    product, shapes = _hessian(revived, at.state), {name: p.shape for name, p in at.state.params.items()}
    ends = np.cumsum([0, *(shape.numel() for shape in shapes.values())])

    def flat(vector: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        parts = zip(shapes.items(), ends, ends[1:], strict=False)
        image = product({name: torch.from_numpy(vector.ravel()[a:b].reshape(s)) for (name, s), a, b in parts})
        return np.concatenate([image[name].reshape(-1).numpy() for name in shapes])

    size = int(ends[-1])
    if size < _DENSE:
        columns = np.stack([flat(unit) for unit in np.eye(size)])
        return float(np.abs(np.linalg.eigvalsh((columns + columns.T) / 2)).max()), _examples(revived)
    begin = np.concatenate([v.reshape(-1).double().numpy() for v in at._replace(samples=1).directions()[0].values()])
    hessian = LinearOperator((size, size), flat, dtype=np.float64)
    try:
        (value,) = eigsh(hessian, 1, which="LM", v0=begin, tol=_TOLERANCE, maxiter=_MOST, return_eigenvectors=False)
    except ArpackNoConvergence:
        return float("nan"), _examples(revived)  # no number, rather than one that is wrong
    return abs(float(value)), _examples(revived)


def _hessian_trace(revived: Revived, at: At) -> tuple[float, int]:
    """The trace of the Hessian by Hutchinson's estimate: the mean of vᵀHv over random signs v."""
    product = _hessian(revived, at.state)
    values = [dot(v, product(v)) for v in at.directions()]
    return float(np.mean(values)), len(values)


def _invariance_gap(revived: Revived, at: At) -> tuple[float, int]:
    """L(θ) less the mean of L(T θ) over fresh draws of the operator T.

    Its mean over a stationary window is 0. With the realised next iterate it would telescope, and test nothing.
    """
    after = [_loss(revived, revived.apply(at.state, batch, at.step + 1)) for batch in at.fresh(revived)]
    return _loss(revived, at.state) - float(np.mean(after)), len(after)


METRICS: Mapping[str, StateMetric] = {
    "gradient_norm": StateMetric(_gradient_norm, sampled=False),
    "gradient_noise": StateMetric(_gradient_noise),
    "sharpness": StateMetric(_sharpness, sampled=False),
    "hessian_trace": StateMetric(_hessian_trace),
    "invariance_gap": StateMetric(_invariance_gap),
}
"""Name → metric. Another one is another line."""


def _examples(revived: Revived) -> int:
    return revived.live.examples["train_loss"] or 0


def _loss(revived: Revived, state: State) -> float:
    with torch.no_grad():
        return float(revived.train_loss(state.params, state.buffers))


def _full_gradient(revived: Revived, state: State) -> Tensors:
    with torch.enable_grad():
        leaves = {name: p.detach().requires_grad_() for name, p in state.params.items()}
        gradients = torch.autograd.grad(revived.train_loss(leaves, state.buffers), list(leaves.values()))
    return {name: g.double() for name, g in zip(leaves, gradients, strict=True)}


def _hessian(revived: Revived, state: State) -> Callable[[Tensors], Tensors]:
    """Return v ↦ Hv; no matrix is formed."""
    with torch.enable_grad():
        leaves = {name: p.detach().requires_grad_() for name, p in state.params.items()}
        inputs = list(leaves.values())
        loss = revived.train_loss(leaves, state.buffers)
        gradients = torch.autograd.grad(loss, inputs, create_graph=True)

    def product(vector: Tensors) -> Tensors:
        weights = [vector[name].to(p) for name, p in leaves.items()]
        images = torch.autograd.grad(gradients, inputs, weights, retain_graph=True, materialize_grads=True)
        return {name: image.double() for name, image in zip(leaves, images, strict=True)}

    return product


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
    if threads is not None and threads < 1:
        raise ConfigurationError(f"threads is {threads}; it must be at least 1")
    revived, schema, wanted = revive(stored), stored.schema, METRICS[metric]
    if isinstance(revived.live, Draws) and revived.live.draws:
        threads = 1  # they would share torch's one generator
    counted = f"{metric}_samples"
    if wanted.sampled and counted in schema.late:
        known, values = stored.late()[counted]
        if other := sorted(set(values[known].tolist()) - {float(samples)}):
            raise ConfigurationError(
                f"experiment {stored.name!r}: {metric} was computed with {other[0]:.0f} samples, and one series cannot "
                f"mix them; ask for {other[0]:.0f}"
            )

    own, building = threading.local(), threading.Lock()

    def measure(order: str, seed: int, step: int) -> dict[str, float]:
        if not hasattr(own, "revived"):
            with building:  # a module is built under torch's one generator
                own.revived = revived.again()
        (state,) = own.revived.states(order, seed, [step])
        data_seed = schema.data_seeds[schema.seeds.index(seed)]
        value, taken = wanted.measure(own.revived, At(state, data_seed, step, samples))
        return {counted: float(taken), metric: value}

    return compute_late(stored, [counted, metric], measure, every, threads, progress)
