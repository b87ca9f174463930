"""How stores and experiments show themselves, as text and as HTML: what is in them, how far it is, how large.

HTML has no styles, scripts or resources of its own, and everything that comes from a store is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trajstore._common.units import human_bytes, human_size
from trajstore.errors import printable

if TYPE_CHECKING:
    from trajstore.reading.handles import ExperimentHandle, StoreHandle

__all__ = ["experiment_html", "experiment_text", "store_html", "store_text"]

_MOST = 8
"""Seeds in a table; of more, the first and the last are shown."""


@dataclass(frozen=True)
class _Told:
    """What is told of an experiment."""

    about: tuple[tuple[str, str], ...]
    seeds: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    """Of each order: steps committed, a seed each."""
    steps: str
    complete: str
    size: str

    @classmethod
    def of(cls, experiment: ExperimentHandle) -> _Told:
        """Read what is committed now."""
        schema, commits = experiment.schema, experiment.commits()
        progress = experiment.progress(commits)
        complete = progress.complete
        shown = _shown(len(schema.seeds))
        raw = int(commits.snapshots.sum()) * schema.layout.row_bytes
        files = experiment.store.place.files(experiment.name)
        states = sum(size for key, size in files if key.startswith(f"{experiment.name}/params/c/"))
        ratio = f" (ratio {raw / states:.1f})" if states and raw else ""
        layout = schema.layout
        return cls(
            (
                ("problem", experiment.problem),
                ("operator", experiment.operator),
                ("parameters", f"{schema.parameters:,}, states of {layout.size('params'):,} {layout.dtype}"),
                ("steps", f"0 to {progress.steps}, {progress.places:,} places for states"),
            ),
            tuple("…" if k is None else f"seed {schema.seeds[k]}" for k in shown),
            tuple(
                (
                    order,
                    tuple("…" if k is None else progress.of(i, k) for k in shown),
                )
                for i, order in enumerate(schema.orders)
            ),
            f"{progress.steps:,}",
            f"{complete.sum()} of {complete.size} slabs complete",
            f"{human_size(sum(size for _, size in files), experiment.bytes_taken())}, of which states "
            f"{human_bytes(states)} "
            f"for {human_bytes(raw)} raw{ratio}",
        )


def _shown(seeds: int) -> list[int | None]:
    """Return positions of the seeds to show, None for those that are left out."""
    if seeds <= _MOST:
        return list(range(seeds))
    return [*range(_MOST - 3), None, seeds - 2, seeds - 1]


def experiment_text(experiment: ExperimentHandle) -> str:
    """Show an experiment as text."""
    told = _Told.of(experiment)
    table = [("steps committed", *told.seeds), *((order, *row) for order, row in told.rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [f"<experiment {experiment.name!r} of trajstore {experiment.store}>"]
    lines += [f"  {label:<12} {text}" for label, text in told.about]
    lines += [f"  {'slabs':<12} {told.complete}", f"  {'size':<12} {told.size}", ""]
    for first, *row in table:
        cells = (cell.rjust(width) for cell, width in zip(row, widths[1:], strict=True))
        lines.append("  " + "  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return printable("\n".join(lines), keep="\n")


def experiment_html(experiment: ExperimentHandle) -> str:
    """Show an experiment as HTML."""
    told = _Told.of(experiment)
    about = [*told.about, ("slabs", told.complete), ("size", told.size)]
    facts = "".join(f"<tr><th>{_escaped(label)}</th><td>{_escaped(text)}</td></tr>" for label, text in about)
    steps = _table(["steps committed", *told.seeds], [[order, *row] for order, row in told.rows])
    name = f"<strong>{_escaped(experiment.name)}</strong>, experiment of {_escaped(str(experiment.store))}"
    return f"<div>{name}<table>{facts}</table>{steps}</div>"


def _of_store(store: StoreHandle) -> tuple[list[str], list[list[str]]]:
    """Return a table of the experiments."""
    from trajstore.reading.telling_apart import told_apart

    columns = ["experiment", "orders", "seeds", "steps", "complete", "size"]
    found, damaged = told_apart(store, _row)
    rows = found | {name: [name, "damaged", "", "", "", ""] for name in damaged}
    return columns, [rows[name] for name in sorted(rows)]


def _row(experiment: ExperimentHandle) -> list[str]:
    told, schema = _Told.of(experiment), experiment.schema
    return [experiment.name, ", ".join(schema.orders), str(len(schema.seeds)), told.steps, told.complete, told.size]


def store_text(store: StoreHandle) -> str:
    """Show a store as text."""
    columns, rows = _of_store(store)
    if not rows:
        return f"<trajstore {store}: empty>"
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in (columns, *rows))
    return printable("\n".join([f"<trajstore {store}>", *(f"  {line}".rstrip() for line in lines)]), keep="\n")


def store_html(store: StoreHandle) -> str:
    """Show a store as HTML."""
    columns, rows = _of_store(store)
    return f"<div><strong>trajstore</strong> {_escaped(str(store))}{_table(columns, rows) if rows else ': empty'}</div>"


def _escaped(text: str) -> str:
    """Return a text as HTML shows it, with what a terminal or a page would take for a command spelled out."""
    return html.escape(printable(text))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_escaped(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + f"<th>{_escaped(first)}</th>" + "".join(f"<td>{_escaped(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
