"""`trajstore doctor`: what this machine can do for recordings."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer
from trajstore.cli.console import counted, print_json, say
from trajstore.cli.options import JSON

__all__ = ["doctor"]

_WRONG = 1
_WORDS = {"good": "good", "slow": "SLOW", "missing": "MISSING", "doubtful": "DOUBTFUL", "wrong": "WRONG"}


def doctor(
    path: Annotated[Path, typer.Argument(metavar="[PATH]", help="The folder in which stores are to lie.")] = Path(),
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="CHECK", help="This check alone; may be given several times.")
    ] = None,
    json: JSON = False,
) -> None:
    """Examine this machine: what is installed, whether it computes and stores rightly, and what makes it slow.

    Exit code 1 if anything is wrong; what is only slow or missing leaves it at 0.
    """
    from dataclasses import asdict

    from trajstore.machine import Finding, examine

    findings: list[Finding] = []
    for finding in examine(path, only or ()):
        findings.append(finding)
        if sys.stderr.isatty():  # compiling takes a while
            typer.echo(f"\r\033[K{finding.check} …", err=True, nl=False)
    if sys.stderr.isatty():
        typer.echo("\r\033[K", err=True, nl=False)
    wrong = [finding for finding in findings if finding.state == "wrong"]
    if json:
        print_json({"right": not wrong, "findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            lines = textwrap.wrap(finding.told, 96, break_on_hyphens=False)
            say(f"{finding.check:<12} {_WORDS[finding.state]:<8} {lines[0]}")
            for line in lines[1:]:
                say(f"{'':<21} {line}")
        advice = dict.fromkeys(f"{f.check}: {f.remedy}" for f in findings if f.remedy)
        if advice:
            say("\nWhat to do:")
            for line in advice:
                say(f"  {line}")
        say(f"\n{counted(len(wrong), 'thing') + ' wrong' if wrong else 'nothing computes or stores wrongly'}")
    if wrong:
        raise typer.Exit(_WRONG)
