"""Which experiment was opened: another one of the same name is not the same.

An open experiment and its datasets read by name, and what is removed may be recorded anew. So whatever reads remembers
what it opened, and after each read looks whether that is still what is there: in a folder at the status of the
experiment's document, in a bucket at its version, there at most once a second; and at the document itself only if it
has changed. An experiment that grows, or is being recorded, stays the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from trajstore.errors import OutdatedError
from trajstore.storage.format.digest import config_digest

__all__ = ["DOCUMENT", "Identity", "Versioned", "opened", "refuse_another", "unchanging", "version_of"]

DOCUMENT = "zarr.json"
"""What Zarr calls the document of a group or an array."""
_GROWING = ("name", "orders", "seeds", "steps", "stops", "declared_steps", "variant_of")
"""What of a configuration may change while the experiment stays what it is."""
_SURE = 1.0
"""Seconds for which an answer of an object store is taken to hold: there each look is a request."""


class Versioned(Protocol):
    """What is asked of the place where a store lies."""

    @property
    def address(self) -> str:
        """How another process finds it."""

    @property
    def asks(self) -> bool:
        """Whether looking at something is a request to another machine."""

    def version(self, key: str) -> object | None:
        """Return what changes with what is there, None where nothing is."""

    def read(self, key: str) -> bytes | None:
        """Return what is there, None where nothing is."""


def unchanging(attributes: Mapping[str, Any]) -> str:
    """Return a digest of what stays as it is while an experiment grows."""
    config = {key: value for key, value in attributes["config"].items() if key not in _GROWING}
    given = {"id": attributes["id"]} if "id" in attributes else {}
    return config_digest({"config": config, "layout": attributes["schema"]["layout"], **given})


@dataclass(frozen=True)
class Identity:
    """What tells an experiment from others of its name."""

    given: str | None
    """The id that it was declared with; None where that was before there were any."""
    fills: frozenset[str] = frozenset()
    """Without one: the ids of its recordings so far."""
    digest: str = ""
    """Without one: of what stays as it is."""

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> Identity:
        """Return it, by what is stored beside the arrays."""
        if isinstance(given := attributes.get("id"), str):
            return cls(given)
        fills = frozenset(str(fill["id"]) for fill in attributes.get("fills", ()))
        return cls(None, fills, unchanging(attributes))

    def is_of(self, other: Identity) -> bool:
        """Tell whether both are of one experiment, at two moments."""
        if self.given is not None or other.given is not None:
            return self.given == other.given
        if self.fills and other.fills:
            return bool(self.fills & other.fills)
        return self.digest == other.digest


_confirmed: dict[tuple[str, str, Identity], tuple[object | None, float]] = {}
"""Store, experiment, and which one → the version of its document that says so, if known, and when this was seen."""


def version_of(place: Versioned, name: str) -> object | None:
    """Return the version of an experiment's document, if that costs no request. Call before reading it."""
    return None if place.asks else place.version(f"{name}/{DOCUMENT}")


def opened(place: Versioned, name: str, attributes: Mapping[str, Any], version: object | None) -> Identity:
    """Return which experiment was opened, by what is stored beside its arrays, at a version of its document."""
    one = Identity.of(attributes)
    _confirmed[place.address, name, one] = version, time.monotonic()
    return one


def refuse_another(place: Versioned, name: str, one: Identity) -> None:
    """Raise where an experiment is not any more the one that was opened. Call after reading something of it."""
    key, document = (place.address, name, one), f"{name}/{DOCUMENT}"
    known, seen = _confirmed.get(key, (None, None))
    now = time.monotonic()
    if place.asks and seen is not None and now - seen < _SURE:
        return
    version = place.version(document)
    if version is None:
        raise OutdatedError(
            f"experiment {name!r} is not in {place.address} any more, where it was opened: it was removed or moved; "
            "open it where it is now"
        )
    if version != known and not _is_still(place.read(document), one):
        raise OutdatedError(
            f"experiment {name!r} in {place.address} is another one than was opened: it was removed, and recorded or "
            f"copied there anew; open it again, with trajstore.open({place.address!r})[{name!r}]"
        )
    _confirmed[key] = version, now


def _is_still(document: bytes | None, one: Identity) -> bool:
    try:
        return one.is_of(Identity.of(json.loads(document or b"")["attributes"]["trajstore"]))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False  # it is being declared, or damaged
