"""`trajstore verify`, `copy`, `merge`, `pack`, `rm` and `unlock`: look after a store."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from trajstore.cli.console import counted, print_json, say
from trajstore.cli.options import JSON, StorePath, Trust, complete_experiment

from trajstore.errors import ConfigurationError, UntrustedError

if TYPE_CHECKING:
    from trajstore.replay.compare import Replayed
    from trajstore.store import Store

__all__ = ["copy", "merge", "pack", "rm", "unlock", "verify"]

_FOUND = 1


def verify(
    store: StorePath,
    exp: Annotated[str | None, typer.Argument(metavar="[EXP]", autocompletion=complete_experiment)] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Take out what is damaged, so that a recording writes it again.")
    ] = False,
    replay: Annotated[
        bool, typer.Option("--replay", help="Compute the iterates again, and compare them with those stored.")
    ] = False,
    trust: Trust = False,
    json: JSON = False,
) -> None:
    """Read everything, and tell what is not as it was committed: exit code 0 if nothing is, 1 otherwise."""
    from dataclasses import asdict

    import trajstore as ts
    from trajstore.reading.verify import verify as found_in

    opened = ts.Store(store, trust=trust)
    findings = list(found_in(opened, exp, repair=repair))
    wrong = [finding for finding in findings if not finding.harmless]
    replayed, left_out = ([], []) if wrong or not replay else _replayed(opened, exp)
    different = [slab for _, slab in replayed if slab.differs_from is not None]
    if json:
        told = {"sound": not wrong, "findings": [asdict(finding) for finding in findings]}
        again = {
            "replayed": [{"experiment": name, **asdict(slab)} for name, slab in replayed],
            "not_replayed": left_out,
        }
        print_json(told | again if replay else told)
    else:
        for finding in findings:
            say(str(finding))
        for name, slab in replayed:
            say(f"experiment {name!r}, {slab}")
        for reason in left_out:
            say(reason)
        say(f"{store}: {'sound' if not wrong else counted(len(wrong), 'finding')}")
    if wrong or different:
        raise typer.Exit(_FOUND)


def _replayed(store: Store, exp: str | None) -> tuple[list[tuple[str, Replayed]], list[str]]:
    """Replay an experiment, or all that can be; return what came of it, and of which experiments nothing can come."""
    from trajstore.replay.compare import Replayed, replay
    from trajstore.replay.recipe import why_not

    if exp is not None:
        return [(exp, slab) for slab in replay(store[exp])], []
    replayed, left_out = list[tuple[str, Replayed]](), list[str]()
    refused: UntrustedError | None = None
    for name in store:
        if reason := why_not(store[name]):
            left_out.append(reason)
            continue
        try:
            replayed += [(name, slab) for slab in replay(store[name])]
        except UntrustedError as error:  # the others can be replayed all the same
            refused = error
            left_out.append(str(error))
    if refused is not None and not replayed:
        raise refused  # nothing was done of what was asked for
    return replayed, left_out


def copy(
    source: Annotated[str, typer.Argument(metavar="FROM", help="The store to copy; it stays as it is.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="Where to; an earlier copy is brought up to date.")],
    exp: Annotated[list[str] | None, typer.Argument(metavar="[EXP]...", help="All of them by default.")] = None,
    json: JSON = False,
) -> None:
    """Copy experiments to another store, also while they are recorded: what is committed, read back and checked."""
    _take_over(source, target, exp, json)


def merge(
    source: Annotated[str, typer.Argument(metavar="FROM", help="The store to take from; it stays as it is.")],
    target: Annotated[str, typer.Argument(metavar="INTO", help="The store to add to; made if there is none.")],
    exp: Annotated[list[str] | None, typer.Argument(metavar="[EXP]...", help="All of them by default.")] = None,
    json: JSON = False,
) -> None:
    """Take experiments over from another store: whole ones, and orders, seeds and steps of those that both have."""
    _take_over(source, target, exp, json)


def _take_over(source: str, target: str, names: list[str] | None, json: bool) -> None:
    from dataclasses import asdict

    import trajstore as ts
    from trajstore.exchange.merge import merge as merged

    into = ts.Store(target)
    done = merged(ts.open(source), into, names)
    if json:
        print_json([asdict(slab) for slab in done])
        return
    for name in dict.fromkeys(slab.experiment for slab in done):
        slabs = [slab for slab in done if slab.experiment == name]
        copied = sum(slab.copied for slab in slabs)
        told = f"{name}: {counted(copied, 'slab')} copied, {len(slabs) - copied} there already"
        stored = into[name]
        complete, schema = stored.complete(stored.commits()), stored.schema
        half = sum(not complete[schema.orders.index(slab.order), schema.seeds.index(slab.seed)] for slab in slabs)
        say(f"{told}; {half} not complete yet" if half else told)


def pack(
    store: StorePath,
    exp: Annotated[
        list[str] | None,
        typer.Argument(metavar="[EXP]...", help="All by default.", autocompletion=complete_experiment),
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Lay them out as files again.")] = False,
    json: JSON = False,
) -> None:
    """Put small files together, which take whole blocks of a disk each: what many short runs leave.

    Everything reads as before, with Zarr and xarray too; whoever records more lays it out as files again.
    """
    from dataclasses import asdict

    import trajstore as ts
    from trajstore._common.units import human_bytes
    from trajstore.exchange.pack import pack as packed
    from trajstore.exchange.pack import unpack

    opened = ts.open(store)
    rows = []
    for name in exp or list(opened):
        room = (unpack if undo else packed)(opened, name)
        rows.append({"experiment": name, **asdict(room)})
        if not json:  # at once: another may be busy, or damaged
            before, after, content = map(human_bytes, (room.before, room.after, room.content))
            became = f"{before} on disk, now {after}" if room.before != room.after else f"{after} on disk, as before"
            say(f"{name}: {content} in all, {became}")
    if json:
        print_json(rows)


def rm(
    store: StorePath,
    exp: Annotated[str, typer.Argument(metavar="EXP", autocompletion=complete_experiment)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove an experiment and everything recorded of it."""
    import trajstore as ts
    from trajstore.exchange.merge import remove

    opened = ts.open(store)
    experiment = opened[exp]
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigurationError(f"rm removes experiment {exp!r} for good; give --yes to confirm")
        slabs = counted(sum(slab.recorded > 0 for slab in experiment.slabs()), "recorded slab")
        typer.confirm(f"Remove experiment {exp!r} with {slabs} for good?", abort=True, err=True)
    remove(opened, exp)
    say(f"removed {exp} from {store}")


def unlock(store: StorePath) -> None:
    """Free the locks of writers that died, in an object store; one that still runs can write no more.

    In a folder there is nothing to do: the locks of a process end with it.
    """
    import trajstore as ts

    freed = ts.Store(store).place.unlock()
    if not freed:
        ts.open(store)  # says so where no store is; one that died before its first write left locks alone
    for one in freed:
        say(one)
    say(f"{store}: {counted(len(freed), 'lock')} freed")
