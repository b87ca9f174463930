"""Export: what is committed, as files that other programs read.

One state as safetensors, the metrics as one Parquet file; `export_arrays` writes whole slabs as NumPy arrays.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trajstore._common.atomic import whole_file
from trajstore.errors import ConfigurationError, NotFoundError, WriteError, choices, damage_told, slab_named
from trajstore.store import StoredExperiment

__all__ = ["Slab", "check_outside", "export_metrics", "export_state", "origin", "slabs_of"]


def export_state(
    experiment: StoredExperiment, file: Path, *, order: str, seed: int, step: int, force: bool = False
) -> None:
    """Write one stored state as safetensors, for `module.load_state_dict`, strict."""
    from safetensors.torch import save

    check_outside(experiment, file)
    with whole_file(file, force=force) as partial:
        with damage_told(f"{slab_named(experiment.name, order, seed)}, step {step}"):
            tensors = experiment.state_dict(order=order, seed=seed, step=step)
        for name in experiment.schema.layout.tied:
            tensors[name] = tensors[name].clone()  # safetensors refuses tensors that share their memory
        # "pt" is what other readers of safetensors look for.
        told = {"format": "pt", **origin(experiment), "order": order, "seed": str(seed), "step": str(step)}
        partial.write_bytes(_with_metadata(save(tensors), told))


def export_metrics(
    experiment: StoredExperiment,
    file: Path,
    *,
    orders: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    force: bool = False,
) -> None:
    """Write what is committed of the metrics as one Parquet file: not measured is NULL, diverged is NaN."""
    import duckdb

    from trajstore.reading.sql import literal, write_slab

    check_outside(experiment, file)
    with (
        whole_file(file, force=force) as partial,
        TemporaryDirectory(prefix=".", suffix=".partial", dir=file.parent) as folder,
    ):
        parts = []
        try:
            for number, slab in enumerate(slabs_of(experiment, orders, seeds)):
                part = Path(folder, f"{number}.parquet")
                with damage_told(slab.where):
                    write_slab(part, experiment, slab.order, slab.seed, *slab.corner, slab.recorded)
                parts.append(str(part))
            told = ", ".join(f"{key}: {literal(value)}" for key, value in origin(experiment).items())
            with duckdb.connect() as connection:
                connection.read_parquet(parts).create_view("slabs")
                connection.execute(f"COPY slabs TO {literal(str(partial))} (FORMAT parquet, KV_METADATA {{{told}}})")
        except duckdb.Error as error:
            text = " ".join(str(error).split())
            raise WriteError(f"{file} could not be written ({text}); nothing of it was kept") from None


@dataclass(frozen=True)
class Slab:
    """What is committed of one (order, seed)."""

    experiment: str
    order: str
    seed: int
    corner: tuple[int, int]
    """Positions of the order and the seed."""
    recorded: NDArray[np.bool_]
    """(step)."""
    stored: NDArray[np.bool_]
    """(snapshot)."""
    complete: bool

    @property
    def where(self) -> str:
        """What an error calls it."""
        return slab_named(self.experiment, self.order, self.seed)


def slabs_of(
    experiment: StoredExperiment, orders: Sequence[str] | None = None, seeds: Sequence[int] | None = None
) -> list[Slab]:
    """Return the slabs of some orders and seeds, or all, of which something is committed."""
    schema, name = experiment.schema, experiment.name
    rows = _positions(name, "order", schema.orders, orders)
    columns = _positions(name, "seed", schema.seeds, seeds)
    commits = experiment.commits()
    steps, snapshots, complete = commits.steps, commits.snapshots, experiment.complete(commits)
    found = [
        Slab(name, schema.orders[i], schema.seeds[k], (i, k), steps[i, k], snapshots[i, k], bool(complete[i, k]))
        for i in rows
        for k in columns
        if steps[i, k].any()
    ]
    if not found:
        wanted = {"order": orders, "seed": seeds}
        of = "".join(f", {what} {', '.join(map(repr, labels))}" for what, labels in wanted.items() if labels)
        raise NotFoundError(f"experiment {name!r}{of}: nothing is recorded yet; {experiment.go_on}")
    return found


def origin(experiment: StoredExperiment) -> dict[str, str]:
    """Return what tells a reader of a file where it comes from."""
    stored = experiment.attributes
    return {
        "trajstore_format": str(stored["format"]),
        "experiment": experiment.name,
        "config_digest": stored["config_digest"],
    }


def check_outside(experiment: StoredExperiment, output: Path) -> None:
    """Refuse to write into the store."""
    place = experiment.store.place
    if place.beside is None:
        return
    root = Path(place.address)
    own = [folder.stat() for folder in (root, root / experiment.name, place.beside) if folder.is_dir()]
    # Whatever it is called: links and mounts give a folder other paths.
    above = [folder for folder in output.resolve().parents if folder.exists()]
    if any(os.path.samestat(folder.stat(), one) for folder in (*above, output) if folder.exists() for one in own):
        raise ConfigurationError(f"{output} lies in the store; choose a place outside it")


def _positions(experiment: str, what: str, known: Sequence[Any], wanted: Sequence[Any] | None) -> list[int]:
    for label in wanted or ():
        if label not in known:
            hint = choices(str(label), map(str, known))
            raise NotFoundError(f"experiment {experiment!r} has no {what} {label!r}; {hint}")
    return [k for k, label in enumerate(known) if wanted is None or label in wanted]


def _with_metadata(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """Add metadata in this order: safetensors would choose another each time, and the same state other bytes."""
    length = int.from_bytes(content[:8], "little")
    tensors = json.loads(content[8 : 8 + length])
    header = json.dumps({"__metadata__": metadata, **tensors}, ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([len(header).to_bytes(8, "little"), header, memoryview(content)[8 + length :]])
