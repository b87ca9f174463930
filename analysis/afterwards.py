"""Metrics that are computed afterwards, from stored states: declarations of what is measured at one state.

The loss is the mean over all training examples, ``train_loss`` as the problem evaluates it. Draws are fresh: batches of
a stream that no recording uses, the same whenever a metric is computed again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from trajstore.analysis.modes import fresh_batches, trains_otherwise
from trajstore.analysis.states import dot, norm, signs

from trajstore.errors import ConfigurationError, NotFoundError, StatisticError, choices
from trajstore.operators import Batch
from trajstore.operators.state import State, Tensors
from trajstore.problems import Draws
from trajstore.problems.batches import generator
from trajstore.reading.drawing import drawing_of
from trajstore.replay.late_metrics import compute_late
from trajstore.replay.reviving import Revived, revive
from trajstore.storage.format.metrics import training_mark
from trajstore.store import StoredExperiment

__all__ = ["METRICS", "At", "StateMetric", "compute"]

_DENSE, _TOLERANCE, _MOST = 32, 1e-4, 100
"""Of Lanczos' method: below so many parameters the whole Hessian is made; the relative error; restarts at most."""


class At(NamedTuple):
    """A stored state and where it stands."""

    state: State
    seed: int
    """The data seed."""
    step: int
    samples: int
    training: bool = False
    """Whether gradients are those of the loss as training sees it: see `analysis.modes`."""

    def fresh(self, revived: Revived) -> list[Batch]:
        """Return fresh batches."""
        stream = fresh_batches(revived, self.seed, "iid" if self.training else None)
        return [stream[i] for i in range(self.step * self.samples + 1, (self.step + 1) * self.samples + 1)]

    def epoch(self, revived: Revived) -> list[Batch]:
        """Return fresh batches that hold, together, every example once, as far as batches of this size can."""
        stream, examples = fresh_batches(revived, self.seed, "shuffle"), _examples(revived)
        count = max(1, examples // max(1, stream.batch_size))
        return [stream[i] for i in range(self.step * count + 1, (self.step + 1) * count + 1)]

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
    of_batches: bool = False
    """Whether it is of gradients that training takes: of the loss in training, where that is another one."""


def _gradient_norm(revived: Revived, at: At) -> tuple[float, int]:
    if not at.training:
        return norm(_full_gradient(revived, at.state)), _examples(revived)
    batches = at.epoch(revived)
    mean = _mean([revived.gradient(at.state, batch) for batch in batches])
    return norm(mean), len(batches) * max(1, revived.schema.batch_size)


def _gradient_noise(revived: Revived, at: At) -> tuple[float, int]:
    """√E‖g_i − ∇L‖² of a single example, from fresh batches: their variance times their size.

    Where training sees another loss than evaluation does, the variance is that about the draws' own mean, since only
    they are gradients of that loss; they are then drawn independently, whatever the sampling.
    """
    if at.training:
        if at.samples < 2:
            raise ConfigurationError(
                f"experiment {revived.name!r}: samples is {at.samples}; where the loss in training is not that in "
                "evaluation, gradient_noise is how draws differ from each other, and takes 2 or more"
            )
        draws = [revived.gradient(at.state, batch) for batch in at.fresh(revived)]
        total = sum(_square_apart(g, mean) for mean in [_mean(draws)] for g in draws)
        return float(np.sqrt(max(1, revived.schema.batch_size) * total / (len(draws) - 1))), len(draws)
    mean, size = _full_gradient(revived, at.state), _size_of_noise(revived)
    squares = [_square_apart(revived.gradient(at.state, batch), mean) for batch in at.fresh(revived)]
    return float(np.sqrt(size * np.mean(squares))), len(squares)


def _size_of_noise(revived: Revived) -> float:
    """Return by what the variance of a batch's gradient is that of an example's."""
    drawing = drawing_of(revived.stored.attributes)
    if not drawing.batch_size:
        return 1.0  # batches are noise, and one of them is what there is to speak of
    if drawing.sampling == "iid":
        return float(drawing.batch_size)
    if drawing.sampling != "shuffle":
        how = "is not stored" if drawing.sampling is None else f"({drawing.sampling!r}) is not known here"
        raise StatisticError(
            f"experiment {revived.name!r}: how examples are drawn {how}, so the noise of one cannot be told from "
            "batches; have the problem say so in a field, sampling = 'iid' or 'shuffle', and record it again"
        )
    size, examples = drawing.batch_size, _examples(revived)
    if size >= examples:
        raise StatisticError(f"experiment {revived.name!r}: a batch holds all examples, so there is no noise")
    return size * (examples - 1) / (examples - size)  # drawn without replacement


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
    # Of normal numbers, which no Hessian takes to 0 but one that is 0; Lanczos' method has nowhere to go from there.
    begin = generator(at.seed, "analysis", at.step).standard_normal(size)
    first = flat(begin)
    if not np.isfinite(first).all():
        return float("nan"), _examples(revived)  # training diverged
    if not first.any():
        return 0.0, _examples(revived)
    if size < _DENSE:
        columns = np.stack([flat(unit) for unit in np.eye(size)])
        return float(np.abs(np.linalg.eigvalsh((columns + columns.T) / 2)).max()), _examples(revived)
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
    "gradient_norm": StateMetric(_gradient_norm, sampled=False, of_batches=True),
    "gradient_noise": StateMetric(_gradient_noise, of_batches=True),
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
        inputs = list(leaves.values())
        gradients = torch.autograd.grad(revived.train_loss(leaves, state.buffers), inputs, materialize_grads=True)
    return {name: g.double() for name, g in zip(leaves, gradients, strict=True)}


def _mean(gradients: Sequence[Tensors]) -> Tensors:
    return {
        name: sum((g[name].double() for g in gradients[1:]), gradients[0][name].double()) / len(gradients)
        for name in gradients[0]
    }


def _square_apart(gradient: Tensors, mean: Tensors) -> float:
    gap = {name: gradient[name].double() - mean[name] for name in gradient}
    return dot(gap, gap)


def _hessian(revived: Revived, state: State) -> Callable[[Tensors], Tensors]:
    """Return v ↦ Hv; no matrix is formed."""
    with torch.enable_grad():
        leaves = {name: p.detach().requires_grad_() for name, p in state.params.items()}
        inputs = list(leaves.values())
        loss = revived.train_loss(leaves, state.buffers)
        gradients = torch.autograd.grad(loss, inputs, create_graph=True, materialize_grads=True)

    # A gradient that does not depend on the parameters, as of a loss that is linear in them, has no graph.
    bent = {name: g for name, g in zip(leaves, gradients, strict=True) if g.requires_grad}

    def product(vector: Tensors) -> Tensors:
        if not bent:
            return {name: torch.zeros_like(p, dtype=torch.float64) for name, p in leaves.items()}
        weights = [vector[name].to(leaves[name]) for name in bent]
        images = torch.autograd.grad([*bent.values()], inputs, weights, retain_graph=True, materialize_grads=True)
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

    `stored` is a recorded experiment with its states, and `metric` one of ``gradient_norm``, ``gradient_noise``,
    ``sharpness``, ``hessian_trace`` and ``invariance_gap``. `threads` measure at once, by default as many as there are
    cores; `progress` is called with how many states were measured since it was last, and of which slab.

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
    training = wanted.of_batches and trains_otherwise(revived)
    counted, marked = f"{metric}_samples", training_mark(metric)
    if metric in schema.late and training != (marked in schema.late):
        was, now = ("evaluation", "training") if training else ("training", "evaluation")
        raise ConfigurationError(
            f"experiment {stored.name!r}: {metric} was computed in {was} mode, by now it would be in {now} "
            "mode, and one series cannot mix them; record the experiment again, under another name or elsewhere"
        )
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
        value, taken = wanted.measure(own.revived, At(state, data_seed, step, samples, training))
        return {counted: float(taken), metric: value} | ({marked: 1.0} if training else {})

    names = [counted, *([marked] if training else []), metric]
    return compute_late(stored, names, measure, every, threads, progress)
