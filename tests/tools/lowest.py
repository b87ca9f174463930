"""Print the oldest release of everything that pyproject.toml names, as constraints for pip: `make lowest`."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

__all__ = ["lowest"]

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def lowest(extras: list[str]) -> list[str]:
    """Return `name==release` for every requirement, those of some extras too; a requirement must name a release."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    pinned = []
    for requirement in wanted:
        named = re.fullmatch(r"([\w.-]+)(\[[^]]*\])?>=([\d.]+)", requirement)
        if named is None:
            raise ValueError(f"{requirement!r} names no oldest release, as in 'name>=1.2'")
        pinned.append(f"{named[1]}=={named[3]}")
    return pinned


if __name__ == "__main__":
    sys.stdout.write("\n".join(lowest(sys.argv[1:])) + "\n")
