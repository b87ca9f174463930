"""Trajectories whose behaviour is known, simulated in float64 straight from their definitions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import xarray as xr
from scipy.signal import lfilter
from trajstore.analysis.rounding import of_moves
from trajstore.analysis.spaces import Path

import trajstore as ts
from trajstore.operators.sgd import SGD
from trajstore.recipe import Recipe


def path(points):
    """The path through points of a Euclidean space, as an analysis sees it."""
    points = np.asarray(points, dtype=float).reshape(len(points), -1)
    steps = np.diff(points, axis=0)
    moves = (
        np.abs(steps[:, 0]) if steps.shape[1] == 1 else np.sqrt((steps**2).sum(1))
    )  # no square of 1e-200 is a number
    return Path(np.arange(len(points)), points, moves, of_moves(np.abs(points).max(1)))


def last_half(points):
    """What is looked at when no window is asked for."""
    return path(points[-(len(points) // 2) :])


def ar1(phi, steps, runs, seed):
    """Stationary autoregressions of variance 1 / (1 − φ²), one a row."""
    noise = np.random.default_rng(seed).standard_normal((runs, steps))
    noise[:, 0] /= np.sqrt(1 - phi**2)
    return lfilter([1], [1, -phi], noise)


def quadratic(rng, h, steps, order):
    """Section 3.1: T_i(θ) = (1 − h)θ + hε_i."""
    noise, start = rng.standard_normal(steps), rng.standard_normal()
    powers = (1 - h) ** np.arange(steps + 1)
    if order == "forward":
        return np.append(start, lfilter([1], [1, h - 1], h * noise, zi=[(1 - h) * start])[0])
    return powers * start + np.append(0, np.cumsum(h * powers[:-1] * noise))


def two_constants(rng, steps, order):
    """Example 2.4: T_i is one of two values for ever."""
    drawn, start = rng.choice([-1.0, 1.0], steps), rng.standard_normal()
    return np.append(start, drawn if order == "forward" else np.full(steps, drawn[0]))


class LeastSquares:
    """T_i(θ) = A_iθ + b_i of single rows of a finite sum."""

    def __init__(self, h, noise=0.5, ridge=0.0, rows=50, d=5, seed=0):
        rng = np.random.default_rng(seed)
        self.X = rng.standard_normal((rows, d))
        self.y = self.X @ rng.standard_normal(d) + noise * rng.standard_normal(rows)
        outer = self.X[:, :, None] * self.X[:, None, :]
        self.A = (1 - h * ridge) * np.eye(d) - h * outer
        self.b = h * self.X * self.y[:, None]

    def iterates(self, rng, steps, order):
        """θ₀ … θ_n, backward ones by folding the composition into one matrix and one vector."""
        drawn, theta = rng.integers(0, len(self.X), steps), rng.standard_normal(self.A.shape[1])
        out, matrix, vector = [theta], np.eye(len(theta)), np.zeros(len(theta))
        for i in drawn:
            if order == "forward":
                out.append(self.A[i] @ out[-1] + self.b[i])
            else:
                vector, matrix = vector + matrix @ self.b[i], matrix @ self.A[i]
                out.append(matrix @ theta + vector)
        return np.array(out)

    def lyapunov(self, rng, steps=200_000):
        """The exponent of the products A_1 A_2 ⋯, from the growth of one vector."""
        vector, total = rng.standard_normal(self.A.shape[1]), 0.0
        for i in rng.integers(0, len(self.X), steps):
            vector = self.A[i] @ vector
            length = float(np.linalg.norm(vector))
            total, vector = total + np.log(length), vector / length
        return total / steps


def runs_of(forward, backward):
    """A dataset with a seed a row."""
    values = np.stack([forward, backward])
    here = np.ones(values.shape, dtype=bool)
    dims = ("order", "seed", "step")
    return xr.Dataset(
        {"loss": (dims, values), "measured": (dims, here.astype(int), {"flag_meanings": "loss"})},
        {"order": ["forward", "backward"], "seed": np.arange(values.shape[1]), "step": np.arange(values.shape[2]),
         "recorded": (dims, here)},
    )  # fmt: skip


def iterate_pairs(rng, n, seeds, h=0.05):
    """Forward and backward iterates of the quadratic from θ₀ = 1, of the same noise."""
    noise = rng.standard_normal((seeds, n))
    weights = h * (1 - h) ** np.arange(n)
    start = (1 - h) ** n
    return (start + noise @ weights[::-1])[:, None], (start + noise @ weights)[:, None]


KNOWN = {
    "quadratic, forward": ("distribution", lambda rng: quadratic(rng, 0.1, 4_000, "forward")),
    "quadratic, forward, h = 0.05": ("distribution", lambda rng: quadratic(rng, 0.05, 8_000, "forward")),
    "quadratic, backward": ("point", lambda rng: quadratic(rng, 0.05, 800, "backward")),
    "quadratic, backward, h = 0.01": ("point", lambda rng: quadratic(rng, 0.01, 1_000, "backward")),
    "quadratic, backward, at rest": ("point", lambda rng: quadratic(rng, 0.1, 4_000, "backward")),
    "two constants, forward": ("distribution", lambda rng: two_constants(rng, 2_000, "forward")),
    "two constants, backward": ("point", lambda rng: two_constants(rng, 200, "backward")),
    "least squares, forward": ("distribution", lambda rng: LeastSquares(0.1).iterates(rng, 8_000, "forward")),
    "least squares, backward": ("point", lambda rng: LeastSquares(0.05).iterates(rng, 1_000, "backward")),
    "ridge, backward": (
        "point", lambda rng: LeastSquares(h=0.05, ridge=0.5).iterates(rng, 1_000, "backward")
    ),
    "interpolating, forward": ("point", lambda rng: LeastSquares(0.05, noise=0).iterates(rng, 1_000, "forward")),
    "a drift": ("drifting", lambda rng: 0.05 * np.arange(2_001) + quadratic(rng, 0.1, 2_000, "forward")),
    "a drift ever faster": (
        "drifting", lambda rng: 1e-4 * np.arange(2_001) ** 2 + quadratic(rng, 0.1, 2_000, "forward")
    ),
}  # fmt: skip
"""Processes, the verdict on their last half, and what makes one."""


LAWS = {
    "least squares": {"problem": {"family": "least-squares", "n": 50, "d": 5, "batch_size": 2},
                      "operator": {"family": "sgd", "lr": 0.05}},
    "2×16 network on x²": {"problem": {"family": "regression", "curve": "x^2", "depth": 2, "width": 16},
                           "operator": {"family": "sgd", "lr": 0.1}},
}  # fmt: skip
"""Theorem 2.6 is tested on these, at n = 20 and 60, by 200 seeds."""


def compositions(stored: ts.StoredExperiment, step: int) -> dict[str, np.ndarray]:
    """Return parameters at a step, a row a seed: forward, backward, and two compositions that have another law."""
    ds, recipe = stored.dataset(), Recipe.of(stored)
    faster = replace(recipe, experiment=replace(recipe.experiment, operator=SGD(2 * recipe.experiment.operator.lr)))
    found = {order: ds["params"].sel(order=order, snapshot=step).values for order in ("forward", "backward")}
    for name, by, index in (
        ("one batch n times", recipe, lambda n: 1),
        ("twice the learning rate", faster, lambda n: n),
    ):
        ends = []
        for seed in stored.schema.seeds:
            state, batches = recipe.start(seed), recipe.batches(seed)
            for n in range(1, step + 1):
                state = by.apply(state, batches[index(n)], n)
            ends.append(np.concatenate([p.detach().numpy().ravel() for p in state.params.values()]))
        found[name] = np.array(ends, dtype=np.float64)
    return found
