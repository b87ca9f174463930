"""Import: checkpoints that are there already become an experiment.

What can be known without reading numbers is looked at first, of all files: their names, whether they can be read
without running anything, and whether they hold the same tensors. Only then something is written. Steps that are stored
already must be what the files hold; so an import that was stopped goes on when it is called again, or only ends what it
had not noted, and one that is called with more files adds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from trajstore.errors import ConfigurationError
from trajstore.exchange.importing.pattern import Pattern, told_apart
from trajstore.exchange.importing.request import COMPONENTS, Import, looked_through, schema_of, stored_as
from trajstore.exchange.importing.stored import Progress, ledgers_of, missing_steps, refuse_other_numbers, refuse_untied
from trajstore.exchange.importing.write import fill, not_noted
from trajstore.experiment.experiment import check_name
from trajstore.reading.handles import check_place, open_root, refuse_foreign, refuse_new
from trajstore.storage.format.codecs import CODECS, Codec
from trajstore.storage.format.sketch import Sketch
from trajstore.storage.packing import open_to_write
from trajstore.storage.places.place import Durability
from trajstore.storage.writing.declaring import declare, grow
from trajstore.store import Store, StoredExperiment

__all__ = ["Import", "Precision", "carry_out", "import_checkpoints", "prepare"]

Precision = Literal["float32", "float16", "bfloat16"]
"""To what the numbers of a stored state may be rounded."""


def import_checkpoints(
    store: str | Path,
    name: str,
    files: str | Path | Sequence[str | Path],
    pattern: str,
    *,
    order: str | None = None,
    seed: int | None = None,
    key: str | None = None,
    snapshot_dtype: Precision | None = None,
    codec: Codec = "pcodec",
    durability: Durability = "segment",
    progress: Progress | None = None,
) -> StoredExperiment:
    """Make an experiment of checkpoints, or add them to one that was made so.

    `pattern` says what the ends of their paths mean, as in ``seed{seed}/step{step}.pt``: ``{seed}`` and ``{step}`` are
    numbers, ``{order}`` is a word, ``*`` stands for anything within a name. An `order` ("forward") or a `seed` is given
    where the pattern has none. `key` is where in a file the state dict is (``trainer.model``), `snapshot_dtype` to what
    precision states are stored; norms, distances and sketches are those of the numbers in the files.
    """
    prepared = prepare(
        store, name, files, pattern, order=order, seed=seed, key=key, snapshot_dtype=snapshot_dtype, codec=codec
    )
    return carry_out(prepared, durability=durability, progress=progress)


def prepare(
    store: str | Path,
    name: str,
    files: str | Path | Sequence[str | Path],
    pattern: str,
    *,
    order: str | None = None,
    seed: int | None = None,
    key: str | None = None,
    snapshot_dtype: Precision | None = None,
    codec: Codec = "pcodec",
) -> Import:
    """Look at all files and at the store, and refuse what does not fit. Nothing is written."""
    check_name(name)
    for what, value, known in (("snapshot_dtype", snapshot_dtype, get_args(Precision)), ("codec", codec, CODECS)):
        if value is not None and value not in known:
            raise ConfigurationError(f"{what} is {value!r}; choose one of {', '.join(known)}")
    given = [files] if isinstance(files, str | Path) else files
    sources = told_apart([Path(file) for file in given], Pattern(pattern), order, seed)
    layout, keys = looked_through([one for slab in sources.values() for one in slab.values()], key)
    table: dict[str, Any] = {
        "name": name,
        "problem": {"family": "import"},
        "operator": {"family": "unknown"},
        "init_seed": None,
        "stops": [],
        "record": {"dtype": snapshot_dtype, "sketch": COMPONENTS, "codec": codec},
    }
    place = Store(store)
    check_place(place)
    asked = Import(place, table, sources, {slab: list(those) for slab, those in sources.items()}, layout,
                   pattern, key, keys)  # fmt: skip
    refuse_foreign(place, name)
    stored = stored_as(asked)
    if stored is None:
        return asked
    schema_of(asked, stored)
    refuse_untied(asked, stored.schema.layout)
    ledgers = ledgers_of(asked, stored)
    missing = {
        slab: missing_steps(asked, ledgers[slab], slab) if slab in ledgers else list(those)
        for slab, those in sources.items()
    }
    return replace(asked, missing=missing)


def carry_out(
    asked: Import, *, durability: Durability = "segment", progress: Progress | None = None
) -> StoredExperiment:
    """Do an import: first compare what is stored already, then write what is not."""
    stored = stored_as(asked)
    for slab, ledger in {} if stored is None else ledgers_of(asked, stored).items():
        missing = set(asked.missing[slab])
        there = [step for step in asked.sources[slab] if step not in missing]
        refuse_other_numbers(asked, ledger, slab, there, progress)
    begun = [slab for slab in asked.sources if stored is not None and not_noted(asked, stored, slab) is not None]
    if not begun and not any(asked.missing.values()):
        return asked.store[asked.name]
    if stored is None:
        refuse_new(asked.store, asked.name)
    asked.store.place.make()
    with asked.store.declaring():
        root = open_root(asked.store.place, durability)
        refuse_foreign(asked.store, asked.name)
        stored = stored_as(asked)
        schema = schema_of(asked, stored)
        sizes = {"steps": schema.steps, "orders": list(schema.orders), "seeds": list(schema.seeds)}
        if stored is None:
            group = declare(root, asked.name, schema, {**asked.table, **sizes}, [])
        else:
            group = open_to_write(root.store, asked.name)
            if schema != stored.schema:
                grow(group, schema, {**asked.table, **sizes}, [])
    sketch = Sketch(schema.parameters, COMPONENTS, schema.sketch_seed)
    for slab in [slab for slab, steps in asked.missing.items() if steps or slab in begun]:
        fill(asked, StoredExperiment(asked.store, group), slab, sketch, progress)
    return asked.store[asked.name]
