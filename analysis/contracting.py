"""Whether the maps contract: what T_i does to the distance of two stored iterates, and what theory says it does.

``contraction``      ‖T_i x − T_i y‖ / ‖x − y‖ for pairs of stored iterates under the same batch
``lyapunov``         the exponent of the products of the T_i along forward iterates: the rate to expect of backward
``uniform_factor``   the k < 1 by which every T_i contracts, where that is known (Lemma 2.5; exact for affine maps)
``limit_bound``      Theorem 2.2: C kⁿ, above the distance of the backward iterate to its limit, for every n

Single batches need not contract for their products to: ‖I − hxxᵀ‖ = 1 for rows of least squares.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from trajstore.analysis.products import CERTAIN, LEAST, Exponent, Growth, directions, exponent_of, follow
from trajstore.analysis.rounding import of_size
from trajstore.analysis.states import distance, norm
from trajstore.analysis.tables import Table

from trajstore.errors import ConfigurationError, NotFoundError, StatisticError, slab_named
from trajstore.experiment.experiment import Experiment
from trajstore.operators.sgd import is_plain
from trajstore.operators.state import State, Tensors
from trajstore.problems import Problem
from trajstore.problems.batches import generator
from trajstore.problems.least_squares import LeastSquares
from trajstore.problems.quadratic import Quadratic
from trajstore.replay.recipe import Recipe, Source
from trajstore.replay.reviving import revive
from trajstore.store import StoredExperiment

__all__ = ["contraction", "known_factors", "lemma_factor", "limit_bound", "lyapunov", "tables"]


def contraction(stored: StoredExperiment, order: str = "forward", pairs: int = 100, random_seed: int = 0) -> xr.Dataset:
    """Return the factors of random pairs of stored iterates, along ``pair``; both of a pair are of one seed.

    `stored` is a recorded experiment, `order` the one whose iterates are drawn, `pairs` how many pairs of all seeds
    together, and `random_seed` draws them.

    ``factor`` is that of the parameters' distance, NaN where rounding would be seen in it; ``loss_factor`` that of
    L(x) + L(y), Appendix G's pseudo-metric of the training loss. The batch is one of the seed's own, at a random index.
    """
    revived, schema = revive(stored), stored.schema
    if order not in schema.orders:
        raise NotFoundError(f"experiment {stored.name!r} has no order {order!r}; there is {', '.join(schema.orders)}")
    if pairs < 1:
        raise ConfigurationError(f"pairs is {pairs}; it must be at least 1")
    _refuse_more_than_parameters(revived)
    there = stored.commits().snapshots[schema.orders.index(order)]
    rng, found = generator(random_seed, "analysis"), []
    for k in rng.integers(len(schema.seeds), size=pairs).tolist():
        seed, steps = schema.seeds[k], np.array(schema.snapshots)[there[k]]
        if len(steps) < 2:
            raise StatisticError(
                f"{slab_named(stored.name, order, seed)}: {len(steps)} states are stored, and a pair "
                "needs two; finish the recording"
            )
        first, second = sorted(rng.choice(steps, 2, replace=False).tolist())
        index = int(rng.integers(1, schema.steps + 1))
        # One map for both: where the learning rate goes by position, the two would have one each.
        position = torch.tensor(index - 1)
        x, y = (state._replace(position=position) for state in revived.states(order, seed, [first, second]))
        batch = revived.batches(seed)[index]
        x_after, y_after = (revived.apply(state, batch, index) for state in (x, y))
        before, after = distance(x, y), distance(x_after, y_after)
        if before < CERTAIN * float(of_size(np.array([norm(x.params)]), schema.layout.dtype)[0]):
            before = np.nan  # iterates so near each other that rounding would be seen in the factor
        losses = [_loss(revived, state) for state in (x, y, x_after, y_after)]
        found.append(
            (seed, first, second, index, before, _ratio(after, before), _ratio(sum(losses[2:]), sum(losses[:2])))
        )
    names = ("seed", "step", "other_step", "batch", "distance", "factor", "loss_factor")
    columns = {name: ("pair", np.array(column)) for name, column in zip(names, zip(*found, strict=True), strict=True)}
    attrs = {"experiment": stored.name, "order": order, "random_seed": random_seed}
    return xr.Dataset(columns, attrs=attrs | known_factors(revived.experiment))


def lyapunov(source: Source, seed: int | None = None, steps: int | None = None, level: float = 0.95) -> xr.Dataset:
    """Return the exponent of the products along the forward iterates of a seed, with an interval.

    `source` is a recorded experiment, or its dataset. Without `seed` it is the first of an experiment, that of a
    dataset of which one is selected; `steps` are followed, by default as many as the experiment has; `level` is that of
    the interval. Each step takes a step of training and two products with its derivative.

    The logarithm of how an infinitely small difference grows at each step, averaged. ``rate`` is the factor per step,
    exp(exponent): backward iterates approach their limit by it.

    Any difference turns, step by step, into the direction that grows most, and until it has, it grows otherwise than
    the exponent says, which takes the longer the more parameters there are and the nearer the next exponent is. So two
    differences begin at right angles (of one parameter there is one, and nothing turns), and the average begins where
    they are nearly one. Where they are not by the middle, or do not go on to become one, and where their growth still
    changes, ``exponent`` is NaN, and ``why`` says so. ``growth`` is how the first of them has grown, per step of the
    last three quarters, which is no more than a fact about such differences over so many steps. Where a map leaves
    nothing of any difference, the exponent is −∞.
    """
    recipe = Recipe.of(source)
    seeds = recipe.schema.seeds if isinstance(source, StoredExperiment) else np.atleast_1d(source["seed"].values)
    chosen, count = int(seeds[0]) if seed is None else seed, recipe.schema.steps if steps is None else steps
    if count < 2 * LEAST:
        raise StatisticError(f"{count} steps are too few for an exponent; ask for {2 * LEAST} or more")
    _refuse_more_than_parameters(recipe)
    grown = _grown(recipe, chosen, count)
    known = _of_one_hessian(recipe.experiment)
    found = exponent_of(grown, level) if known is None else Exponent(known)
    low, high = (found.value + side * found.reach for side in (-1, 1))
    fields = {"exponent": found.value, "exponent_low": low, "exponent_high": high}
    rates = {name.replace("exponent", "rate"): float(np.exp(value)) for name, value in fields.items()}
    seen = {
        "growth": float(grown.logarithms[count // 4 :].mean()) if np.isfinite(grown.logarithms[-1]) else -np.inf,
        "alignment": float(np.sqrt(max(0.0, 1 - grown.apart[-1] ** 2))),
        "why": found.why,
    }
    attrs = {"experiment": recipe.name, "seed": chosen, "steps": count, "level": level}
    return xr.Dataset(fields | rates | seen, attrs=attrs)


def _grown(recipe: Recipe, seed: int, steps: int) -> Growth:
    """Return how random differences grow along the forward iterates of a seed."""
    here, batches = recipe.start(seed), recipe.batches(seed)

    def push(n: int, differences: Sequence[Tensors]) -> list[Tensors]:
        nonlocal here
        here, moved = recipe.pushed(here, differences, batches[n], n)
        return moved

    two = directions(here.params, 2, generator(seed, "analysis"))
    return follow(push, two, steps, f"experiment {recipe.name!r}, seed {seed}")


def _of_one_hessian(experiment: Experiment) -> float | None:
    """Return the exponent of maps that all have the derivative I − hH, where differences need not turn."""
    if not isinstance(experiment.problem, Quadratic) or not is_plain(experiment.operator):
        return None
    largest = float(np.abs(1 - experiment.operator.lr * np.array(experiment.problem.spectrum)).max())
    return float(np.log(largest)) if largest else -np.inf


def lemma_factor(lr: float, m: float, M: float) -> float:
    """Return √(1 − 2hm + h²M²), by which a step contracts where the loss is m-convex with M-Lipschitz gradient.

    >>> lemma_factor(0.1, 1.0, 1.0)
    0.9
    """
    return float(np.sqrt(max(0.0, 1 - 2 * lr * m + lr**2 * M**2)))


def known_factors(experiment: Experiment) -> dict[str, float]:
    """Return the factors below 1 by which every batch map contracts: ``uniform_factor``, ``lemma_factor``, or nothing.

    Known for plain SGD on the quadratic and on least squares. The first is the largest ‖I − hH‖ of a single example,
    the second is that of Lemma 2.5, which is no smaller.
    """
    operator, curvatures = experiment.operator, _curvatures(experiment.problem)
    if curvatures is None or not is_plain(operator):
        return {}
    factors = {
        "uniform_factor": float(np.abs(1 - operator.lr * curvatures).max()),
        "lemma_factor": lemma_factor(operator.lr, float(curvatures.min()), float(curvatures.max())),
    }
    return {name: factor for name, factor in factors.items() if factor < 1}


def _curvatures(problem: Problem) -> NDArray[np.float64] | None:
    """Return the eigenvalues of the Hessians of all single examples, where they are known."""
    if isinstance(problem, Quadratic):
        return np.array(problem.spectrum)
    if isinstance(problem, LeastSquares):
        rows = (problem.data[0] ** 2).sum(1)
        return np.asarray(problem.ridge + np.append(rows, 0.0 if problem.d > 1 else rows))
    return None


def limit_bound(source: Source, seed: int, steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return C kⁿ with C = D / (1 − k), D the longest first step from θ₀ under the batches of the seed.

    It is above the distance of the n-th backward iterate to every later one that is recorded, and to the limit of all
    where no later batch makes a longer first step.
    """
    recipe = Recipe.of(source)
    k = known_factors(recipe.experiment).get("uniform_factor")
    if k is None:
        raise StatisticError(
            f"experiment {recipe.name!r}: no k < 1 is known by which every batch map contracts, so "
            "Theorem 2.2 gives no bound"
        )
    start, batches = recipe.start(seed), recipe.batches(seed)
    longest = max(distance(start, recipe.apply(start, batches[i], i)) for i in range(1, recipe.schema.steps + 1))
    return np.asarray(longest / (1 - k) * k ** np.asarray(steps, dtype=np.float64))


def _refuse_more_than_parameters(recipe: Recipe) -> None:
    """Refuse operators that change more than the parameters: distances of these alone would not be those of states."""
    seed = recipe.schema.seeds[0]
    state = recipe.start(seed)
    after = recipe.apply(state, recipe.batches(seed)[1], 1)
    changed = [name for name, buffer in state.buffers.items() if not torch.equal(buffer, after.buffers[name])]
    if state.memory or changed:
        what = f"an optimizer's memory ({', '.join(state.memory)})" if state.memory else f"buffers ({changed[0]}, …)"
        raise StatisticError(
            f"experiment {recipe.name!r}: a step changes {what} besides the parameters, and what it does to "
            "distances of parameters alone is no contraction factor"
        )


def _loss(recipe: Recipe, state: State) -> float:
    if "train_loss" not in recipe.live.examples:
        return np.nan
    with torch.no_grad():
        return float(recipe.train_loss(state.params, state.buffers))


def _ratio(after: float, before: float) -> float:
    return after / before if before > 0 else np.nan


def tables(stored: StoredExperiment, order: str | None = None, pairs: int = 100) -> list[Table]:
    """Return what `trajstore analyze` shows."""
    names = stored.schema.orders
    order = order or ("forward" if "forward" in names else names[0])
    found = contraction(stored, order, pairs)
    factors = {"parameters": found["factor"].values, "sum:train_loss": found["loss_factor"].values}
    factors = {space: values for space, values in factors.items() if np.isfinite(values).any()}
    numbers = {
        "pairs": [int(np.isfinite(f).sum()) for f in factors.values()],
        "share_below_1": [float((f < 1).sum() / np.isfinite(f).sum()) for f in factors.values()],
        "median": [float(np.nanmedian(f)) for f in factors.values()],
        "largest": [float(np.nanmax(f)) for f in factors.values()],
    }
    summary = xr.Dataset(
        {name: ("space", column) for name, column in numbers.items()}, {"space": list(factors)}, found.attrs
    )
    known, lemma = (found.attrs.get(name) for name in ("uniform_factor", "lemma_factor"))
    proven = f"; every map contracts by {known:.4g}" if known else ""
    proven += f", by Lemma 2.5 by {lemma:.4g}" if lemma else ""
    title = f"factors of {pairs} pairs of {order} iterates under one batch{proven}"
    return [Table(title, summary, tuple(numbers)), _exponents(stored)]


def _exponents(stored: StoredExperiment) -> Table:
    title, seeds = "Lyapunov exponent of the products, along forward iterates", list(stored.schema.seeds)
    try:
        each = [lyapunov(stored, seed) for seed in seeds]
    except StatisticError as error:  # the factors have been found all the same
        return Table(f"{title}: {error}", xr.Dataset(), ())
    exponents = xr.concat(each, "seed", combine_attrs="drop_conflicts").assign_coords(seed=seeds)
    pairs = {"exponent": ("exponent_low", "exponent_high"), "rate": ("rate_low", "rate_high")}
    shown = ("exponent", "rate", "growth")
    if any(exponents["why"].values.tolist()):
        return Table(f"{title}; growth is that of a random difference", exponents, (*shown, "why"), pairs)
    return Table(title, exponents, shown, pairs)
