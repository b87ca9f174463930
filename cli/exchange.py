"""`trajstore export` and `trajstore import`: files that other programs read, or have written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from trajstore.cli.console import counted, human_bytes, progress_bar, say
from trajstore.cli.options import ExperimentName, StorePath, parse_seeds

from trajstore.errors import ConfigurationError

if TYPE_CHECKING:
    from trajstore.exchange.importing import Import

__all__ = ["export", "import_"]


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
        from trajstore.exchange.export import export_state

        export_state(ts.open(store)[exp], output, order=orders[0], seed=seeds[0], step=step, force=force)
    elif kind == "metrics":
        from trajstore.exchange.export import export_metrics

        export_metrics(ts.open(store)[exp], output, orders=orders, seeds=seeds, force=force)
    else:
        from trajstore.exchange.export_arrays import export_arrays

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


def import_(
    store: StorePath,
    exp: ExperimentName,
    files: Annotated[
        list[Path], typer.Argument(metavar="FILES...", help="Checkpoints: .pt, .pth, .ckpt or .safetensors.")
    ],
    pattern: Annotated[
        str, typer.Option(help="What the ends of their paths mean, as in 'seed{seed}/step{step}.pt'; * is anything.")
    ],
    order: Annotated[
        str | None, typer.Option(help="Their order, where the pattern has no {order}.", show_default="forward")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Their seed, where the pattern has no {seed}.")] = None,
    key: Annotated[
        str | None, typer.Option(metavar="KEY.KEY", help="Where in a file the state dict is, as in trainer.model.")
    ] = None,
    snapshot_dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None, typer.Option(help="Round the stored states to this.")
    ] = None,
    codec: Annotated[Literal["pcodec", "portable"], typer.Option(help="How states are compressed.")] = "pcodec",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only look at the files, and say what it will do.")
    ] = False,
) -> None:
    """Make an experiment of checkpoints; those that are stored already are compared, and left as they are."""
    from trajstore.exchange.importing import carry_out, prepare

    asked = prepare(
        store, exp, files, pattern, order=order, seed=seed, key=key, snapshot_dtype=snapshot_dtype, codec=codec
    )
    there = sum(map(len, asked.sources.values()))
    new = sum(map(len, asked.missing.values()))
    if not dry_run:
        with progress_bar(there, exp, "files") as progress:
            stored = carry_out(asked, progress=progress)
    if key is None and asked.keys:
        say(f"{exp}: the state dicts are under {', '.join(map(repr, asked.keys))}")
    if dry_run:
        _dry_run(asked, new, there - new)
        return
    slabs, size = counted(len(asked.sources), "slab"), human_bytes(stored.bytes_on_disk())
    say(f"{exp}: {counted(new, 'file')} imported, {there - new} stored already, {slabs}, {size} in {store}")


def _dry_run(asked: Import, new: int, old: int) -> None:
    layout = asked.layout
    for (order, seed), sources in asked.sources.items():
        files, steps = counted(len(sources), "file"), f"steps {min(sources)} to {max(sources)}"
        say(f"order {order!r}, seed {seed}: {files}, {steps}, {len(asked.missing[order, seed])} to import")
    say(f"files          {new} to import, {old} stored already")
    say(f"parameters     {layout.parameters:,} ({layout.dtype}), {counted(len(layout.entries), 'tensor')}")
    say(f"states         {human_bytes(new * layout.row_bytes)} raw")
