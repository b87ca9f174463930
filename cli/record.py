"""`trajstore presets` and `trajstore record`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from trajstore.cli.console import counted, human_bytes, human_seconds, print_json, print_table, progress_bar, say
from trajstore.cli.options import (
    JSON,
    PresetName,
    WhatToRecord,
    parse_adaptive,
    parse_seeds,
    parse_settings,
    parse_size,
)

from trajstore.errors import ConfigurationError

if TYPE_CHECKING:
    from trajstore.experiment.experiment import Experiment
    from trajstore.experiment.presets import Scale
    from trajstore.recording.cost import Cost
    from trajstore.store import StoredExperiment

__all__ = ["presets", "record", "record_with_progress"]


def presets(name: PresetName = None, json: JSON = False) -> None:
    """List the presets, or print one as TOML to start your own from."""
    from trajstore.experiment.presets import about, preset_names, preset_table, preset_text, variants

    if name is None:
        names = preset_names()
        if json:
            print_json([preset_table(one) for known in names for one in variants(known)])
        else:
            print_table(["preset", "what it is"], [[known, about(known)] for known in names])
    elif json:
        tables = [preset_table(one) for one in variants(name)]
        print_json(tables if len(tables) > 1 else tables[0])
    else:
        say(preset_text(name).rstrip())


def record(
    what: WhatToRecord,
    scale: Annotated[
        Literal["full", "small"], typer.Option(help="Of a preset: as in the paper, or minutes on two cores.")
    ] = "full",
    store: Annotated[
        str | None, typer.Option(help="The store's folder or URL; made if there is none.", show_default=False)
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name in the store; the preset's by default.")] = None,
    seeds: Annotated[str | None, typer.Option(help="As in 0-4 or 0,2,5.")] = None,
    init_seed: Annotated[int | None, typer.Option(help="One start θ₀ for all seeds.")] = None,
    orders: Annotated[str | None, typer.Option(help="As in forward,backward+backward@1000,backward/100.")] = None,
    steps: Annotated[int | None, typer.Option(help="The last step.")] = None,
    record_every: Annotated[int | None, typer.Option(help="Compute and measure every k-th iterate.")] = None,
    snapshot_every: Annotated[int | None, typer.Option(help="Store the state of every k-th step.")] = None,
    adaptive: Annotated[
        str | None,
        typer.Option(metavar="METRIC=TOLERANCE", help="Compute only as many as it takes to know a metric's curve."),
    ] = None,
    dense_tail: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="With --adaptive: all of the last N recorded steps of each leg; ratios of variances take 192.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change any field, as in operator.lr=0.1; repeatable."),
    ] = None,
    engine: Annotated[
        Literal["auto", "reference", "wavefront"], typer.Option(help="What computes the iterates.")
    ] = "auto",
    lanes: Annotated[int | None, typer.Option(min=1, max=4096, help="Chains that advance together.")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where they are computed.")] = "auto",
    workers: Annotated[
        int | None, typer.Option(min=0, max=1024, help="Processes that compute; 0: only this one.", show_default="auto")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="A Dask scheduler whose workers compute.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What all processes may take together, as in 4GB.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after what is committed.")] = False,
    extend: Annotated[
        bool,
        typer.Option("--extend", help="Add orders, seeds and steps to an experiment, or make it."),
    ] = False,
    durability: Annotated[
        Literal["segment", "none"],
        typer.Option(help="Whether what is committed survives a power cut (segment) or only a crash (none)."),
    ] = "segment",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it will take.")] = False,
    json: JSON = False,
) -> None:
    """Record an experiment: a preset, a TOML file, or what a function of yours returns."""
    experiments = _experiments(
        what,
        scale,
        {
            "name": name, "seeds": parse_seeds(seeds) if seeds is not None else None, "init_seed": init_seed,
            "orders": orders, "steps": steps,
        },
        {
            "every": record_every, "snapshot_every": snapshot_every, "dense_tail": dense_tail,
            **parse_adaptive(adaptive),
        },
        parse_settings(set_ or []),
    )  # fmt: skip
    how = {"engine": engine, "lanes": lanes, "device": device, "workers": workers, "memory": parse_size(memory)}
    if dry_run:
        _dry_run(experiments, store, {"resume": resume, "extend": extend}, how, json)
        return
    if store is None:
        raise ConfigurationError("say where to record: --store PATH (or --dry-run to see what it takes)")
    if len(experiments) > 1:  # what contradicts is known before the first of them is recorded
        from trajstore.recording.running import refuse_conflict

        for experiment in experiments:
            refuse_conflict(experiment, store, resume=resume, extend=extend)
    told = []
    for experiment in experiments:
        stored = record_with_progress(
            experiment, store, resume=resume, extend=extend, durability=durability, scheduler=scheduler, **how
        )
        slabs, size = stored.slabs(), stored.bytes_on_disk()
        told.append({"experiment": stored.name, "slabs": len(slabs), "bytes": size})
        if not json:
            say(f"{stored.name}: {counted(len(slabs), 'slab')} complete, {human_bytes(size)} in {store}")
    if json:
        print_json(told if len(told) > 1 else told[0])


def record_with_progress(experiment: Experiment, store: str | Path, **how: Any) -> StoredExperiment:  # noqa: ANN401
    """Record as `trajstore.run` does, with a bar on a terminal."""
    from trajstore.engine.walk import applications
    from trajstore.recording.running import run

    total = applications(experiment.orders, experiment.steps, experiment.grid) * len(experiment.seeds)
    with progress_bar(total, experiment.name, "operator applications") as progress:
        return run(experiment, store, progress=progress, **how)


def _experiments(
    what: str, scale: Scale, fields: dict[str, Any], recorded: dict[str, Any], settings: dict[str, Any]
) -> list[Experiment]:
    """Return what was asked for: one experiment, or the variants of a preset."""
    from trajstore.experiment.configuration import merge
    from trajstore.experiment.experiment import Experiment, read_toml
    from trajstore.experiment.presets import FULL, preset_table, variants

    changes = {key: value for key, value in fields.items() if value is not None}
    if any(value is not None for value in recorded.values()):
        changes["record"] = {key: value for key, value in recorded.items() if value is not None}
    changes = merge(changes, settings)
    if scale != FULL and (what.endswith(".toml") or ":" in what):
        raise ConfigurationError(
            f"--scale applies to presets, and {what} is not one; in a file, write scale = {scale!r}"
        )
    if what.endswith(".toml"):
        return [Experiment.of(merge(read_toml(Path(what)), changes))]
    if ":" in what:
        return [_from_function(what, changes)]
    names = variants(what)
    if len(names) > 1:
        return [Experiment.of(preset_table(one, scale, shared=changes)) for one in names]
    return [Experiment.preset(what, changes, scale)]


def _from_function(reference: str, changes: dict[str, Any]) -> Experiment:
    from trajstore.experiment.configuration import merge
    from trajstore.experiment.experiment import Experiment
    from trajstore.problems.factory import call

    if sys.path[:1] != [str(Path.cwd())]:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    problem = changes.get("problem", {})
    arguments = problem.get("arguments", {}) if isinstance(problem, dict) else {}
    made = call(reference, arguments)
    if isinstance(made, Experiment):
        if problem:
            raise ConfigurationError(f"{reference!r} makes the whole experiment; change its problem there")
        return Experiment.of(merge(made.config() | {"problem": made.problem}, changes))
    name = reference.rpartition(":")[2].strip("_").replace("_", "-")
    return Experiment.of(merge({"name": name, "problem": {"family": "factory", "function": reference}}, changes))


def _dry_run(
    experiments: list[Experiment], store: str | None, on: dict[str, bool], how: dict[str, Any], json: bool
) -> None:
    from dataclasses import asdict

    from trajstore.recording.cost import cost
    from trajstore.recording.running import refuse_conflict

    told = []
    for experiment in experiments:
        if store is not None:
            refuse_conflict(experiment, store, **on)
        takes = cost(experiment, **how)
        told.append({"experiment": experiment.name, **asdict(takes)})
        if not json:
            _say_cost(experiment, takes)
    if json:
        print_json(told if len(told) > 1 else told[0])


def _say_cost(experiment: Experiment, takes: Cost) -> None:
    bound = "" if takes.exact else "at most "
    say(f"{experiment.name}: {len(experiment.orders)} orders × {len(experiment.seeds)} seeds, {experiment.steps} steps")
    say(f"operator applications  {bound}{takes.applications:,}")
    say(f"iterates measured      {takes.iterates:,}")
    say(f"states stored          {takes.snapshots:,}")
    say(f"disk                   {bound}about {human_bytes(takes.disk_bytes)}, {human_bytes(takes.raw_bytes)} raw")
    share = f"of that {human_seconds(takes.metric_seconds)} for metrics and storing"
    say(f"time                   {bound}about {human_seconds(takes.seconds)} here, {share}")
    say(f"plan                   {takes.plan}")
