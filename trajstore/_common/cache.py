"""Where what can be lost is kept for a user."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["user_cache"]


def user_cache() -> Path:
    """Return trajstore's folder in the user's cache, for what can be lost; raise an OSError where there is none."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "trajstore"
    try:
        return Path.home() / ".cache" / "trajstore"
    except RuntimeError:  # a user without an entry in the system's list, as in a container
        raise FileNotFoundError("this user has no home folder; let XDG_CACHE_HOME name a folder to keep") from None
