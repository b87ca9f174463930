"""Whether what is there may be gone on with: the data are those that it was recorded with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trajstore.errors import ConflictError
from trajstore.problems import KnowsItsData, LiveProblem

__all__ = ["digest_of", "refuse_other_data"]


def digest_of(live: LiveProblem) -> dict[str, str]:
    """Return what a fill says of the data it was computed with, where these are files."""
    digest = live.data if isinstance(live, KnowsItsData) else None
    return {"data": digest} if digest else {}


def refuse_other_data(name: str, attributes: Mapping[str, Any], live: LiveProblem) -> None:
    """Refuse to go on with data that are not those of what was recorded before."""
    here = digest_of(live).get("data")
    before = {fill["data"] for fill in attributes["fills"] if "data" in fill}
    if here is not None and before - {here}:
        raise ConflictError(
            f"experiment {name!r}: its data have changed since it was recorded, from digest {min(before)[:12]}… to "
            f"{here[:12]}…; put the same files in their place"
        )
