"""What every command prints through: data to standard output, progress and errors to standard error.

A terminal's commands in what a store says are shown escaped, and not obeyed.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from trajstore.cli.interrupting import stop_if_asked
from trajstore.cli.writing import as_written, holds

from trajstore._common.units import human_bytes
from trajstore.errors import printable

__all__ = [
    "counted",
    "human_bytes",
    "human_seconds",
    "print_csv",
    "print_json",
    "print_table",
    "progress_bar",
    "say",
    "tell",
]


def say(text: str) -> None:
    """Print a line of data, or several."""
    sys.stdout.write(printable(text, keep="\n") + "\n")


def tell(text: str) -> None:
    """Print a line that is not data to standard error."""
    sys.stderr.write(printable(text, keep="\n") + "\n")


def print_json(value: Any) -> None:  # noqa: ANN401
    """Print JSON; numbers that are not finite become the strings 'NaN', 'Infinity' and '-Infinity'."""
    text = json.dumps(_strict(value), indent=2, ensure_ascii=False)
    if not holds(sys.stdout, text):
        text = json.dumps(_strict(value), indent=2)
    if not text.replace("\n", "").isprintable():  # JSON has a way of its own to escape
        text = "".join(c if printable(c, keep="\n") == c else _escaped(c) for c in text)
    say(text)


def print_csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print CSV; NULL is an empty field."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(map(printable, columns))
    writer.writerows([_plain(_strict(value)) for value in row] for row in rows)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print aligned columns, numbers to the right."""
    columns = [as_written(printable(column)) for column in columns]
    cells = [[as_written(printable(_cell(value))) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    numeric = [all(isinstance(row[k], int | float | None) for row in rows) and bool(rows) for k in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        aligned = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)]
        return "  ".join(aligned).rstrip()

    say(line(columns))
    say(line(["─" * width for width in widths]))
    for row in cells:
        say(line(row))


@contextmanager
def progress_bar(total: int, what: str, unit: str) -> Iterator[Callable[[int, str], None]]:
    """Show a bar on standard error, if that is a terminal; what it gives ends what goes on after Ctrl-C."""
    if not sys.stderr.isatty():
        yield lambda done, where: stop_if_asked()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
        TimeRemainingColumn(compact=True),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)

        def shown(done: int, where: str) -> None:
            progress.update(task, advance=done, description=printable(where))
            stop_if_asked()

        yield shown


def counted(number: int, what: str) -> str:
    """Return a number of things: "1 file", "2 files"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def human_seconds(seconds: float) -> str:
    """Return a duration in the unit a person would choose."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _cell(value: Any) -> str:  # noqa: ANN401
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _escaped(character: str) -> str:
    return f"\\u{ord(character):04x}" if character.isascii() else json.dumps(character)[1:-1]


def _plain(value: Any) -> Any:  # noqa: ANN401
    return printable(value, keep="\n") if isinstance(value, str) else value


def _strict(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
