"""Variants of an experiment against one of them: by how much a metric differs, seed by seed and over the seeds.

Variants differ in their operators and batch sizes. Steps are those of the base: a variant with a batch of half the
size does two while the base does one, so that at the same step all have seen as many examples.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr
from trajstore.analysis.seeds import over_seeds
from trajstore.analysis.windows import own_metrics, window_of

from trajstore.errors import ConfigurationError, NotFoundError, StatisticError, choices
from trajstore.reading.drawing import drawing_of
from trajstore.reading.origin import attributes_of

__all__ = ["compare"]

_ORDER = "forward"
_LAST = 4
"""The mean is taken over the last quarter."""


def compare(
    variants: Mapping[str, xr.Dataset],
    metric: str | None = None,
    base: str | None = None,
    level: float = 0.95,
    batch_sizes: Mapping[str, int] | None = None,
) -> xr.Dataset:
    """Return metric − metric of the base, which is the first variant by default, along forward iterates.

    `variants` are datasets by name, `metric` is by default the first of the base's own, and `level` that of the
    interval over seeds.

    ``curve`` and ``difference`` are (variant, seed, step). ``last`` is the mean difference over the last quarter of the
    steps, (variant, seed); ``mean`` that over seeds, with an interval, of Student's t, for another seed's: NaN where
    there are fewer than three seeds. ``turned`` is the last step before that quarter at which the difference, as a mean
    over seeds, had the other sign; NaN where it never had.

    `batch_sizes` tells how many examples a batch holds, by variant, where that is not stored: of a training loop.
    """
    names = list(variants)
    base = base or names[0]
    if base not in names:
        raise NotFoundError(f"no variant {base!r}; {choices(base, names)}")
    metric = metric or own_metrics(variants[base])[0]
    shares = _shares(variants, base, batch_sizes or {})
    curves = {name: _curve(name, ds, metric, shares[name]) for name, ds in variants.items()}
    shared = curves[base]
    for name, curve in curves.items():
        for dim in ("step", "seed"):
            if not np.array_equal(curve[dim], shared[dim]):
                raise StatisticError(f"{metric}: the {dim}s of variants {base!r} and {name!r} are not the same")
    together = xr.concat(curves.values(), "variant").assign_coords(variant=names)
    difference = together - together.sel(variant=base)
    begin = len(shared["step"]) - max(1, len(shared["step"]) // _LAST)
    last = difference.isel(step=slice(begin, None)).mean("step", skipna=False)  # what diverges in it has no mean
    mean, low, high = over_seeds(last.values, level)
    earlier = difference.isel(step=slice(0, begin)).mean("seed").transpose("variant", "step")
    other = np.sign(earlier) * np.sign(mean[:, None]) < 0
    turned = earlier["step"].where(other).max("step").values
    numbers = {"mean": mean, "low": low, "high": high, "turned": turned}
    return xr.Dataset(
        {
            "curve": together,
            "difference": difference,
            "last": last,
            **{label: ("variant", value) for label, value in numbers.items()},
        },
        attrs={
            "metric": metric,
            "base": base,
            "level": level,
            "from_step": float(shared["step"][begin]),
            "to_step": float(shared["step"][-1]),
        },
    )


def _curve(name: str, ds: xr.Dataset, metric: str, share: float) -> xr.DataArray:
    """Return a metric over the steps of the base, rounded: a share of a third is no binary fraction."""
    seen = window_of(ds, metric, "all", called=f"variant {name!r}: {metric}")
    orders = [str(order) for order in seen.coords["order"]]
    if _ORDER not in orders:
        raise StatisticError(f"variant {name!r} has no order {_ORDER!r}; {choices(_ORDER, orders)}")
    values = seen.values[orders.index(_ORDER)]
    return xr.DataArray(
        values, {"seed": seen.coords["seed"], "step": np.round(seen.steps * share, 6)}, ("seed", "step"), "curve"
    )


def _shares(variants: Mapping[str, xr.Dataset], base: str, given: Mapping[str, int]) -> dict[str, float]:
    """Return how many steps of the base a step of each variant is worth: as many as it sees examples."""
    if unknown := [name for name in given if name not in variants]:
        raise NotFoundError(f"batch_sizes: no variant {unknown[0]!r}; {choices(unknown[0], variants)}")
    sizes = {}
    for name, ds in variants.items():
        stored = drawing_of(attributes_of(ds)).batch_size
        size = given.get(name) if stored is None else stored
        if size is None:
            raise StatisticError(
                f"variant {name!r}: how many examples a batch holds is not stored, so its steps cannot be set against "
                f"those of others; say so with compare(…, batch_sizes={{{name!r}: …}})"
            )
        if given.get(name, size) != size or (stored is None and size < 1):
            raise ConfigurationError(
                f"batch_sizes: {given[name]} for variant {name!r}"
                + (f", whose batches hold {stored}" if stored is not None else "; it must be at least 1")
            )
        sizes[name] = size
    for name, size in sizes.items():
        if (size == 0) != (sizes[base] == 0):
            noise, other = (name, base) if size == 0 else (base, name)
            raise StatisticError(
                f"the batches of variant {noise!r} are noise and hold no examples, those of {other!r} do: their steps "
                "cannot be set against each other"
            )
    return {name: size / sizes[base] if size else 1.0 for name, size in sizes.items()}
