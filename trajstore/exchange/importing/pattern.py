"""File names: which seed and step a checkpoint is of, told by a pattern such as ``seed{seed}/step{step}.pt``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from trajstore.errors import ConfigurationError, OrderError
from trajstore.storage.format.checking import is_new_label

__all__ = ["Pattern", "Slab", "Source", "told_apart"]

Slab = tuple[str, int]
"""Order and seed."""

_MOST_STEPS = 100_000_000


class Source(NamedTuple):
    """A file, and what it is called wherever it lies: the part of its path that the pattern is about."""

    file: Path
    name: str


def told_apart(
    files: Sequence[Path], pattern: Pattern, order: str | None, seed: int | None
) -> dict[Slab, dict[int, Source]]:
    """Tell from the names of files what they are, slab by slab and by increasing step."""
    for field, given in (("order", order), ("seed", seed)):
        if given is not None and field in pattern.fields:
            raise ConfigurationError(f"the pattern has {{{field}}}, so leave --{field} out")
    if seed is None and "seed" not in pattern.fields:
        raise ConfigurationError(
            f"pattern {pattern.text!r} has no {{seed}}; add it, or give the seed itself (--seed 0)"
        )
    if seed is not None and not 0 <= seed < 2**63:
        raise ConfigurationError(f"seed {seed} must be a whole number from 0 to 2^63 − 1")
    if not files:
        raise ConfigurationError("no files were given")
    found: dict[tuple[str, int, int], Source] = {}
    strange = []
    for file in dict.fromkeys(files):
        match = pattern.match(file)
        if match is None:
            strange.append(str(file))
            continue
        at = (
            _checked_order(match.get("order", "forward" if order is None else order)),
            int(match["seed"]) if seed is None else seed,
            int(match["step"]),
        )
        if at in found:
            raise ConfigurationError(
                f"{found[at].file} and {file} are both order {at[0]!r}, seed {at[1]}, step {at[2]}"
            )
        found[at] = Source(file, match["name"])
    if strange:
        more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
        raise ConfigurationError(f"pattern {pattern.text!r} does not fit {', '.join(strange[:5])}{more}")
    for at, source in found.items():
        if at[2] > _MOST_STEPS:
            raise ConfigurationError(f"{source.file}: step {at[2]} is beyond the largest that can be, {_MOST_STEPS:,}")
    slabs: dict[Slab, dict[int, Source]] = {}
    for label, number, step in sorted(found):
        slabs.setdefault((label, number), {})[step] = found[label, number, step]
    return slabs


def _checked_order(order: str) -> str:
    if not is_new_label(order):
        raise OrderError(f"order {order!r}: use up to 100 characters without spaces and commas, as in 'forward'")
    return order


class Pattern:
    """What the end of a path means."""

    def __init__(self, text: str) -> None:
        self.text = text
        pieces = [piece for piece in re.split(r"(\{[^{}]*\}|\*)", text.removeprefix("./")) if piece]
        known = {f"{{{field}}}": field for field in ("seed", "step", "order")}
        for piece in pieces:
            if piece not in known and ("{" in piece or "}" in piece):
                raise ConfigurationError(f"pattern {text!r}: {piece!r} is not one of {', '.join(known)} and *")
        self.fields = {known[piece] for piece in pieces if piece in known}
        if "step" not in self.fields:
            raise ConfigurationError(f"pattern {text!r} has no {{step}}; write it as in seed{{seed}}/step{{step}}.pt")
        self._expressions = [_expression(pieces, known, how) for how in ("", "?")]

    def match(self, file: Path) -> dict[str, str] | None:
        """Return what a path says, and as `name` which part of it; None where it does not fit."""
        path = file.absolute().as_posix()
        found = [match.groupdict() for one in self._expressions if (match := one.fullmatch(path))]
        if not found:
            return None
        if found[0] != found[1]:
            raise ConfigurationError(f"pattern {self.text!r} fits {file} in two ways; write out what is at the *")
        return found[0]


def _expression(pieces: Sequence[str], known: Mapping[str, str], how: str) -> re.Pattern[str]:
    """Return a pattern as an expression that takes as much as it can, or (with ``?``) as little."""
    parts, seen = [], set[str]()
    for before, piece, after in zip(["", *pieces], pieces, [*pieces[1:], ""], strict=False):
        field = known.get(piece)
        if piece == "*":
            parts.append(f"[^/]*{how}")
        elif field is None:
            parts.append(re.escape(piece))
        elif field in seen:
            parts.append(f"(?P={field})")
        elif field == "order":
            parts.append(f"(?P<order>[^/]+{how})")
        else:  # whole numbers, where what is beside them could take some of their digits
            begin, end = ("(?<![0-9])" if _open(before, known) else ""), ("(?![0-9])" if _open(after, known) else "")
            parts.append(f"{begin}(?P<{field}>[0-9]{{1,18}}){end}")
        seen.add(field or "")
    return re.compile(f"(?:.*/)?(?P<name>{''.join(parts)})", re.DOTALL)


def _open(piece: str, known: Mapping[str, str]) -> bool:
    return piece == "*" or piece in known
