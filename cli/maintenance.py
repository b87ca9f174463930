"""`trajstore verify`: look after a store."""

from __future__ import annotations

from typing import Annotated

import typer
from trajstore.cli.console import print_json, say
from trajstore.cli.options import JSON, StorePath, complete_experiment

__all__ = ["verify"]

_FOUND = 1


def verify(
    store: StorePath,
    exp: Annotated[str | None, typer.Argument(metavar="[EXP]", autocompletion=complete_experiment)] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Take out what is damaged, so that a recording writes it again.")
    ] = False,
    json: JSON = False,
) -> None:
    """Read everything, and tell what is not as it was committed: exit code 0 if nothing is, 1 otherwise."""
    from dataclasses import asdict

    import trajstore as ts
    from trajstore.verifying import verify as found_in

    opened = ts.Store(store)
    findings = list(found_in(opened, exp, repair=repair))
    wrong = [finding for finding in findings if not finding.harmless]
    if json:
        print_json({"sound": not wrong, "findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            say(str(finding))
        say(f"{store}: {'sound' if not wrong else f'{len(wrong)} findings'}")
    if wrong:
        raise typer.Exit(_FOUND)
