"""Fills: the notes of who recorded which slabs, where and with what, as they are stored.

The first of them lie in the experiment's document. Where there are many, as of loops that are recorded one by one, each
note would replace a document that grows and grows. So they move out of it, into blocks of their own, of which a note
replaces one and nothing else; the document then says another format, so that who knows the old place only is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import zarr
from zarr.buffer.cpu import Buffer

from trajstore.errors import DamageError, TrajstoreError
from trajstore.storage.format.checking import checked_fills
from trajstore.storage.format.digest import config_digest
from trajstore.storage.format.schema import APART, FORMAT
from trajstore.storage.places.place import DOCUMENT, keeper_of
from trajstore.storage.writing.declaring import ATTRIBUTE, set_attributes, sound_attributes

__all__ = [
    "FOLDER",
    "Fill",
    "add_fills",
    "block_numbers",
    "block_of",
    "put_block",
    "read_block",
    "renew_fills",
    "replace_fill",
    "stored_fills",
]

FOLDER = "noted-fills"
"""The group of the blocks; no metric can have such a name."""
_MOST = 32
"""Fills in a document or a block."""
_GROUP = {"zarr_format": 3, "node_type": "group"}

Fill = dict[str, Any]


def stored_fills(group: zarr.Group) -> list[Fill]:
    """Return the fills of an experiment, in the order in which they began to be noted, wherever they lie."""
    attributes: Any = group.attrs[ATTRIBUTE]
    if attributes["format"] == FORMAT:
        return list(attributes["fills"])
    return [fill for number in block_numbers(group) for fill in read_block(group, number)]


def add_fills(group: zarr.Group, fills: Sequence[Fill]) -> list[Fill]:
    """Note fills that are new; return those that now lie with the last of them. Hold the declaration's lock."""
    attributes: Any = group.attrs[ATTRIBUTE]
    if attributes["format"] == FORMAT:
        together = [*attributes["fills"], *fills]
        if len(together) <= _MOST:
            set_attributes(group, attributes | {"fills": together})
            return together
        keeper_of(group).remove(f"{group.path}/{FOLDER}")  # what a move that died left
        _put(group, f"{group.path}/{FOLDER}/{DOCUMENT}", {})
        last = _put_blocks(group, 0, together)
        # Until here the document has them all, from here on the blocks do.
        set_attributes(group, {key: value for key, value in attributes.items() if key != "fills"} | {"format": APART})
        return last
    last_block = block_numbers(group)[-1]
    before = read_block(group, last_block)
    if len(before) >= _MOST:
        return _put_blocks(group, last_block + 1, fills)
    return _put_blocks(group, last_block, [*before, *fills])


def replace_fill(group: zarr.Group, fill: Fill) -> list[Fill]:
    """Note a fill anew, in the place of what was noted of it before. Hold the declaration's lock.

    Returns those that lie with it.
    """
    attributes: Any = group.attrs[ATTRIBUTE]
    if attributes["format"] == FORMAT:
        together = [*(other for other in attributes["fills"] if other["id"] != fill["id"]), fill]
        set_attributes(group, attributes | {"fills": together})
        return together
    for number in reversed(block_numbers(group)):  # it began a while ago at most
        before = read_block(group, number)
        if any(other["id"] == fill["id"] for other in before):
            together = [fill if other["id"] == fill["id"] else other for other in before]
            put_block(group, number, together)
            return together
    return add_fills(group, [fill])  # a repair took it out in the meantime


def renew_fills(group: zarr.Group, fills: Sequence[Fill]) -> None:
    """Note fills anew, each where it is. Hold the declaration's lock."""
    newer = {fill["id"]: fill for fill in fills}
    attributes: Any = group.attrs[ATTRIBUTE]
    if attributes["format"] == FORMAT:
        if newer:
            renewed = [newer.get(fill["id"], fill) for fill in attributes["fills"]]
            set_attributes(group, attributes | {"fills": renewed})
        return
    for number in block_numbers(group) if newer else ():
        before = read_block(group, number)
        if any(fill["id"] in newer for fill in before):
            put_block(group, number, [newer.get(fill["id"], fill) for fill in before])


def block_numbers(group: zarr.Group) -> range:
    """Return the numbers of the blocks, of which there is at least one.

    One of them that is not there, or no file, is damage to whoever reads it.
    """
    place, prefix = keeper_of(group).place, f"{group.path}/{FOLDER}/"
    folder = prefix.rstrip("/")
    found = [key.removeprefix(prefix) for key in (*(key for key, _ in place.files(folder)), *place.links(folder))]
    numbers = [int(match[1]) for key in found if (match := re.fullmatch(r"([0-9]{1,9})(/zarr\.json)?", key))]
    last = max(numbers, default=0)
    if not place.asks and place.version(block_of(group, last + 1)) is not None:
        last += 1  # a folder, where there is no file and no link
    return range(last + 1)


def block_of(group: zarr.Group, number: int) -> str:
    """Return the key of a block."""
    return f"{group.path}/{FOLDER}/{number}/{DOCUMENT}"


def read_block(group: zarr.Group, number: int) -> list[Fill]:
    """Return the fills of a block; raise a DamageError where it is not what was written."""
    key = block_of(group, number)
    try:
        content = keeper_of(group).place.read(key)
        if content is None:
            raise ValueError("it is missing")
        block = json.loads(content)["attributes"][ATTRIBUTE]
        if not sound_attributes(block):
            raise ValueError("it is not what its digest says")
        return checked_fills(block["fills"])
    except TrajstoreError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise DamageError(
            f"experiment {group.basename!r}: {key}, which says who recorded some of its slabs, is damaged "
            f"({' '.join(str(error).split())}); restore it from a copy, or have `trajstore verify --repair` take it out"
        ) from None


def put_block(group: zarr.Group, number: int, fills: Sequence[Fill]) -> None:
    """Replace a block. Hold the declaration's lock."""
    rest = {"fills": list(fills)}
    _put(group, block_of(group, number), {ATTRIBUTE: rest | {"digest": config_digest(rest)}})
    keeper_of(group).flush()


def _put_blocks(group: zarr.Group, begin: int, fills: Sequence[Fill]) -> list[Fill]:
    """Put fills into a block and those after it; return what lies in the last."""
    last: list[Fill] = []
    for number, first in enumerate(range(0, len(fills), _MOST), begin):
        last = list(fills[first : first + _MOST])
        put_block(group, number, last)
    return last


def _put(group: zarr.Group, key: str, attributes: Mapping[str, Any]) -> None:
    document = _GROUP | {"attributes": dict(attributes)}
    keeper_of(group).set_sync(key, Buffer.from_bytes(json.dumps(document).encode()))
