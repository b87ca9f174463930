"""What many experiments and many slabs cost: `ls`, `info`, `sql`, `state_dict`, `record`, timed and counted.

    python benchmarks/scale.py [--against PYTHON] [--experiments '[10, 100, 400]'] [--slabs '[10, 100, 1000]']

Times are of a folder, the median of a few turns, without starting Python: seconds of CPU time of all threads, which
others who use the machine change less than the clock's. Requests are counted at a bucket in memory, to which the folder
was copied. A store of many experiments has copies of one small loop; one of many slabs has one experiment that as many
loops of one step were recorded into, one after the other, and `record` is the last of these. `sql` is the first
question, which makes the index, and `sql again` the second. `packed` is the same of a copy after `trajstore pack`; what
both take of the disk is printed below the table. `--against` names the Python of an environment with another
trajstore: both are measured in one run, each with stores of its own, and ratios are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Measured = dict[str, dict[str, float]]
"""What was done and to how many → seconds of CPU time, and requests; and of packing, bytes."""
_LAST = 5
"""So many of the last recordings are timed."""


def measure(experiments: list[int], slabs: list[int], turns: int, scratch: Path) -> Measured:
    """Measure the trajstore of this process."""
    found: Measured = {}
    for number in experiments:
        folder = scratch / f"experiments-{number}.zarr"
        _many_experiments(folder, number)
        found |= {f"{what}, {number} experiments": cost for what, cost in _read(folder, "e0", turns).items()}
    folder, recorded = scratch / "slabs.zarr", 0
    for number in slabs:
        times = [_record(str(folder), seed) for seed in range(recorded, number)]
        recorded = number
        uploaded = _uploaded(folder)
        with _counted() as requests:
            _record(uploaded, number)
        told = {"seconds": statistics.median(times[-_LAST:]), "requests": float(requests[0])}
        found[f"record, {number} slabs"] = told
        found |= {f"{what}, {number} slabs": cost for what, cost in _read(folder, "loop", turns).items()}
        found |= {f"{what}, {number} slabs": cost for what, cost in _packed(folder, "loop", turns).items()}
    return found


def _packed(folder: Path, name: str, turns: int) -> Measured:
    """Pack a copy of a store, and time what only reads it."""
    try:
        from trajstore.exchange.pack import pack
    except ImportError:
        return {}  # of another trajstore, which knows nothing of it

    import trajstore as ts

    copy = folder.with_name(f"packed-{folder.name}")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    begin = time.process_time()
    room = pack(ts.Store(copy), name)
    cost = {"seconds": time.process_time() - begin, "content": room.content, "before": room.before, "after": room.after}
    timed = {f"{what}, packed": cost for what, cost in _read(copy, name, turns, counting=False).items()}
    return {"pack": cost, **timed}


def _read(folder: Path, name: str, turns: int, *, counting: bool = True) -> Measured:
    """Time and, `counting` requests, count what only reads."""
    from trajstore.cli.inspection import info, ls

    import trajstore as ts

    def quietly(command: Callable[..., None], *arguments: object) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            command(*arguments)

    def fresh(place: str) -> None:
        shutil.rmtree(Path(f"{folder}.traj") / "index", ignore_errors=True)
        shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"]), ignore_errors=True)
        asked(place)

    def asked(place: str) -> None:
        ts.open(place).sql("SELECT count(*) FROM runs").fetchall()

    def state(place: str) -> None:
        ts.open(place)[name].state_dict(order="forward", seed=0, step=1)

    kinds: dict[str, Callable[[str], None]] = {
        "ls": lambda place: quietly(ls, place),
        "info": lambda place: quietly(info, place, name),
        "sql": fresh,
        "sql again": asked,
        "state_dict": state,
    }
    found: Measured = {what: {} for what in kinds}
    if counting:
        uploaded = _uploaded(folder)
        for what, command in kinds.items():
            with _counted() as requests:
                command(uploaded)
            found[what]["requests"] = float(requests[0])
    for what, command in kinds.items():
        times = []
        for _ in range(turns):
            begin = time.process_time()
            command(str(folder))
            times.append(time.process_time() - begin)
        found[what]["seconds"] = statistics.median(times)
    return found


def _record(place: str, seed: int, name: str = "loop") -> float:
    """Record one more slab of one step, and return the seconds of CPU time it took."""
    import torch

    import trajstore as ts

    model = torch.nn.Linear(2, 2)
    begin = time.process_time()
    with ts.record(place, name, model, seed=seed, durability="none") as rec:
        rec.step(loss=1.0)
    return time.process_time() - begin


def _many_experiments(folder: Path, number: int) -> None:
    """Record one experiment, and put copies beside it that say that they are others."""
    import zarr

    from trajstore.reading.handles import open_root
    from trajstore.storage.format.digest import config_digest
    from trajstore.storage.writing.declaring import ATTRIBUTE, set_attributes

    _record(str(folder), 0, "e0")
    for copy in range(1, number):
        shutil.copytree(folder / "e0", folder / f"e{copy}")
        group = zarr.open_group(open_root(folder, "none").store, path=f"e{copy}", mode="r+", zarr_format=3)
        attributes: Any = dict(group.attrs[ATTRIBUTE])  # type: ignore[call-overload]
        config = {**attributes["config"], "name": f"e{copy}"}
        set_attributes(group, attributes | {"config": config, "config_digest": config_digest(config)})


def _uploaded(folder: Path) -> str:
    """Copy a folder to a bucket in memory, and return its URL."""
    import obstore

    from trajstore.storage.places.opening import place_of

    url = f"memory://{time.monotonic_ns()}.zarr"
    bucket: Any = place_of(url)
    for file in folder.rglob("*"):
        if file.is_file():
            obstore.put(bucket.objects, file.relative_to(folder).as_posix(), file.read_bytes())
    return url


@contextlib.contextmanager
def _counted() -> Iterator[list[int]]:
    """Count the requests to buckets meanwhile, of any kind; a listing counts once."""
    from trajstore.storage.places import requests

    count, names = [0], ("get", "head", "create", "replace", "delete", "below", "level")
    before = {name: getattr(requests, name) for name in names}

    def counting(request: Callable[..., Any]) -> Callable[..., Any]:
        def made(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401
            count[0] += 1
            return request(*arguments, **named)

        return made

    try:
        for name, request in before.items():
            setattr(requests, name, counting(request))
        yield count
    finally:
        for name, request in before.items():
            setattr(requests, name, request)


def _measured_by(python: str, given: argparse.Namespace) -> Measured:
    """Measure the trajstore of an environment, in a process of its own."""
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        sizes = [f"--{name}={json.dumps(getattr(given, name))}" for name in ("experiments", "slabs", "turns")]
        environment = {**os.environ, "XDG_CACHE_HOME": f"{scratch}/cache"}
        command = [python, __file__, "--measure", scratch, *sizes]
        told = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    measured: Measured = json.loads(told.stdout.splitlines()[-1])
    return measured


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--against", metavar="PYTHON", help="the Python of an environment with another trajstore")
    arguments.add_argument("--experiments", type=json.loads, default=[10, 100, 400], help="as in [10, 100]")
    arguments.add_argument("--slabs", type=json.loads, default=[10, 100, 1000], help="as in [10, 100]")
    arguments.add_argument(
        "--scratch", type=Path, default=tempfile.gettempdir(), help="a folder on the disk to measure"
    )
    arguments.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments.add_argument("--turns", type=int, default=3, help="of reading, of which the median is taken")
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    if given.measure:
        print(json.dumps(measure(given.experiments, given.slabs, given.turns, given.measure)))
        return
    told = {"now": _measured_by(sys.executable, given)}
    if given.against:
        told["against"] = _measured_by(given.against, given)
    width = max(map(len, told["now"]))
    print(
        f"{'':<{width}}"
        + "".join(f"{who + ' ' + what:>20}" for what in ("CPU ms", "requests") for who in told)
        + (f"{'ratio of times':>20}{'of requests':>20}" if given.against else "")
    )
    for row in [row for row in told["now"] if all(row in one for one in told.values())]:
        cells = [f"{one[row]['seconds'] * 1e3:,.0f}" for one in told.values()]
        cells += [f"{one[row]['requests']:,.0f}" if "requests" in one[row] else "" for one in told.values()]
        if given.against:
            now, other = (told[who][row] for who in ("now", "against"))
            cells += [f"{other[what] / max(now[what], 1e-9):.1f}×" for what in ("seconds", "requests") if what in now]
        print(f"{row:<{width}}" + "".join(f"{cell:>20}" for cell in cells))
    for row, packed in told["now"].items():
        if "content" in packed:
            before, after, content = (packed[what] / 1e6 for what in ("before", "after", "content"))
            print(f"{row}: {before:.1f} MB of the disk before, {after:.1f} MB after, for {content:.1f} MB of content")
    if given.json:
        given.json.write_text(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
