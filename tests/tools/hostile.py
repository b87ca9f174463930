"""Stores as a stranger might send them: recorded here, and then their documents written anew."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.pcodec import PCodec  # type: ignore[import-untyped]

from trajstore.storage.format.digest import config_digest
from trajstore.storage.format.schema import Schema
from trajstore.storage.writing.declaring import ATTRIBUTE

__all__ = ["Document", "attributes_of", "config_of", "put", "rewrite", "state_chunk", "strangers", "with_checksum"]

Document = dict[str, Any]


def attributes_of(store: Path, name: str) -> Document:
    """Return what is stored beside the arrays of an experiment."""
    found: Document = json.loads((store / name / "zarr.json").read_text())["attributes"][ATTRIBUTE]
    return found


def put(document: Any, path: Sequence[Any], value: object) -> None:
    """Put something at a place of a document, given as a path of keys."""
    *above, last = path
    for part in above:
        document = document[part]
    document[last] = value


def rewrite(store: Path, name: str, change: Callable[[Document], object]) -> None:
    """Change an experiment's attributes in place, with digests that say that they are sound."""
    file = store / name / "zarr.json"
    document = json.loads(file.read_text())
    attributes = document["attributes"][ATTRIBUTE]
    change(attributes)
    if "config" in attributes:
        attributes["config_digest"] = config_digest(attributes["config"])
    rest = {key: value for key, value in attributes.items() if key != "digest"}
    document["attributes"][ATTRIBUTE] = rest | {"digest": config_digest(rest)}
    file.write_text(json.dumps(document))


def strangers(store: Path, name: str) -> None:
    """Have an experiment be one that this user never recorded."""

    def others(attributes: Document) -> None:
        for fill in attributes["fills"]:
            fill["id"] = f"stranger-{fill['id']}"

    rewrite(store, name, others)


def with_checksum(content: bytes) -> bytes:
    """Return a chunk that says that it is sound."""
    return content + int(google_crc32c.value(content)).to_bytes(4, "little")


def state_chunk(numbers: int, dtype: str = "float32") -> bytes:
    """Return a chunk of states that decodes to so many numbers, whatever its array declares."""
    return with_checksum(bytes(PCodec(level=7).encode(np.zeros(numbers, dtype))))


def config_of(schema: Schema) -> Document:
    """Return the least that a configuration says."""
    sizes = {"steps": schema.steps, "orders": list(schema.orders), "seeds": list(schema.seeds)}
    return {"name": "e", "problem": {}, "operator": {}, "record": {}, **sizes}
