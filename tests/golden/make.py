"""Make the golden store of the present format: `python -m tests.golden.make`. Earlier ones stay as they are.

`python -m tests.golden.make kinds` makes those of every kind of recording, which stay too: a user's problem (by name,
and as it is), one of images, a training loop with its optimizer, checkpoints that were imported, and a store out of a
bucket.

The first is small and has one of everything: shared legs, a reset, a switch, a metric that is not finite, Adam's
memory, an
experiment that was extended, a training loop with BatchNorm in bfloat16, tied weights, late metrics, both codecs, and
a loop that was gone on with so often that its fills lie apart from its document: the later of the formats.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

import trajstore as ts
from tests.golden import mine
from tests.tools.buckets import serving, settings
from trajstore.exchange.importing import import_checkpoints
from trajstore.storage.format.schema import APART

HERE = Path(__file__).parent
_OFTEN = 36
TINY = {
    "name": "engine",
    "problem": {"family": "regression", "width": 3, "depth": 1, "points": 5},
    "operator": {"family": "adam", "lr": 0.05},
    "orders": ["forward", "backward+backward@4"],
    "record": {"sketch": 4, "optimizer_state": True, "every": 2},
}


class Tied(nn.Module):
    """A module with a buffer, an integer counter and a weight that has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


def summary(store: ts.Store) -> dict[str, Any]:
    """Return what is in a store: a digest of each variable's bits, and some values to look at."""
    told: dict[str, Any] = {}
    for name in store:
        ds = _in_its_room(store[name])
        told[name] = {
            "sizes": {str(k): int(v) for k, v in ds.sizes.items()},
            "digests": {
                str(k): hashlib.sha256(np.ascontiguousarray(v.values.astype("<f8")).tobytes()).hexdigest()
                for k, v in sorted(ds.variables.items())
                if v.dtype.kind in "fib"
            },
            "labels": {"order": ds.order.values.tolist(), "seed": ds.seed.values.tolist()},
            "start": [float(v).hex() for v in ds.params.values[0, 0, :3, 0]],
            "slabs": [[s.order, s.seed, s.last_step, s.recorded, s.complete] for s in store[name].slabs()],
            "config_digest": store[name].attributes["config_digest"],
        }
    return told


def _in_its_room(stored: ts.StoredExperiment) -> xr.Dataset:
    """Return a dataset up to where there is room: a loop's ends at its last step, and the digests are of all of it."""
    ds = stored.dataset().load()
    labels = {dim: values for dim, values, _ in stored.schema.coordinates().values()}
    empty = {name: np.nan if v.dtype.kind == "f" else -1 for name, v in ds.variables.items()}
    empty |= {"measured": 0, "recorded": False, "stored": False}
    return ds.reindex({dim: labels[dim] for dim in ("step", "snapshot")}, fill_value=empty)


def make(place: Path) -> None:
    """Record the golden experiments."""
    how: dict[str, Any] = {"engine": "reference", "extend": True}
    ts.run(ts.Experiment.of({**TINY, "steps": 9, "seeds": [3]}), place, **how)
    ts.run(ts.Experiment.of({**TINY, "steps": 13, "seeds": [1, 3]}), place, **how)
    wild = {**TINY, "name": "diverging", "operator": {"family": "sgd", "lr": 1e3}, "steps": 9, "seeds": [0]}
    ts.run(ts.Experiment.of({**wild, "record": {"sketch": 4, "codec": "portable"}}), place, **how)
    torch.manual_seed(0)
    model = Tied().bfloat16()
    policy = ts.every(3) | ts.window(0, 2)
    with ts.record(place, "loop", model, seed=7, steps=12, snapshots=policy, sketch=4, codec="portable") as rec:
        for n in range(1, 11):
            model.norm(torch.randn(4, 3).bfloat16())
            with torch.no_grad():
                for p in model.parameters():
                    p += torch.randn_like(p) / 10
            rec.step(loss=1 / n)
            rec.log(n // 2, sharpness=float(n)) if n % 2 else None
    line = nn.Linear(1, 1)
    for last in range(1, _OFTEN):
        with ts.record(place, "often", line, seed=2, sketch=2, snapshots=ts.every(8), resume=last > 1) as rec:
            rec.step(loss=1 / last)


KINDS: dict[str, dict[str, Any]] = {
    "named": {"problem": {"family": "factory", "function": "tests.golden.mine:problem", "arguments": {"points": 7}}},
    "given": {"problem": mine.problem()},
    "images": {
        "problem": {
            "family": "mlp", "depth": 1, "width": 5, "batch_size": 2,
            "images": {"family": "shapes", "train": 12, "test": 10, "size": 8},
        },
    },
}  # fmt: skip


def experiment(kind: str, steps: int) -> ts.Experiment:
    """Return one of a user's problem, or of images."""
    operator = {"family": "sgd", "lr": 0.05, "momentum": 0.5, "schedule": {"family": "step", "every": 4, "gamma": 0.5}}
    return ts.Experiment.of({"name": kind, "operator": operator, "steps": steps, "seeds": [0, 2], **KINDS[kind]})


def loop(place: Path, upto: int, **how: Any) -> None:
    """Train with Adam up to a step, from where it was left."""
    torch.manual_seed(0)
    model = mine.module()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x = torch.linspace(-1, 1, 5)[:, None]
    with ts.record(place, "loop", model, seed=4, optimizer=optimizer, sketch=4, **how) as rec:
        for step in range(rec.last + 1, upto + 1):
            loss = nn.functional.mse_loss(model(x), x.abs())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rec.step(step, loss=loss)


def checkpoints(folder: Path, steps: Sequence[int]) -> list[Path]:
    """Write checkpoints of a module as PyTorch writes them."""
    for step in steps:
        torch.manual_seed(step)
        torch.save(mine.module().state_dict(), folder / f"step{step}.pt")
    return [folder / f"step{step}.pt" for step in steps]


def make_kinds(folder: Path) -> None:
    """Record one of each kind, and one in a bucket of which the objects become files."""
    place = folder / "kinds.zarr"
    for kind in KINDS:
        ts.run(experiment(kind, 6), place, engine="reference")
    loop(place, 6)
    import_checkpoints(place, "imported", checkpoints(folder, range(0, 8, 2)), "step{step}.pt", seed=1)
    with serving() as address:
        os.environ.update(settings(address))
        ts.run(experiment("named", 6), "s3://bucket/golden.zarr", engine="reference")
        objects = ts.Store("s3://bucket/golden.zarr").place
        for key, _ in objects.files(""):
            to = folder / "bucket.zarr" / key
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(objects.read(key))


def keep(store: Path, name: str) -> None:
    """Put a store that was made into an archive, and beside it what is in it."""
    shutil.make_archive(str(HERE / name), "zip", store.parent, store.name)
    (HERE / f"{name}.json").write_text(json.dumps(summary(ts.open(store)), indent=1) + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        if "kinds" in sys.argv:
            make_kinds(Path(folder))
            keep(Path(folder) / "kinds.zarr", "kinds")
            keep(Path(folder) / "bucket.zarr", "bucket")
        else:
            make(Path(folder) / "golden.zarr")
            keep(Path(folder) / "golden.zarr", f"v{APART}")
