"""`trajstore claims`: what a store says of the paper's claims."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer
from trajstore.cli.console import print_json, print_table, say
from trajstore.cli.inspection import print_answer
from trajstore.cli.options import JSON, StorePath, Trust, complete_experiment

if TYPE_CHECKING:
    from trajstore.analysis.examining import Examined

__all__ = ["claims"]

_MANY = 12
"""Rows that say the same are told together beyond."""


def claims(
    store: StorePath,
    exp: Annotated[list[str] | None, typer.Argument(metavar="[EXP]...", autocompletion=complete_experiment)] = None,
    claim: Annotated[
        list[str] | None,
        typer.Option(
            help="One claim; repeatable. All by default. `rate` follows derivatives along all steps of each seed."
        ),
    ] = None,
    sql: Annotated[
        str | None, typer.Option(metavar="QUERY", help="Ask the table `claims`, beside those of the store.")
    ] = None,
    trust: Trust = False,
    json: JSON = False,
) -> None:
    """Examine the paper's claims in what is recorded: evidence, statistic with its interval, verdict."""
    from trajstore.analysis.examining import examine, frame

    import trajstore as ts
    from trajstore.reading.telling_apart import refuse_damaged, told_apart

    opened = ts.open(store, trust=trust)
    sound, damaged = ({}, {}) if exp else told_apart(opened, lambda experiment: experiment)
    if not sound:
        refuse_damaged(damaged)
    found = list(examine(opened, exp or list(sound) or None, claim or None, None if exp else damaged))
    if sql is not None:
        from trajstore.reading.sql import answer

        print_answer(*answer(opened, sql, {"claims": frame(found)}), json)
    elif json:
        print_json([vars(row) for row in found])
    else:
        _print(found)
    refuse_damaged(damaged)


def _print(found: list[Examined]) -> None:
    """Print the findings, claim by claim."""
    from trajstore.analysis.examining import CLAIMS

    for name in dict.fromkeys(row.claim for row in found):
        mine = [row for row in found if row.claim == name]
        say(f"{name}: {CLAIMS[name].says} ({CLAIMS[name].source})")
        if not any(row.experiment for row in mine):
            say(f"  {mine[0].verdict}: {mine[0].evidence}\n")
            continue
        say("")
        columns = ["experiment", "of", "statistic", "value", "verdict", "evidence"]
        print_table(columns, [cells for together in _together(mine) for cells in together])
        counts = Counter(row.verdict for row in mine)
        say("\n  " + ", ".join(f"{count} × {verdict}" for verdict, count in counts.items()) + "\n")


def _together(rows: list[Examined]) -> Iterator[list[list[str]]]:
    """Yield the cells of rows; of many that say the same of the same statistic, how many and from where to where."""
    from trajstore.analysis.writing import number

    for _, group in groupby(sorted(rows, key=_kind), _kind):
        alike = list(group)
        if len(alike) <= _MANY:
            yield [[r.experiment, r.about, r.statistic, _number(r), r.verdict, r.evidence] for r in alike]
            continue
        first, last = alike[0], alike[-1]
        values = sorted(row.value for row in alike if row.value == row.value)
        told = " to ".join(number(value, 3) for value in (values[0], values[-1])) if values else "–"
        about = f"{len(alike)}, from {first.about} to {last.about}"
        yield [[first.experiment, about, first.statistic, told, first.verdict, "each with --json or --sql"]]


def _kind(row: Examined) -> tuple[str, str, str]:
    return row.experiment, row.statistic, row.verdict


def _number(row: Examined) -> str:
    from trajstore.analysis.writing import interval, number

    if row.value != row.value:
        return "–"
    plain = interval(row.value, row.low, row.high) if row.low == row.low else number(row.value, 3)
    return plain.replace("\N{NO-BREAK SPACE}", " ")
