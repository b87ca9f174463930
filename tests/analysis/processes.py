"""Trajectories whose behaviour is known, simulated in float64 straight from their definitions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import xarray as xr
from scipy.signal import lfilter
from scipy.special import gamma
from trajstore.analysis.products import directions, follow
from trajstore.analysis.rounding import Precision, of_moves
from trajstore.analysis.spaces import Path, path_of

import trajstore as ts
from trajstore.operators.sgd import SGD
from trajstore.replay.recipe import Recipe


def path(points):
    """The path through points of a Euclidean space, as an analysis sees it."""
    points = np.asarray(points, dtype=float).reshape(len(points), -1)
    steps = np.diff(points, axis=0)
    moves = (
        np.abs(steps[:, 0]) if steps.shape[1] == 1 else np.sqrt((steps**2).sum(1))
    )  # no square of 1e-200 is a number
    return Path(np.arange(len(points)), points, moves, of_moves(np.abs(points).max(1)))


def last_half(points):
    """What is looked at when no window is asked for, with the moves before."""
    if isinstance(points, Path):
        return points
    whole, seen = path(points), path(points[-(len(points) // 2) :])
    earlier = slice(0, len(whole.moves) - len(seen.moves))
    moved = np.where(whole.moves > whole.rounding, whole.moves, 0.0)[earlier]
    return replace(seen, earlier=moved, before=whole.points[: -len(seen.points)])


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


POINT, LAW, DRIFT = "point", "distribution", "drifting"
SETTLES, STATIONARY, WANDERS, RETURNS = (LAW, DRIFT), (POINT, DRIFT), (POINT, LAW), (POINT, LAW, DRIFT)
"""Which verdicts contradict a process that converges to a point, has a stationary law, has none, is periodic."""


def autoregression(phi, noise, burn=2_000, ma=0.0):
    """AR(1) or ARMA(1, 1) of any noise, in its stationary state, a row each."""
    return lfilter([1, ma], [1, -phi], noise)[:, burn:]


def normal(rng, runs, steps):
    return rng.standard_normal((runs, steps))


def arfima(rng, runs, steps, d=0.45):
    """(1 − B)⁻ᵈ of white noise, from 20,000 steps before."""
    k = np.arange(1, steps + 20_000)
    weights = np.append(1, np.cumprod((k - 1 + d) / k))
    noise = normal(rng, runs, len(weights))
    size = 2 ** int(np.ceil(np.log2(2 * len(weights))))
    return np.fft.irfft(np.fft.rfft(noise, size) * np.fft.rfft(weights, size), size)[
        :, len(weights) - steps : len(weights)
    ]


def garch(rng, runs, steps, a=0.1, b=0.89):
    """Noise whose variance is 1 − a − b, plus a times the last square, plus b times itself."""
    noise, out, variance = normal(rng, runs, steps + 1_000), np.zeros((runs, steps + 1_000)), np.ones(runs)
    for n in range(steps + 1_000):
        out[:, n] = np.sqrt(variance) * noise[:, n]
        variance = (1 - a - b) + a * out[:, n] ** 2 + b * variance
    return out[:, 1_000:]


def kicked(rng, runs, steps):
    """AR(1) that once in 300 steps is thrown ten deviations away, and returns."""
    kicks = 20 * (rng.random((runs, steps + 2_000)) < 1 / 300)
    return autoregression(0.9, normal(rng, runs, steps + 2_000) + kicks)


def reflected(rng, runs, steps, width=20.0):
    """A random walk between two walls."""
    walk = rng.uniform(0, 2 * width, (runs, 1)) + np.cumsum(normal(rng, runs, steps), axis=1)
    return np.abs((walk + width) % (2 * width) - width)


def descents(rng, runs, steps, h, order, scale=1.0):
    """The quadratic's iterates, a coordinate for each learning rate."""
    made = [[quadratic(rng, one, steps, order) for one in np.atleast_1d(h)] for _ in range(runs)]
    return scale * np.array(made).swapaxes(1, 2)


def rows(rng, runs, steps, order, **problem):
    """Least squares by single rows, all runs at once."""
    it = LeastSquares(**problem)
    drawn, d = rng.integers(0, len(it.X), (steps, runs)), it.A.shape[1]
    theta = rng.standard_normal((runs, d))
    out, matrix, vector = np.empty((steps + 1, runs, d)), np.broadcast_to(np.eye(d), (runs, d, d)), np.zeros((runs, d))
    out[0] = theta
    for n, i in enumerate(drawn):
        if order == "forward":
            out[n + 1] = np.einsum("rij,rj->ri", it.A[i], out[n]) + it.b[i]
        else:
            vector, matrix = vector + np.einsum("rij,rj->ri", matrix, it.b[i]), matrix @ it.A[i]
            out[n + 1] = np.einsum("rij,rj->ri", matrix, theta) + vector
    return out.swapaxes(0, 1)


def products(rng, runs, steps, exponent, walk):
    """Backward iterates b₁ + a₁b₂ + a₁a₂b₃ + ⋯ whose products have this exponent."""
    logs = np.cumsum(exponent + walk * normal(rng, runs, steps), axis=1)
    return np.cumsum(np.exp(logs) * normal(rng, runs, steps), axis=1)


def chaos(rng, runs, steps):
    """The logistic map where it is chaotic."""
    out = np.empty((runs, steps))
    out[:, 0] = rng.random(runs)
    for n in range(1, steps):
        out[:, n] = 4 * out[:, n - 1] * (1 - out[:, n - 1])
    return out


def round_and_round(rng, runs, steps, period, noise=0.0, shrinking=1.0):
    """A cycle through random places, with noise around it, approached by a factor a step."""
    places = rng.standard_normal((runs, period))
    places = (places - places.mean(1, keepdims=True)) / places.std(1, keepdims=True)
    away = 3 * rng.standard_normal((runs, 1)) * shrinking ** np.arange(steps) if shrinking < 1 else 0.0
    return np.tile(places, steps // period + 1)[:, :steps] + away + noise * normal(rng, runs, steps)


def waves(rng, runs, steps, period, noise):
    """A sine of any period from a random phase, in noise."""
    phase = rng.uniform(0, 2 * np.pi, (runs, 1))
    return np.sin(2 * np.pi * np.arange(steps) / period + phase) + noise * normal(rng, runs, steps)


def epochs(rng, runs, steps, rows, h=0.05, d=5):
    """SGD on least squares that takes its rows in the same order, epoch by epoch: it ends on a cycle of so many."""
    X = rng.standard_normal((runs, rows, d))
    y = np.einsum("rnd,rd->rn", X, rng.standard_normal((runs, d))) + 0.5 * rng.standard_normal((runs, rows))
    out = np.empty((steps, runs, d))
    out[0] = rng.standard_normal((runs, d))
    for n in range(1, steps):
        x, theta = X[:, n % rows], out[n - 1]
        out[n] = theta - h * x * ((x * theta).sum(1) - y[:, n % rows])[:, None]
    return out.swapaxes(0, 1)


def wandering(rng, runs, steps, size=1.0):
    """White noise about a random walk that goes so many of its standard deviations over the last half."""
    walk = np.cumsum(normal(rng, runs, steps), axis=1) / np.sqrt(steps / 2)
    return normal(rng, runs, steps) + size * walk


def resting(rng, runs, steps, dtype, rate=0.05):
    """The loss of gradient descent that fits its data exactly, as its precision has it: the last half, a path each."""
    X = rng.standard_normal((runs, 20, 5)).astype(dtype)
    y = (X @ rng.standard_normal((runs, 5, 1)).astype(dtype))[..., 0]
    theta, losses = np.zeros((runs, 5), dtype), np.empty((runs, steps))
    for n in range(steps):
        i = rng.integers(0, 20, runs)
        residual = np.einsum("rnd,rd->rn", X, theta, dtype=dtype) - y
        losses[:, n] = (residual**2).mean(1)
        x = X[np.arange(runs), i]
        theta = theta - dtype(rate) * x * residual[np.arange(runs), i][:, None]
    half = steps // 2
    return [
        path_of(np.arange(half), row[-half:], Precision(np.dtype(dtype), row[0]), before=row[:-half]) for row in losses
    ]


def products_of(maps, d, seed, dtype="float64"):
    """How two differences grow under matrices, the n-th of which is maps(n), by number of steps."""
    kind = getattr(torch, dtype)
    push = lambda n, two: [{"x": torch.from_numpy(maps(n)).to(kind) @ one["x"]} for one in two]  # noqa: E731
    return lambda steps: follow(
        push, directions({"x": torch.zeros(d, dtype=kind)}, 2, np.random.default_rng(seed)), steps, "product"
    )


def _n(steps):
    return np.arange(1.0, steps + 1)


def _accuracy(rng, runs, steps):
    return np.round(200 * (0.6 + 0.02 * autoregression(0.9, normal(rng, runs, steps + 2_000)))) / 200


def _spiked(rng, runs, steps):
    made = normal(rng, runs, steps) + 20 * _n(steps) / steps
    made[np.arange(runs), rng.integers(steps // 2, steps, runs)] = 1_000
    return made


def _ar(phi):
    return lambda rng, runs, steps: ar1(phi, steps, runs, rng)


PROCESSES = {
    **{f"AR(1), φ = {phi}": (STATIONARY, _ar(phi)) for phi in (0.0, 0.5, -0.9, 0.9, 0.99, 0.999)},
    "AR(2) that swings": (
        STATIONARY,
        lambda rng, runs, n: lfilter([1], [1, -1.9 * np.cos(0.7), 0.9025], normal(rng, runs, n + 500))[:, 500:],
    ),
    "ARMA(1, 1)": (STATIONARY, lambda rng, runs, n: autoregression(0.95, normal(rng, runs, n + 2_000), ma=-0.5)),
    "ARFIMA, d = 0.45": (STATIONARY, arfima),
    "noise, t of 2 degrees": (STATIONARY, lambda rng, runs, n: rng.standard_t(2, (runs, n))),
    "AR(1) of t of 3 degrees": (
        STATIONARY, lambda rng, runs, n: autoregression(0.9, rng.standard_t(3, (runs, n + 2_000)))
    ),
    "GARCH(1, 1)": (STATIONARY, garch),
    "noise in bursts": (
        STATIONARY, lambda rng, runs, n: np.exp(ar1(0.98, n, runs, rng) * 0.2) * normal(rng, runs, n)
    ),
    "AR(1) with kicks": (STATIONARY, kicked),
    "a walk between walls": (STATIONARY, reflected),
    "two constants, forward": (STATIONARY, lambda rng, runs, n: rng.choice([-1.0, 1.0], (runs, n))),
    "an accuracy of 200 images": (STATIONARY, _accuracy),
    "quadratic, forward, 3 rates": (
        STATIONARY, lambda rng, runs, n: descents(rng, runs, n, (0.3, 0.1, 0.03), "forward")
    ),
    "least squares, forward": (STATIONARY, lambda rng, runs, n: rows(rng, runs, n, "forward", h=0.1)),
    "chaos": (STATIONARY, chaos),
    "noise in 30 dimensions": (STATIONARY, lambda rng, runs, n: (rng.standard_normal((n, 30)) for _ in range(runs))),
    "quadratic, backward, h = 0.1": (SETTLES, lambda rng, runs, n: descents(rng, runs, n, 0.1, "backward")),
    "quadratic, backward, h = 0.01": (SETTLES, lambda rng, runs, n: descents(rng, runs, n, 0.01, "backward")),
    "least squares, backward": (SETTLES, lambda rng, runs, n: rows(rng, runs, n, "backward", h=0.05)),
    "ridge, backward": (SETTLES, lambda rng, runs, n: rows(rng, runs, n, "backward", h=0.05, ridge=0.5)),
    "interpolating, forward": (SETTLES, lambda rng, runs, n: rows(rng, runs, n, "forward", h=0.05, noise=0)),
    "two constants, backward": (SETTLES, lambda rng, runs, n: np.tile(rng.choice([-1.0, 1.0], (runs, 1)), n)),
    "1/n": (SETTLES, lambda rng, runs, n: rng.standard_normal((runs, 1)) / _n(n)),
    "1/√n": (SETTLES, lambda rng, runs, n: rng.standard_normal((runs, 1)) / np.sqrt(_n(n))),
    "1/log n": (SETTLES, lambda rng, runs, n: rng.standard_normal((runs, 1)) / np.log(_n(n) + 1)),
    "noise/n": (SETTLES, lambda rng, runs, n: normal(rng, runs, n) / _n(n)),
    "noise/√n": (SETTLES, lambda rng, runs, n: normal(rng, runs, n) / np.sqrt(_n(n))),
    "exponent −0.01": (SETTLES, lambda rng, runs, n: products(rng, runs, n, -0.01, 0.1)),
    "exponent −0.001": (SETTLES, lambda rng, runs, n: products(rng, runs, n, -0.001, 0.05)),
    "a loss at rest, float32": (SETTLES, lambda rng, runs, n: resting(rng, runs, n, np.float32)),
    "a loss at rest, float64": (SETTLES, lambda rng, runs, n: resting(rng, runs, n, np.float64)),
    **{
        f"exponent 0, steps of {walk}": (WANDERS, lambda rng, runs, n, walk=walk: products(rng, runs, n, 0.0, walk))
        for walk in (0.03, 0.1, 0.3, 1.0)
    },
    "exponent 0.01": (WANDERS, lambda rng, runs, n: products(rng, runs, n, 0.01, 0.1)),
    "a random walk": (WANDERS, lambda rng, runs, n: np.cumsum(normal(rng, runs, n), axis=1)),
    "a random walk with a spike": (
        WANDERS, lambda rng, runs, n: np.cumsum(normal(rng, runs, n), axis=1) + 1e5 * (np.arange(n) == 3 * n // 4)
    ),
    "a random walk in 5 dimensions": (
        WANDERS, lambda rng, runs, n: np.cumsum(rng.standard_normal((runs, n, 5)), axis=1)
    ),
    "10 deviations of drift": (WANDERS, lambda rng, runs, n: normal(rng, runs, n) + 20 * _n(n) / n),
    "the same with a spike": (WANDERS, _spiked),
    "log n in noise": (WANDERS, lambda rng, runs, n: 20 * np.log(_n(n)) + normal(rng, runs, n)),
    **{
        f"a cycle of {period}": (RETURNS, lambda rng, runs, n, p=period: round_and_round(rng, runs, n, p))
        for period in (2, 3, 5, 12)
    },
    "a cycle of 2 in half as much noise": (RETURNS, lambda rng, runs, n: round_and_round(rng, runs, n, 2, noise=0.5)),
    "a cycle of 5 in a fifth as much noise": (
        RETURNS, lambda rng, runs, n: round_and_round(rng, runs, n, 5, noise=0.2)
    ),
    "a cycle of 3, approached": (RETURNS, lambda rng, runs, n: round_and_round(rng, runs, n, 3, shrinking=0.99)),
    "a cycle of 7 in 3 dimensions": (
        RETURNS, lambda rng, runs, n: (np.tile(rng.standard_normal((7, 3)), (n // 7 + 1, 1))[:n] for _ in range(runs))
    ),
    "a limit cycle of 17.3 steps": (RETURNS, lambda rng, runs, n: waves(rng, runs, n, 17.3, 0.1)),
    **{
        f"a cycle of 1/{part} of the run": (
            RETURNS, lambda rng, runs, n, part=part: round_and_round(rng, runs, n, n // part)
        )
        for part in (4, 6, 8, 12, 20)
    },
    "a cycle of 1/6 of the run, in noise": (
        RETURNS, lambda rng, runs, n: round_and_round(rng, runs, n, n // 6, noise=0.3)
    ),
    "epochs of 1/8 of the run": (RETURNS, lambda rng, runs, n: epochs(rng, runs, n, n // 8)),
    "noise/n^⅓": (SETTLES, lambda rng, runs, n: normal(rng, runs, n) / np.cbrt(_n(n))),
    "noise·n^⅓": (WANDERS, lambda rng, runs, n: normal(rng, runs, n) * np.cbrt(_n(n))),
    **{
        f"noise about a walk of {size} deviations": (
            WANDERS, lambda rng, runs, n, size=size: wandering(rng, runs, n, size)
        )
        for size in (0.5, 1.0, 2.0)
    },
    "1.2 deviations of drift": (WANDERS, lambda rng, runs, n: normal(rng, runs, n) + 2.4 * _n(n) / n),
    "AR(1), φ = 0.9, and a drift of 1.2 deviations": (
        WANDERS, lambda rng, runs, n: ar1(0.9, n, runs, rng) * np.sqrt(0.19) + 2.4 * _n(n) / n
    ),
    "a wave of half a run in noise": (RETURNS, lambda rng, runs, n: waves(rng, runs, n, n / 2, 1.4)),
    **{
        f"a wave of {runs_long} in {noise} of its noise": (
            RETURNS, lambda rng, runs, n, p=periods, noise=noise: waves(rng, runs, n, p * n, noise)
        )
        for runs_long, periods in (("the run", 1), ("two runs", 2))
        for noise in (0.3, 1.4)
    },
    "a slow wave, four in a run": (RETURNS, lambda rng, runs, n: waves(rng, runs, n, n / 4, 0.3)),
    "a slow wave, two in a run": (RETURNS, lambda rng, runs, n: waves(rng, runs, n, n / 2, 0.3)),
}  # fmt: skip
"""Processes, the verdicts that contradict them, and what makes so many runs of so many steps."""

DEGREES = {
    "half a deviation of drift": (WANDERS, lambda rng, runs, n: normal(rng, runs, n) + _n(n) / n),
    "AR(1), φ = 0.9, and half a deviation of drift": (
        WANDERS,
        lambda rng, runs, n: ar1(0.9, n, runs, rng) * np.sqrt(0.19) + _n(n) / n,
    ),
    "noise/log n": (SETTLES, lambda rng, runs, n: normal(rng, runs, n) / np.log(_n(n) + 1)),
}
"""The same of processes that differ from a stationary one by a matter of degree: noise/log n changes by 1.2 over the
last three quarters of 8,000 steps, and by less of more."""


AVERAGES = {
    **{f"AR(1), φ = {phi}": (0.0, 1 / (1 - phi**2), _ar(phi)) for phi in (0.0, 0.9, 0.99)},
    "noise, t of 3 degrees": (0.0, 3.0, lambda rng, runs, n: rng.standard_t(3, (runs, n))),
    "two constants": (0.0, 1.0, lambda rng, runs, n: rng.choice([-1.0, 1.0], (runs, n))),
    "squares of AR(1), φ = 0.9": (1.0, 2.0, lambda rng, runs, n: ar1(0.9, n, runs, rng) ** 2 * (1 - 0.81)),
    "noise and one spike": (
        0.0, 1.0, lambda rng, runs, n: normal(rng, runs, n) + 100 * (np.arange(n) == rng.integers(0, n, (runs, 1)))
    ),
    **{
        f"ARFIMA, d = {d}": (
            0.0, gamma(1 - 2 * d) / gamma(1 - d) ** 2, lambda rng, runs, n, d=d: arfima(rng, runs, n, d)
        )
        for d in (0.2, 0.45)
    },
    "GARCH, 0.1 + 0.89": (0.0, 1.0, garch),
    "GARCH, 0.15 + 0.8": (0.0, 1.0, lambda rng, runs, n: garch(rng, runs, n, 0.15, 0.8)),
}  # fmt: skip
"""Stationary processes, their mean and variance, and what makes so many runs of so many steps."""


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
