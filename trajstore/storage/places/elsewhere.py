"""What may travel to another process: the reading of a store that is seen there, and never the writing.

Datasets are pickled when a cluster computes them, or processes do, and with them the stores that they read.
"""

from __future__ import annotations

from pathlib import Path

from trajstore.errors import ConfigurationError, UnreachableError

__all__ = ["refuse_only_here", "refuse_second_writer", "refuse_unseen"]


def refuse_second_writer(address: str) -> None:
    """Refuse to pickle a store that is open for writing: locks do not travel."""
    raise ConfigurationError(
        f"{address} is open for writing in this process, and a copy of it would be a second writer; "
        "pass the path, or what `trajstore.open` returns, which only reads"
    )


def refuse_only_here(address: str) -> None:
    """Refuse to pickle a store that no other process sees."""
    raise ConfigurationError(f"{address} is in the memory of this process; others cannot read it")


def refuse_unseen(folder: str) -> None:
    """Refuse to read a folder that this process does not see: what is missing would be taken for not recorded."""
    if not Path(folder).is_dir():
        raise UnreachableError(
            f"this process sees no store at {folder}; whoever computes must reach it under the same path"
        )
