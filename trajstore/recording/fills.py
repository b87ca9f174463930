"""Fills: who recorded which slabs, where, with what, and what it took; stored with the experiment."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import zarr

from trajstore.experiment.trust import remember
from trajstore.recording.provenance import now
from trajstore.storage.places.place import keeper_of
from trajstore.storage.writing.fills import add_fills, replace_fill
from trajstore.store import StoredExperiment

__all__ = ["noted"]


@contextmanager
def noted(
    stored: StoredExperiment, slabs: Sequence[tuple[str, int]], where: dict[str, Any], *, when_stopped: bool = False
) -> Iterator[dict[str, float]]:
    """Write down who records these slabs, given as order and seed, before and after; takes what it spent.

    Afterwards it is written down as `where` has come to be; with `when_stopped` also if it does not come to its end,
    and otherwise then only where something else is in it.
    """
    named, before = [[order, seed] for order, seed in slabs], dict(where)
    fill = {"id": uuid.uuid4().hex, "slabs": named, "began": now(), "ended": None}
    _note(stored, fill | where, begins=True)
    spent: dict[str, float] = {}
    try:
        yield spent
    except BaseException:
        if when_stopped or where != before:
            with suppress(Exception):  # the first error is the one that matters
                _note(stored, fill | where)
        raise
    _note(stored, fill | where | {"ended": now(), "seconds": {what: round(s, 3) for what, s in spent.items()}})


def _note(stored: StoredExperiment, fill: dict[str, Any], *, begins: bool = False) -> None:
    keeper_of(stored.group).check(stored.name)
    with stored.store.declaring():
        group = zarr.open_group(stored.group.store, path=stored.name, mode="r+", zarr_format=3)
        beside = add_fills(group, [fill]) if begins else replace_fill(group, fill)
    others = (other["id"] for other in beside if other["id"] != fill["id"])
    remember(stored.config["problem"], [fill["id"], *others])
