"""Every order has its closed form, read back from the store, in float64 to 1e-12 relative."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trajstore.problems.least_squares import LeastSquares
from trajstore.problems.quadratic import Quadratic

STEPS = 24

# Each label with its legs spelled out by hand: (kind, start).
LABELS = {
    "forward": [("forward", 0)],
    "backward": [("backward", 0)],
    "backward+backward@10": [("backward", 0), ("backward", 10)],
    "forward+backward@10": [("forward", 0), ("backward", 10)],
    "backward+forward@9": [("backward", 0), ("forward", 9)],
    "backward/7": [("backward", 0), ("backward", 7), ("backward", 14), ("backward", 21)],
    "forward+backward/6@5": [("forward", 0), ("backward", 5), ("backward", 11), ("backward", 17), ("backward", 23)],
    "backward/6+forward@8+backward@20": [("backward", 0), ("backward", 6), ("forward", 8), ("backward", 20)],
}


def along(legs, steps, start, iterate):
    """Compose legs: iterate(kind, a, n, state at a) is the closed form within a leg."""
    states = {0: start}
    for (kind, a), end in zip(legs, [*(b for _, b in legs[1:]), steps], strict=True):
        for n in range(a + 1, end + 1):
            states[n] = iterate(kind, a, n, states[a])
    return np.array([states[n] for n in range(steps + 1)])


def stored(experiment, order, seed):
    return experiment.dataset()["params"].sel(order=order, seed=seed).transpose("snapshot", "param").values


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("codec", ["pcodec", "portable"])
def test_section_3_1_quadratic_with_gradient_noise(record, codec):
    h = 0.1
    experiment = record(
        "quadratic", steps=STEPS, seeds=[0, 3], orders=list(LABELS), operator={"lr": h}, record={"codec": codec}
    )
    live = Quadratic().build(torch.device("cpu"))
    for seed in (0, 3):
        noise = {i: live.batches(seed)[i][0].numpy() for i in range(1, STEPS + 1)}

        def iterate(kind, a, n, state, noise=noise):
            indices = range(a + 1, n + 1)
            age = (lambda i: n - i) if kind == "forward" else (lambda i: i - a - 1)
            return (1 - h) ** (n - a) * state + sum(h * (1 - h) ** age(i) * noise[i] for i in indices)

        start = live.initial(seed)[0]["theta"].numpy()
        for label, legs in LABELS.items():
            assert_close(stored(experiment, label, seed), along(legs, STEPS, start, iterate))


def test_section_3_2_quadratic_with_a_random_hessian(record):
    h = 0.2
    problem = {"family": "quadratic", "spectrum": [0.2, 0.9, 1.7, 3.0], "rotation_seed": 11, "noise": 0.7}
    experiment = record(
        {"name": "rotated", "problem": problem, "operator": {"family": "sgd", "lr": h}, "steps": STEPS},
        orders=list(LABELS),
    )
    family = Quadratic((0.2, 0.9, 1.7, 3.0), 0.7, 11)
    live = family.build(torch.device("cpu"))
    noise = {i: live.batches(0)[i][0].numpy() for i in range(1, STEPS + 1)}
    values, basis = np.linalg.eigh(family.hessian)

    def power(k):
        return (basis * (1 - h * values) ** k) @ basis.T

    def iterate(kind, a, n, state):
        age = (lambda i: n - i) if kind == "forward" else (lambda i: i - a - 1)
        return power(n - a) @ state + sum(h * power(age(i)) @ noise[i] for i in range(a + 1, n + 1))

    start = live.initial(0)[0]["theta"].numpy()
    for label, legs in LABELS.items():
        assert_close(stored(experiment, label, 0), along(legs, STEPS, start, iterate))


def test_example_2_4_two_constant_maps(record):
    experiment = record("two-constants", steps=STEPS, seeds=[0, 1, 2], orders=list(LABELS))
    drawn = experiment.dataset()["batch_index"].values[:, :, 0]
    for k, seed in enumerate((0, 1, 2)):
        value = {i: np.array([(-1.0, 1.0)[drawn[k, i - 1]]]) for i in range(1, STEPS + 1)}
        start = experiment.arrays(order="forward", seed=seed, step=0)["theta"]

        def iterate(kind, a, n, state, value=value):
            return value[n] if kind == "forward" else value[a + 1]

        for label, legs in LABELS.items():
            np.testing.assert_array_equal(stored(experiment, label, seed), along(legs, STEPS, start, iterate))
    forward = stored(experiment, "forward", 0)[1:]
    assert {-1.0, 1.0} == set(forward[:, 0])
    assert len(set(stored(experiment, "backward", 0)[1:, 0])) == 1


@pytest.mark.parametrize("sampling", ["iid", "shuffle"])
def test_least_squares_against_folded_affine_maps(record, sampling):
    h, family = 0.05, LeastSquares(n=13, d=3, ridge=0.1, batch_size=2, sampling=sampling, problem_seed=4)
    problem = {
        "family": "least-squares", "n": 13, "d": 3, "ridge": 0.1, "batch_size": 2, "sampling": sampling,
        "problem_seed": 4,
    }  # fmt: skip
    experiment = record(
        {"name": "ls", "problem": problem, "operator": {"family": "sgd", "lr": h}, "steps": STEPS}, orders=list(LABELS)
    )
    X, y = family.data
    drawn = experiment.dataset()["batch_index"].values[0]

    def affine(i):
        rows = drawn[i - 1]
        matrix = np.eye(3) - h * (X[rows].T @ X[rows] / len(rows) + 0.1 * np.eye(3))
        return matrix, h * X[rows].T @ y[rows] / len(rows)

    def iterate(kind, a, n, state):
        matrix, vector = np.eye(3), np.zeros(3)
        for i in range(a + 1, n + 1) if kind == "forward" else range(n, a, -1):
            A, b = affine(i)
            matrix, vector = A @ matrix, A @ vector + b
        return matrix @ state + vector

    start = experiment.arrays(order="forward", seed=0, step=0)["theta"]
    for label, legs in LABELS.items():
        assert_close(stored(experiment, label, 0), along(legs, STEPS, start, iterate))


def test_the_first_iterates_agree_and_so_do_full_batches(record):
    experiment = record("quadratic", steps=3, seeds=[0], orders=["forward", "backward"])
    one = {order: experiment.arrays(order=order, seed=0, step=1)["theta"] for order in ("forward", "backward")}
    assert np.array_equal(one["forward"], one["backward"])
    orders = ["forward", "backward"]
    noiseless = record("quadratic", name="full", steps=9, seeds=[0], orders=orders, problem={"noise": 0.0})
    assert np.array_equal(*(stored(noiseless, order, 0) for order in orders))


def test_a_reset_on_improvement_follows_its_rule_and_stores_the_starts(record):
    h, w, steps, seeds = 0.3, 5, 60, range(6)
    label = f"backward/{w}?train_loss"
    experiment = record("quadratic", steps=steps, seeds=list(seeds), orders=["backward", label], operator={"lr": h})
    live = Quadratic().build(torch.device("cpu"))
    reset_somewhere = kept_somewhere = False
    for seed in seeds:
        noise = {i: float(live.batches(seed)[i][0]) for i in range(1, steps + 1)}
        theta = {0: float(live.initial(seed)[0]["theta"])}
        starts, a = [0], 0
        for n in range(1, steps + 1):
            theta[n] = (1 - h) ** (n - a) * theta[a] + sum(
                h * (1 - h) ** (i - a - 1) * noise[i] for i in range(a + 1, n + 1)
            )
            starts.append(a)
            if n % w == 0 and n < steps:
                reset = theta[n] ** 2 < theta[a] ** 2
                reset_somewhere |= reset
                kept_somewhere |= not reset
                a = n if reset else a
        expected = [theta[n] for n in range(steps + 1)]
        np.testing.assert_allclose(stored(experiment, label, seed)[:, 0], expected, rtol=1e-11, atol=1e-13)
        leg = experiment.dataset()["leg"].sel(order=label, seed=seed).values
        assert leg.tolist() == starts
    assert reset_somewhere
    assert kept_somewhere
