"""How often the intervals, verdicts and tests of the analysis are right, on processes whose answer is known.

    python -m tests.tools.calibration [ratios] [local] [local-weights] [rates] [verdicts] [intervals] [resets]
                                      [exponents] [law] [theorem] [compare] [loss-metric] [averages]

The tests assert bounds on a part of these; here are the numbers that `docs/analysis.md` has.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
from scipy.signal import lfilter
from scipy.special import digamma
from trajstore.analysis import local, local_variance_ratio, resets, time_average, variance, variance_ratio
from trajstore.analysis.convergence import judge
from trajstore.analysis.examining.maps import loss_contracts
from trajstore.analysis.law import adjusted, disjoint_test, swap_test
from trajstore.analysis.products import Exponent, Growth, exponent_of
from trajstore.analysis.rates import fit_rate
from trajstore.analysis.seeds import DECIDES, over_seeds

import trajstore as ts
from tests.analysis.processes import (
    AVERAGES,
    DEGREES,
    KNOWN,
    LAWS,
    PROCESSES,
    LeastSquares,
    ar1,
    compositions,
    iterate_pairs,
    last_half,
    path,
    products_of,
    quadratic,
    runs_of,
)
from trajstore.errors import StatisticError

_LENGTHS = (400, 2_000, 8_000)


def ratios(runs: int) -> None:
    """Intervals of variance ratios at 95%: how many are given, and how many of these hold the true ratio, 9."""
    print(f"{'process':40} {'steps':>6} {'given':>6} {'hold':>6}")
    cases = [(phi, steps, kind) for phi, steps in ((0, 1_000), (0.9, 1_000), (0.99, 1_000), (0.99, 20_000))
             for kind in ("level", "tail", "step")]  # fmt: skip
    for phi, steps, kind in cases:
        forward, backward = (ar1(phi, steps, runs, 10 + k) for k in range(2))
        _ratio(f"AR(1), φ = {phi}, {kind}", 3 * forward, backward, kind)
    for steps in (1_000, 2_000, 4_000):
        forward, backward = (ar1(0.9, steps, runs, 20 + k) ** 2 / 2 for k in range(2))
        _ratio("θ²/2 of the quadratic, h = 0.1, level", 9 * forward, 3 * backward, "level")


def _ratio(name: str, forward: np.ndarray, backward: np.ndarray, kind: str) -> None:
    steps = forward.shape[1]
    found = variance_ratio(runs_of(forward, backward), "loss", steps, kind)  # type: ignore[arg-type]
    given = (found["why"] == "").values
    held = ((found["low"] <= 9) & (found["high"] >= 9)).values[given]
    print(f"{name:40} {steps:6} {given.mean():6.0%} {held.mean() if given.any() else np.nan:6.0%}", flush=True)


def local_ratios(runs: int) -> None:
    """Intervals of local variance ratios at 95%: how many hold the true ratio, 9."""
    print(f"{'process':40} {'φ':>6} {'steps':>6} {'hold':>6}")
    bursts = lambda size: lambda x, noise: np.exp(size * x) * noise  # noqa: E731
    cases: Sequence[tuple[str, float, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = [
        ("AR(1)", 0.9, lambda x, noise: x),
        ("its exponential", 0.9, lambda x, noise: np.exp(x)),
        ("AR(1) on a slope", 0.9, lambda x, noise: x + 0.05 * np.arange(x.shape[1])),
        ("white noise in bursts of exp(3 x)", 0.9, bursts(3)),
        *(("white noise in bursts of exp(x)", phi, bursts(1)) for phi in (0.98, 0.99, 0.995)),
        ("white noise in weak bursts of exp(x/3)", 0.99, bursts(1 / 3)),
    ]
    for name, phi, process in cases:
        for steps in (200, 700, 2_000):
            x = [ar1(phi, steps, runs, 40 + k) * np.sqrt(1 - phi**2) for k in range(2)]
            made = [process(x[k], ar1(0.0, steps, runs, 50 + k)) for k in range(2)]
            found = local_variance_ratio(runs_of(3 * made[0], made[1]), "loss", steps)
            held = (found["low"] <= 9) & (found["high"] >= 9)
            print(f"{name:40} {phi:6} {steps:6} {float(held.mean()):6.0%}", flush=True)


def local_weights(runs: int) -> None:
    """Local variance ratios, by how likely it is beforehand that blocks are independent: how many hold 9, how wide."""
    cases: Sequence[tuple[str, float, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = [
        ("AR(1)", 0.9, lambda x, noise: x),
        *(("weak bursts of exp(x/3)", phi, lambda x, noise: np.exp(x / 3) * noise) for phi in (0.98, 0.99, 0.995)),
    ]
    print(f"{'process':40} {'φ':>6} {'steps':>6} {'now':>12} {'0.85':>12} {'0.95':>12}")
    for name, phi, process in cases:
        for steps in (200, 700):
            x = [ar1(phi, steps, runs, 140 + k) * np.sqrt(1 - phi**2) for k in range(2)]
            made = [process(x[k], ar1(0.0, steps, runs, 150 + k)) for k in range(2)]
            cells = f"{name:40} {phi:6} {steps:6}"
            for plain, few in ((local._INDEPENDENT, local._FEW_INDEPENDENT), (0.85, 0.85), (0.95, 0.95)):
                with patch.multiple(local, _INDEPENDENT=plain, _FEW_INDEPENDENT=few):
                    found = local_variance_ratio(runs_of(3 * made[0], made[1]), "loss", steps)
                held = float(((found["low"] <= 9) & (found["high"] >= 9)).mean())
                reach = float(np.log(found["high"] / found["low"]).median()) / 2
                cells += f" {held:6.0%} {reach / (1.96 * float(np.log(found['ratio']).std())):5.1f}"
            print(cells, flush=True)


def rates(runs: int) -> None:
    """Intervals of rates at 95%: how many hold the true rate, those of ordinary least squares for comparison."""
    print(f"{'moves':40} {'steps':>6} {'hold':>6} {'ordinary':>9}")
    rng = np.random.default_rng(1)
    for h, steps in ((0.1, 150), (0.05, 400), (0.01, 2_000)):
        approaches = (path(quadratic(rng, h, steps, "backward")).moves for _ in range(runs))
        _rate(f"quadratic, backward, h = {h}", 1 - h, approaches)
    for walk, noise in ((0.3, 1.0), (0.1, 1.0), (0.05, 1.0), (1.0, 0.1)):
        _rate(f"a walk of {walk} in noise of {noise}", np.exp(-0.05), (_walk(rng, walk, noise) for _ in range(runs)))
    problem = LeastSquares(h=0.05)
    expected = float(np.exp(problem.lyapunov(np.random.default_rng(1))))
    for steps in (200, 400, 800):
        products = (path(problem.iterates(rng, 100 + steps, "backward")).moves[100:] for _ in range(runs))
        _rate("least squares, backward", expected, products)
    ridge = LeastSquares(h=0.05, ridge=0.5)
    expected = float(np.exp(ridge.lyapunov(np.random.default_rng(1))))
    products = (path(ridge.iterates(rng, 300, "backward")).moves[100:] for _ in range(runs))
    _rate("ridge, backward", expected, products)


def _walk(rng: np.random.Generator, step: float, noise: float) -> np.ndarray:
    logarithms = np.cumsum(-0.05 + step * rng.standard_normal(400))
    return np.exp(logarithms + noise * rng.standard_normal(400))


def _rate(name: str, true: float, moves: Iterable[np.ndarray]) -> None:
    held, ordinary = [], []
    for some in moves:
        rate = fit_rate(some)
        held.append(rate is not None and rate.low <= true <= rate.high)
        some = some[some > 0]
        x = np.arange(len(some)) - (len(some) - 1) / 2
        slope = x @ np.log(some) / (x @ x)
        rest = np.log(some) - np.log(some).mean() - slope * x
        ordinary.append(abs(slope - np.log(true)) <= 1.96 * np.sqrt(rest @ rest / (len(x) - 2) / (x @ x)))
    print(f"{name:40} {len(some):6} {np.mean(held):6.0%} {np.mean(ordinary):9.0%}", flush=True)


def verdicts(runs: int) -> None:
    """Verdicts: how many are right, then how many are decided, and how many of all contradict the process."""
    print(f"{'process':40} {'verdict':>13} {'right':>6} {'wrong':>6}")
    for name, (right, process) in KNOWN.items():
        rng = np.random.default_rng(1)
        found = Counter(judge(last_half(process(rng))).verdict for _ in range(runs // 2))
        wrong = found.total() - found[right] - found["undecided"]
        print(f"{name:40} {right:>13} {found[right] / found.total():6.0%} {wrong / found.total():6.1%}", flush=True)
    for title, processes in (("process", PROCESSES), ("a matter of degree", DEGREES)):
        print(f"\n{title:46}" + "".join(f"{steps:>9,} decided  wrong" for steps in _LENGTHS))
        for name, (contradicts, make) in processes.items():
            shares = ""
            for steps in _LENGTHS:
                found = Counter(judge(last_half(v)).verdict for v in make(np.random.default_rng(7), runs, steps))
                wrong = sum(found[verdict] for verdict in contradicts)
                shares += f"{1 - found['undecided'] / runs:17.0%} {wrong / runs:6.1%}"
            print(f"{name:46}{shares}", flush=True)


def intervals(runs: int) -> None:
    """Intervals of a mean and of a variance at 95%: how many are given, and how many of these hold the true one."""
    print(f"{'process':40} {'steps':>6} {'mean':>6} {'hold':>6} {'variance':>9} {'hold':>6}")
    for name, (mean, spread, make) in AVERAGES.items():
        for steps in (1_000, 4_000):
            made = make(np.random.default_rng(8), runs, steps)
            ds = runs_of(made[: runs // 2], made[runs // 2 :])
            cells = f"{name:40} {steps:6}"
            told = ((time_average(ds, "loss", steps), mean, 6), (variance(ds, "loss", steps, "level"), spread, 9))
            for found, true, width in told:
                given = np.isfinite(found["low"]).values
                held = ((found["low"] <= true) & (found["high"] >= true)).values[given]
                cells += f" {given.mean():{width}.0%} {held.mean() if given.any() else np.nan:6.0%}"
            print(cells, flush=True)


_SOME = ((0.02, 0.0), (0.3, 0.5))
"""Standard deviation and φ of noise."""


def leg_changes(runs: int) -> None:
    """A reset that changes nothing: how many are told `elsewhere` by what is beside; and how many that change by 1."""
    columns = ("forward", "without", "alone")
    print(
        f"{'curve, AR(1) of 0.02 or 0.3':44} {'steps':>6} "
        + " ".join(f"{c:>8}" for c in (*columns, "undecided", "of 1"))
    )
    for steps, noises in ((800, ((0.0, 0.0), (0.02, 0.0), (0.3, 0.5), (0.3, 0.9))), (400, _SOME), (2_000, _SOME)):
        for name, curve in nothing_changes(steps).items():
            for size, phi in noises:
                told = {beside: Counter(told_of(curve, runs, size, phi, 0.0, beside)) for beside in columns}
                changed = Counter(told_of(curve, runs, size, phi, 1.0, "forward"))
                shares = [told[beside]["elsewhere"] / runs for beside in columns]
                shares += [told["alone"]["undecided"] / runs, changed["elsewhere"] / runs]
                name_of = f"{name}, {size}, φ = {phi}"
                print(f"{name_of:44} {steps:6} " + " ".join(f"{share:8.1%}" for share in shares), flush=True)
        for name, (curve, forward) in other_forwards(steps).items():
            for size, phi in noises[:3]:
                found = Counter(told_of(curve, runs, size, phi, 0.0, "forward", forward))
                print(f"{f'{name}, {size}, φ = {phi}':44} {steps:6} " + _shares(found), flush=True)


def _shares(told: Counter[str]) -> str:
    return ", ".join(f"{verdict} {count / told.total():.0%}" for verdict, count in told.most_common())


def nothing_changes(steps: int) -> dict[str, np.ndarray]:
    """Return curves that do not know of a reset in the middle; sigmoids fall so many legs after it."""
    n, leg = np.arange(steps), steps // 2
    falls = {f"sigmoid at {at}": fall(steps, at) for at in (0.1, 0.3, 0.5, 0.7, 0.9)}
    decays = {f"exponential of {tau} legs": np.exp(-n / (tau * leg)) for tau in (0.2, 0.5, 1)}
    powers = {f"n^-{power}": (1 + n / 10.0) ** -power for power in (0.5, 1, 3)}
    return {**falls, **decays, **powers, "logarithm": -np.log(1 + n) / 5, "slope": -n / steps, "flat": np.ones(steps)}


def fall(steps: int, at: float) -> np.ndarray:
    """Return a sigmoid that falls so many legs after a reset in the middle."""
    n, leg = np.arange(steps), steps // 2
    return np.asarray(1 / (1 + np.exp(np.clip(((n - leg) / leg - at) / 0.03, -700, 700))))


def other_forwards(steps: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return pairs of curves, of the order with a reset that changes nothing and of a forward that is another curve."""
    n, leg = np.arange(steps), steps // 2
    shapes = {"sigmoid at 0.3": fall(steps, 0.3), "slope": -n / steps, "logarithm": -np.log(1 + n) / 5,
              "exponential of 0.5 legs": np.exp(-n / (0.5 * leg))}  # fmt: skip
    scaled = {f"{times} times forward, {name}": (times * shape, shape)
              for name, shape in shapes.items() for times in (0.7, 1.3)}  # fmt: skip
    return {**scaled, "forward falls 0.3 legs later": (fall(steps, 0.3), fall(steps, 0.6)),
            "forward falls 0.6 legs later": (fall(steps, 0.3), fall(steps, 0.9))}  # fmt: skip


def told_of(
    curve: np.ndarray,
    runs: int,
    size: float,
    phi: float,
    change: float,
    beside: str,
    forward: np.ndarray | None = None,
) -> list[str]:
    """Return what is told of a reset in the middle that adds a change, with one order beside, or alone.

    Forward is the same curve, or one of its own.
    """
    steps, leg = len(curve), len(curve) // 2
    noise = [size * np.sqrt(1 - phi**2) * ar1(phi, steps, runs, 70 + k) for k in range(3)]
    after = np.arange(steps) > leg
    reset = curve + noise[0] + change * after
    if beside == "forward":
        other = (curve if forward is None else forward) + noise[1]
    else:
        other = curve + np.where(after, noise[2], noise[0])
    name = f"backward+backward@{leg}"
    ds = runs_of(other, reset).assign_coords(order=["forward" if beside == "forward" else "backward", name])
    legs = np.zeros(ds["loss"].shape, dtype=int)
    legs[1, :, leg + 1 :] = leg
    ds = ds.assign(leg=(ds["loss"].dims, legs))
    try:
        found = resets(ds if beside != "alone" else ds.sel(order=[name]), "loss")
    except StatisticError:
        return ["too short"] * runs
    return [str(told) for told in found["settles"].values]


Maps = Callable[[int], np.ndarray]
"""n → the n-th matrices, (run, d, d)."""


def exponents(runs: int) -> None:
    """Exponents at 95%: how many are given, hold the true one, and are off by more than twice their reach."""
    print(f"{'product':40} {'steps':>6} {'given':>6} {'hold':>6} {'wrong':>6}")
    for steps in (400, 2_000):
        rng = np.random.default_rng(steps)
        for name, true, maps in _products(rng, runs, steps):
            every = [maps(n) for n in range(steps)]
            found = exponents_of([np.broadcast_to(one, (runs, *one.shape[1:])) for one in every])
            value, reach = np.array([(one.value, one.reach) for one in found]).T
            given, off = ~np.isnan(value), np.abs(value - true)
            held = (off <= reach)[given].mean() if given.any() else np.nan
            print(
                f"{name:40} {steps:6} {given.mean():6.0%} {held:6.0%} {(given & (off > 2 * reach)).mean():6.1%}",
                flush=True,
            )
        for phi in (0.9, 0.99, 0.995, 0.999):
            found = exponents_of_correlated(phi, runs, steps)
            value, reach = np.array([(one.value, one.reach) for one in found]).T
            given, off = ~np.isnan(value), np.abs(value + 0.01)
            held = (off <= reach)[given].mean() if given.any() else np.nan
            wrong = (given & (off > 2 * reach)).mean()
            print(f"{f'AR(1), φ = {phi}':40} {steps:6} {given.mean():6.0%} {held:6.0%} {wrong:6.1%}", flush=True)


def exponents_of_correlated(phi: float, runs: int, steps: int) -> list[Exponent]:
    """Return exponents where growth is −0.01 + 0.05 AR(1), as where curvature changes slowly along the iterates."""
    grown = -0.01 + 0.05 * np.sqrt(1 - phi**2) * ar1(phi, steps, runs, 90)
    return [exponent_of(Growth(row, np.zeros(steps), np.full(steps, 1e-15))) for row in grown]


def exponents_of(maps: Sequence[np.ndarray]) -> list[Exponent]:
    """Return the exponents of products, a run each, of two differences that begin at right angles.

    `maps` are the matrices of each step, (run, d, d).
    """
    runs, d, dtype = len(maps[0]), maps[0].shape[-1], str(maps[0].dtype)
    return [
        exponent_of(products_of(lambda n, k=k: maps[n - 1][k], d, k, dtype)(len(maps)))  # type: ignore[misc]
        for k in range(runs)
    ]


def gaussian(rng: np.random.Generator, runs: int, steps: int, d: int) -> list[np.ndarray]:
    """Return independent matrices of standard normal deviates."""
    return [rng.standard_normal((runs, d, d)) for _ in range(steps)]


def _products(rng: np.random.Generator, runs: int, steps: int) -> Iterable[tuple[str, float, Maps]]:
    """Yield products with their exponents."""
    for d in (1, 2, 3, 5):
        problem = LeastSquares(h=0.05, d=d)
        true = problem.lyapunov(np.random.default_rng(1), 50_000)
        drawn = rng.integers(0, len(problem.A), (runs, steps))
        yield f"least squares, d = {d}", true, lambda n, A=problem.A, drawn=drawn: A[drawn[:, n]]  # type: ignore[misc]
    for d in (2, 5):
        drawn = gaussian(rng, runs, steps, d)
        yield f"Gaussian, d = {d}", 0.5 * (np.log(2) + digamma(d / 2)), lambda n, drawn=drawn: drawn[n]  # type: ignore[misc]
    for name, falls in (("equal", [0.01, 0.01]), ("near", [0.01, 0.03]), ("far", [0.01, 0.1])):
        drawn = np.exp(0.1 * rng.standard_normal((steps, runs, 2)) - falls)
        yield f"commuting, {name} exponents", -0.01, lambda n, drawn=drawn: drawn[n][:, :, None] * np.eye(2)  # type: ignore[misc]
    fixed = {f"diagonal, 1 to 1.25, h = {h}, d = {d}": (np.log(1 - h), np.diag(1 - h * np.linspace(1, 1.25, d)))
             for d in (2, 3, 5, 50) for h in (0.004, 0.04, 0.4)}  # fmt: skip
    fixed["two slow directions of five"] = np.log(0.996), np.diag([0.996, 0.995, 0.6, 0.5, 0.4])
    fixed["equal, d = 3"] = np.log(0.9), 0.9 * np.eye(3)
    for angle, long in ((0.3, 1), (0.3, 10), (0.3, 40), (0.01, 40), (0.003, 40)):
        turn = np.array([[np.cos(angle), -long * np.sin(angle)], [np.sin(angle) / long, np.cos(angle)]])
        fixed[f"turning by {angle}, stretched {long} times"] = np.log(0.99), 0.99 * turn
    fixed["a Jordan block"] = np.log(0.99), np.array([[0.99, 1], [0, 0.99]])
    fixed["of both signs"] = np.log(0.95), np.diag([-0.95, 0.9])
    for name, (true, matrix) in fixed.items():
        yield name, float(true), lambda n, matrix=matrix: matrix[None]  # type: ignore[misc]


def law(runs: int) -> None:
    """Law tests at 5%, 100 seeds, backward shifted by so many deviations: how often they reject."""
    tests = (1, 3, 10, 30)
    print("   n  shift   swap  disjoint   after Holm, of metrics × steps: " + "".join(f"{m:>6}" for m in tests))
    for n in (5, 20, 60):
        for shift in (0.0, 0.25, 0.5, 1.0):
            rng, p = np.random.default_rng(n), np.empty((runs, 2))
            for row in p:
                forward, backward = iterate_pairs(rng, n, 100)
                backward = backward + shift * backward.std()
                row[:] = [test(forward, backward, 1_999, rng) for test in (swap_test, disjoint_test)]
            swap, disjoint = (p <= 0.05).mean(0)
            after = "".join(f"{_after_holm(rng, p, m):6.0%}" for m in tests)
            print(f"{n:4} {shift:6} {swap:6.0%} {disjoint:9.0%} {'':35}{after}", flush=True)


def theorem(seeds: int) -> None:
    """Theorem 2.6: p-values of the swap and the disjoint test, of backward and of compositions with another law."""
    print(f"{'problem':20} {'n':>3}  {'forward against':24} {'swap':>7} {'disjoint':>9}")
    for name, table in LAWS.items():
        with TemporaryDirectory() as folder:
            asked = ts.Experiment.of({**table, "name": "law", "steps": 60, "seeds": list(range(seeds)), "init_seed": 0,
                                      "record": {"every": 20}})  # fmt: skip
            stored = ts.run(asked, Path(folder) / "s.zarr", workers=0)
            for n in (20, 60):
                found, rng = compositions(stored, n), np.random.default_rng(n)
                forward = found.pop("forward")
                for other, ends in found.items():
                    p = [test(forward, ends, 1_999, rng) for test in (swap_test, disjoint_test)]
                    print(f"{name:20} {n:3}  {other:24} {p[0]:7.4f} {p[1]:9.4f}", flush=True)


def _after_holm(rng: np.random.Generator, p: np.ndarray, tests: int) -> float:
    """Return how often either is rejected, among others whose p-values are uniform."""
    others = rng.uniform(size=(len(p), 2 * (tests - 1)))
    found = [adjusted(np.append(mine, rest))[:2].min() <= 0.05 for mine, rest in zip(p, others, strict=True)]
    return float(np.mean(found))


EFFECTS: Mapping[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda rng, size: rng.standard_normal(size),
    "Student's t, 3 degrees": lambda rng, size: rng.standard_t(3, size) / np.sqrt(3),
    "exponential": lambda rng, size: rng.exponential(size=size) - 1,
    "lognormal": lambda rng, size: (np.exp(rng.standard_normal(size)) - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e),
}
"""How seeds may differ: mean 0, variance 1."""


def effects(runs: int, name: str, seeds: int, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Return intervals of `compare` for effects that differ by seed by this law, of mean 0.

    What `compare` makes of two curves of a seed is the mean of their difference over the last quarter: what they share
    is gone, and there is the effect with autocorrelated noise. Effects with another mean move the intervals by it.
    """
    rng, steps = np.random.default_rng(seeds), 40
    noise = 0.1 * ar1(0.8, steps, runs * seeds, seeds)[:, -steps // 4 :].mean(1)
    _, low, high = over_seeds(EFFECTS[name](rng, (runs, seeds)) + noise.reshape(runs, seeds), level)
    return low, high


def comparisons(runs: int) -> None:
    """Variants over seeds: how many intervals of 95% hold the mean effect, and how many of 99% tell the wrong sign."""
    print(f"{'effect by seed':26} {'seeds':>5} {'hold':>6} {'wrong, of ¼, ½, 1 deviation':>30} {'seen, of 2':>11}")
    for name in EFFECTS:
        for seeds in (3, 5, 20):
            low, high = effects(runs, name, seeds, 0.95)
            held = ((low <= 0) & (high >= 0)).mean()
            low, high = effects(runs, name, seeds, DECIDES)
            wrong = "  ".join(f"{max((high < -size).mean(), (low > size).mean()):6.1%}" for size in (0.25, 0.5, 1.0))
            seen = min((low > -2).mean(), (high < 2).mean())
            print(f"{name:26} {seeds:5} {held:6.1%} {wrong:>30} {seen:11.0%}", flush=True)


LOSSES: Mapping[str, tuple[int, float, float, int]] = {
    "5 parameters, h = 0.01, from 30": (5, 0.01, 30.0, 200),
    "5 parameters, h = 0.02, from 3": (5, 0.02, 3.0, 400),
    "5 parameters, h = 0.1, from 3": (5, 0.1, 3.0, 400),
    "5 parameters, h = 0.01, at rest": (5, 0.01, 0.07, 400),
    "20 parameters, h = 0.5, from 1": (20, 0.5, 1.0, 400),
}
"""Forward on the quadratic, H = 1: parameters, learning rate, standard deviation of θ₀, steps."""


def loss_factors(rng: np.random.Generator, name: str, seeds: int, pairs: int) -> np.ndarray:
    """Return the factors of L(x) + L(y) of random pairs of each seed's iterates under one of its own batches."""
    parameters, h, start, steps = LOSSES[name]
    noise = rng.standard_normal((seeds, steps, parameters))
    begin = start * rng.standard_normal((seeds, 1, parameters))
    iterates = lfilter([1], [1, h - 1], np.concatenate([begin, h * noise], axis=1), axis=1)
    one = rng.integers(0, steps + 1, (seeds, pairs))
    other = (one + rng.integers(1, steps + 1, (seeds, pairs))) % (steps + 1)
    row, batch = np.arange(seeds)[:, None], rng.integers(0, steps, (seeds, pairs))
    x, y, epsilon = iterates[row, one], iterates[row, other], noise[row, batch]
    before, after = (
        (x**2 + y**2).sum(-1),
        (((1 - h) * x + h * epsilon) ** 2 + ((1 - h) * y + h * epsilon) ** 2).sum(-1),
    )
    return np.asarray(after / before)


def contractions(runs: int) -> None:
    """`loss-metric`: how many intervals of 99% hold 1 − the factor's mean, and how many verdicts contradict it.

    Beside it how many intervals held that took 100 pairs of one trajectory for independent (of 95%).
    """
    print(f"{'process':34} {'mean':>8} {'pairs':>6} {'seeds':>5} {'hold':>6} {'wrong':>6} {'definite':>9}")
    for name in LOSSES:
        rng = np.random.default_rng(1)
        true = 1 - loss_factors(rng, name, 2_000, 100).mean()
        alone = 1 - loss_factors(rng, name, runs, 100)
        reach = 1.98 * alone.std(axis=1, ddof=1) / 10
        once = f"{(abs(alone.mean(1) - true) <= reach).mean():6.0%}"
        for seeds in (1, 3, 5, 20):
            which = np.repeat(np.arange(seeds), 100 // seeds + 1)
            found = [
                loss_contracts(loss_factors(rng, name, seeds, 100 // seeds + 1).ravel(), which) for _ in range(runs)
            ]
            held = np.mean([one.low <= true <= one.high for one in found])
            wrong = np.mean([one.verdict == ("does not hold" if true > 0 else "holds") for one in found])
            definite = np.mean([one.verdict != "not decidable here" for one in found])
            print(f"{name:34} {true:8.4f} {once} {seeds:5} {held:6.0%} {wrong:6.1%} {definite:9.0%}", flush=True)


def averages(runs: int) -> None:
    """Time averages: how many have an interval of 95%, and how many of these hold the mean."""
    print(f"{'process':20} {'steps':>6} {'given':>6} {'hold':>6}")
    for phi, steps in ((0.0, 400), (0.0, 2_000), (0.9, 2_000), (0.9, 8_000), (0.99, 8_000), (0.99, 40_000)):
        curves = ar1(phi, steps, runs, 60)
        found = time_average(runs_of(curves, curves).sel(order=["forward"]), "loss", steps)
        given = np.isfinite(found["low"].values[0])
        held = ((found["low"] <= 0) & (found["high"] >= 0)).values[0][given]
        print(
            f"AR(1), φ = {phi:<10} {steps:6} {given.mean():6.0%} {held.mean() if given.any() else np.nan:6.0%}",
            flush=True,
        )


PARTS: Mapping[str, tuple[Callable[[int], None], int]] = {
    "ratios": (ratios, 500),
    "local": (local_ratios, 500),
    "local-weights": (local_weights, 500),
    "rates": (rates, 200),
    "verdicts": (verdicts, 60),
    "intervals": (intervals, 200),
    "resets": (leg_changes, 50),
    "exponents": (exponents, 20),
    "law": (law, 500),
    "theorem": (theorem, 200),
    "compare": (comparisons, 10_000),
    "loss-metric": (contractions, 400),
    "averages": (averages, 400),
}
"""Name → what prints it, and of how many runs."""


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="by default all")
    for name in parser.parse_args().parts or PARTS:
        show, runs = PARTS[name]
        print(f"\n{' '.join(str(show.__doc__).split())} {runs} runs each.\n")
        show(runs)


if __name__ == "__main__":
    main()
