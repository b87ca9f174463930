"""`trajstore plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from trajstore.cli.console import say
from trajstore.cli.options import ExperimentName, FigureName, StorePath, Trust, parse_seeds

from trajstore._common.atomic import whole_file
from trajstore.errors import ConfigurationError, ConflictError

__all__ = ["check_output", "plot", "save"]


def plot(
    store: StorePath,
    exp: ExperimentName,
    figure: FigureName,
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG, PDF or SVG.")],
    metric: Annotated[list[str] | None, typer.Option(help="What to draw; learning-curves takes several.")] = None,
    window: Annotated[int | None, typer.Option(min=3, help="Recorded steps of the statistic.")] = None,
    seed: Annotated[list[str] | None, typer.Option(help="As in 0-4; repeatable. All by default.")] = None,
    order: Annotated[list[str] | None, typer.Option(help="Repeatable. All by default.")] = None,
    pairs: Annotated[int | None, typer.Option(min=1, help="Of contraction: how many pairs of iterates.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at the output.")] = False,
    trust: Trust = False,
) -> None:
    """Draw a figure of an experiment; which options it takes depends on the figure."""
    from trajstore.analysis import figures

    import trajstore as ts

    check_output(output, force=force)
    seeds = [number for text in seed or () for number in parse_seeds(text, "--seed")]
    options = {"metric": metric, "window": window, "seed": seeds, "order": order, "pairs": pairs}
    opened = ts.open(store, trust=trust)
    of = opened[exp] if exp in opened else opened.variants(exp)
    save(figures.draw(figure, of, **options), output, force=force)
    say(str(output))


def save(figure: object, output: Path, *, force: bool) -> None:
    """Write a figure to a file, whole or not at all, in the style it was drawn in."""
    from matplotlib.figure import Figure
    from trajstore.analysis.figures import style

    assert isinstance(figure, Figure)
    with style(), whole_file(output, force=force) as partial:
        figure.savefig(partial, format=output.suffix[1:].lower())


def check_output(output: Path, *, force: bool) -> None:
    """Refuse a file that no figure can be written to, and one that is there unless by force."""
    known = (".png", ".pdf", ".svg")
    if output.suffix.lower() not in known:
        raise ConfigurationError(f"-o {output}: the ending says the format; use {', '.join(known)}")
    if not output.parent.is_dir():
        raise ConfigurationError(f"-o {output}: there is no folder {output.parent}")
    if not force and output.exists():
        raise ConflictError(f"{output} exists already; give --force to replace it")
