"""`trajstore plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from trajstore.cli.console import say
from trajstore.cli.options import ExperimentName, FigureName, StorePath

from trajstore.errors import ConfigurationError

__all__ = ["check_output", "plot", "save"]


def plot(
    store: StorePath,
    exp: ExperimentName,
    figure: FigureName,
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG, PDF or SVG.")],
) -> None:
    """Draw a figure of an experiment."""
    from trajstore.analysis import figures

    import trajstore as ts

    check_output(output)
    save(figures.draw(figure, ts.open(store)[exp].dataset()), output)
    say(str(output))


def save(figure: object, output: Path) -> None:
    """Write a figure to a file."""
    from matplotlib.figure import Figure

    assert isinstance(figure, Figure)
    figure.savefig(output)


def check_output(output: Path) -> None:
    """Refuse a file that no figure can be written to."""
    known = (".png", ".pdf", ".svg")
    if output.suffix.lower() not in known:
        raise ConfigurationError(f"-o {output}: the ending says the format; use {', '.join(known)}")
    if not output.parent.is_dir():
        raise ConfigurationError(f"-o {output}: there is no folder {output.parent}")
