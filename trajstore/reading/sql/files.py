"""Files of the index: each appears whole or not at all, and stays for a while after it is not wanted any more."""

from __future__ import annotations

import os
import stat
import time
import uuid
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import duckdb

from trajstore.reading.sql.text import literal

__all__ = ["copy", "is_own", "new_file", "tidy", "write_text"]

_KEEP_SECONDS = 24 * 3600.0


def new_file(folder: Path) -> Path:
    """Return the path of a Parquet file that nobody else will write."""
    return folder / f"{uuid.uuid4().hex}.parquet"


def is_own(file: Path) -> bool:
    """Tell whether a file of the index is there: a link, which can have come with a store, is none."""
    try:
        return stat.S_ISREG(file.lstat().st_mode)
    except OSError:
        return False


def copy(connection: duckdb.DuckDBPyConnection, query: str, file: Path) -> None:
    """Write a query's rows as Parquet."""
    with _appearing(file) as partial:
        connection.execute(f"COPY ({query}) TO {literal(str(partial))} (FORMAT parquet)")


def write_text(file: Path, text: str) -> None:
    """Write a text, if it is not there already."""
    with suppress(OSError):
        content = text.encode()
        if is_own(file) and file.stat().st_size == len(content) and file.read_bytes() == content:
            return
    with _appearing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def tidy(folder: Path, wanted: Container[Path], before: Container[Path]) -> None:
    """Take out what has not been wanted for a day: until then, queries that began earlier may read it."""
    now = time.time()
    for file in (*folder.rglob("*.parquet"), *folder.rglob("*.partial")):
        with suppress(FileNotFoundError):  # another process tidies up as well
            if file in wanted:
                continue
            if not is_own(file):
                if file.is_symlink():
                    file.unlink()  # what it leads to stays as it is
            elif file in before:
                os.utime(file)  # from here on it is not wanted
            elif now - file.stat().st_mtime > _KEEP_SECONDS:
                file.unlink()


@contextmanager
def _appearing(file: Path) -> Iterator[Path]:
    """Give a name that the file has until it is whole; leave nothing of it otherwise."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        yield partial
        partial.replace(file)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
