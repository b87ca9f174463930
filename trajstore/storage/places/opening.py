"""The place at a path or URL."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from trajstore.errors import ConfigurationError, choices
from trajstore.storage.places.folder import Folder
from trajstore.storage.places.place import Place

__all__ = ["place_of"]

_BUCKETS = ("s3", "gs", "memory")


def place_of(address: str | Path | Place) -> Place:
    """Return the place at a path or URL."""
    if not isinstance(address, str | Path):
        return address
    if isinstance(address, Path):
        if f"{address.parts[0] if address.parts else ''}/" in (f"{scheme}:/" for scheme in (*_BUCKETS, "file")):
            raise ConfigurationError(f"{address}: give a URL as text, not as a Path, which makes one slash of two")
        return Folder(address)
    scheme, colon, rest = address.partition("://")
    if not colon:
        return Folder(Path(address))
    if scheme == "file":
        host, _, path = rest.partition("/")
        if host not in ("", "localhost"):
            raise ConfigurationError(f"{address}: write file:///path/on/this/machine")
        return Folder(Path(unquote(f"/{path}")))
    if scheme not in _BUCKETS:
        known = choices(scheme, (*_BUCKETS, "file"))
        raise ConfigurationError(f"{address}: stores lie in folders or at s3://, gs://, memory:// or file://; {known}")
    if not rest.strip("/") or (scheme != "memory" and "/" not in rest.strip("/")):
        raise ConfigurationError(f"{address}: name the store in the bucket, as in {scheme}://bucket/runs.zarr")
    if any(part in ("", ".", "..") for part in rest.rstrip("/").split("/")) or {*"?#"} & {*rest}:
        raise ConfigurationError(f"{address}: a store's URL has no '?', '#', '.', '..' and no empty parts")
    from trajstore.storage.places.bucket import bucket_at  # what sends requests, which folders do without

    return bucket_at(address.rstrip("/"))
