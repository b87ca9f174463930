"""Leases: one writer a slab where no kernel keeps locks.

A lock is a small document in the object store, replaced only on condition that nobody else replaced it meanwhile. Each
holder raises its generation. A holder that died leaves it held: it is taken over if that process was of this machine
and is no more, and else once a person has said so (`trajstore unlock`). Whether it is really dead nobody can know, so
the next one gets a *fence*, and writes it into whatever makes data count: what wakes up later can write no more.
"""

from __future__ import annotations

import json
import os
import platform
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["Lease", "died", "free", "holder_of", "is_own", "taken"]


@dataclass(frozen=True)
class Lease:
    """A lock that is held."""

    key: str
    token: str
    """Tells this holder from all others."""
    fence: int
    process: int


def taken(key: str, document: bytes | None) -> tuple[Lease, bytes]:
    """Return the lease that follows on a lock's document, and the document that says so."""
    before = {"generation": 0, "fence": 0, "clean": True} if document is None else json.loads(document)
    generation, token = before["generation"] + 1, uuid.uuid4().hex
    fence = before["fence"] if before["clean"] else generation
    holder = {
        "process": os.getpid(), **_here(), "born": _born(os.getpid()), "token": token,
        "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
    }  # fmt: skip
    own = {"generation": generation, "fence": fence, "clean": False, "holder": holder}
    return Lease(key, token, fence, os.getpid()), json.dumps(own).encode()


def free(document: bytes, *, clean: bool) -> bytes:
    """Return the document of a lock that nobody holds; unless `clean`, its holder may still believe that it does."""
    return json.dumps({**json.loads(document), "clean": clean, "holder": None}).encode()


def holder_of(document: bytes) -> dict[str, Any] | None:
    """Return who holds a lock."""
    holder: dict[str, Any] | None = json.loads(document)["holder"]
    return holder


def is_own(holder: dict[str, Any]) -> bool:
    """Tell whether a holder is this process."""
    return all(holder[k] == v for k, v in _here().items()) and holder["process"] == os.getpid()


def died(holder: dict[str, Any]) -> bool:
    """Tell whether a holder was a process that could be seen from here, and is no more."""
    if holder["boot"] is None or any(holder[k] != v for k, v in _here().items()):
        return False  # another machine, or another container: nobody can know
    try:
        os.kill(holder["process"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    born = _born(holder["process"])
    return born is not None and born != holder["born"]


def _here() -> dict[str, str | None]:
    """Return what tells this run of this machine, and what is seen of its processes, from others."""
    return {"host": platform.node(), "boot": _boot(), "processes": _namespace()}


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _namespace() -> str | None:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None


def _born(process: int) -> str | None:
    """Return when a process began, in the system's own terms; its number may be given to another one later."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
