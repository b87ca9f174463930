"""`trajstore export`: files that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from trajstore.cli.console import say
from trajstore.cli.options import ExperimentName, StorePath, parse_seeds

from trajstore.errors import ConfigurationError

__all__ = ["export"]


def export(
    store: StorePath,
    exp: ExperimentName,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="FILE.safetensors: one state. FILE.parquet: the metrics. With --numpy: a folder."
        ),
    ],
    order: Annotated[
        str | None,
        typer.Option("--order", "--orders", help="Of a state: its order. Else some, as in forward,backward."),
    ] = None,
    seed: Annotated[
        str | None, typer.Option("--seed", "--seeds", help="Of a state: its seed. Else some, as in 0-4 or 0,2,5.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="Of a state: its step.")] = None,
    numpy: Annotated[bool, typer.Option("--numpy", help="Write states and metrics as NumPy arrays.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what an export wrote there before.")] = False,
) -> None:
    """Write a state, the metrics or plain arrays to files that other programs read."""
    kind = _kind(output, numpy)
    if kind != "state" and step is not None:
        raise ConfigurationError(f"-o {output}: --step is for one state; write that to FILE.safetensors")
    seeds = None if seed is None else parse_seeds(seed)
    orders = None if order is None else [label.strip() for label in order.split(",")]

    import trajstore as ts

    if kind == "state":
        options = {"--order": order, "--seed": seed, "--step": step}
        if missing := [option for option, given in options.items() if given is None]:
            raise ConfigurationError(f"-o {output}: this is for one state; give {', '.join(missing)} as well")
        assert orders is not None
        assert seeds is not None
        assert step is not None
        if len(orders) != 1 or len(seeds) != 1:
            raise ConfigurationError(f"-o {output}: this is for one state; give one order and one seed")
        from trajstore.exporting import export_state

        export_state(ts.open(store)[exp], output, order=orders[0], seed=seeds[0], step=step, force=force)
    elif kind == "metrics":
        from trajstore.exporting import export_metrics

        export_metrics(ts.open(store)[exp], output, orders=orders, seeds=seeds, force=force)
    else:
        from trajstore.dumping import export_arrays

        export_arrays(ts.open(store)[exp], output, orders=orders, seeds=seeds, force=force)
    say(str(output))


def _kind(output: Path, numpy: bool) -> str:
    """Tell what is to be written: the ending says it, or --numpy."""
    kind = {".safetensors": "state", ".parquet": "metrics"}.get(output.suffix.lower())
    if numpy and kind:
        raise ConfigurationError(f"-o {output}: --numpy writes a folder; leave out the ending, or --numpy")
    if numpy:
        return "arrays"
    if kind is None:
        raise ConfigurationError(
            f"-o {output}: the ending says what to write; use .safetensors (one state) or .parquet (the metrics), "
            "or give --numpy for a folder of arrays"
        )
    return kind
