"""Whatever is done with a store is disturbed: a read fails once, at any moment, or the process is killed there.

Nothing that was committed is lost, no number is wrong, one line says what failed, and doing it again ends it. What
fails is what Python asks the system for: to open a file, to read it, to list a folder, to tell a status; what kills is
what Python has the system change. Samples are in the suite; `make torture` has many more, and as many as one likes.
"""

from __future__ import annotations

import asyncio
import errno
import io
import os
import random
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest

from tests.tools.disturbed import DOING, Stores, alone, prepared
from tests.tools.torture import Report, in_child, side_by_side, start
from tests.tools.waiting import HANGS
from trajstore.errors import TrajstoreError
from trajstore.storage.places.folder import Folder, FolderStore

CODES = (errno.EIO, errno.ESTALE, errno.EMFILE)
CHANGES = ("mkdir", "replace", "rename", "link", "symlink", "unlink", "remove", "rmdir")
KILLED = [*(name for name, doing in DOING.items() if doing.writes), "sql"]
"""What changes a store, or what lies beside it."""


def recorded(folder: Path) -> Path:
    """Record what is disturbed."""
    origin = folder / "origin"
    origin.mkdir(parents=True)
    in_child(prepared, origin)
    return origin


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tmp_path_factory.mktemp("disturbed"))


# Reads that fail --------------------------------------------------------------------------------------------------


class _Unreadable(io.BytesIO):
    """A file that can be opened, and not read."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self._error = error

    def read(self, *_: Any) -> bytes:
        raise self._error

    read1 = readinto = readline = readlines = read


class Failing:
    """The k-th read below a folder fails, and no other."""

    def __init__(self, below: Path, at: int = 0, code: int = errno.EIO) -> None:
        self._below, self._at, self._code = f"{below}/", at, code
        self.reads, self.failed = 0, ""
        self._lock, self._before = threading.Lock(), dict[tuple[Any, str], Any]()

    def __enter__(self) -> Self:
        self._put(io, "open", self._opening)
        for name in ("scandir", "listdir", "lstat", "stat", "open"):
            self._put(os, name, partial(self._asking, name))
        return self

    def __exit__(self, *_: object) -> None:
        for (module, name), original in self._before.items():
            setattr(module, name, original)

    def _put(self, module: Any, name: str, call: Callable[..., Any]) -> None:
        self._before[module, name] = getattr(module, name)
        setattr(module, name, call)

    def _fails(self, path: Any, what: str) -> OSError | None:
        try:
            name = os.fspath(path)
        except TypeError:  # a descriptor: of a folder that is deleted
            return None
        if not isinstance(name, str) or not f"{name}/".startswith(self._below):
            return None
        with self._lock:
            self.reads += 1
            if self.reads != self._at:
                return None
            self.failed = f"{what} {name.removeprefix(self._below)}: {os.strerror(self._code)}"
        return OSError(self._code, os.strerror(self._code), name)

    def _opening(self, file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        if "r" in mode and "+" not in mode:
            if (error := self._fails(file, "open")) is not None:
                raise error
            if (error := self._fails(file, "read")) is not None:
                return _Unreadable(error)
        return self._before[io, "open"](file, mode, *more, **named)

    def _asking(self, name: str, path: Any = ".", *more: Any, **named: Any) -> Any:
        reads = name != "open" or more[0] & os.O_ACCMODE == os.O_RDONLY
        if reads and (error := self._fails(path, name)) is not None:
            raise error
        return self._before[os, name](path, *more, **named)


class Moment(NamedTuple):
    """What is done when a read fails, and which."""

    name: str
    at: int
    code: int


class Trials:
    """Does things in this process while a read fails."""

    def __init__(self, origin: Path, folder: Path) -> None:
        self._stores, self._right = Stores(origin, folder), dict[str, object]()
        alone(self._stores.folder)

    def reads(self, name: str) -> int:
        """Return how many reads there are where none fails, and keep what is right."""
        self._stores.lay_out(DOING[name])
        with Failing(self._stores.folder) as counting:
            self._right[name] = DOING[name].do(self._stores.folder)
        return counting.reads

    def trial(self, moment: Moment) -> tuple[list[str], Counter[str]]:
        """Return what is wrong with what came of it."""
        doing, problems, told = DOING[moment.name], list[str](), None
        if moment.name not in self._right:
            self.reads(moment.name)
        self._stores.lay_out(doing)
        with Failing(self._stores.folder, moment.at, moment.code) as failing:
            try:
                answer = doing.do(self._stores.folder)
            except (TrajstoreError, OSError) as error:
                told = str(error)
            except BaseException:
                told = ""
                problems.append(traceback.format_exc(limit=-3))
        if not failing.failed:
            return problems, Counter()
        if told is None and not doing.writes and answer != self._right[moment.name]:
            problems.append("another answer")
        if told is not None and "\n" in told:
            problems.append(f"several lines: {told!r}")
        problems += self._stores.wrong(doing)
        return [f"{failing.failed}: {problem}" for problem in problems], Counter(failed=1, told=told is not None)


def _counted(origin: Path, folder: Path, names: Iterable[str]) -> list[tuple[str, int]]:
    trials = Trials(origin, folder)
    return [(name, trials.reads(name)) for name in names]


def _tried(origin: Path, folder: Path, moments: Sequence[Moment]) -> tuple[list[str], Counter[str]]:
    trials, counts, problems = Trials(origin, folder), Counter[str](), []
    for moment in moments:
        wrong, more = trials.trial(moment)
        problems += [f"{moment.name}, read {moment.at}: {problem}" for problem in wrong]
        counts += more
    return problems, counts


def reads(most: int, seed: int, folder: Path, origin: Path | None = None, names: Sequence[str] = (*DOING,)) -> Report:
    """Let every read of every command fail, or a sample of so many."""
    report, origin = Report("failing reads", Counter(failed=0, told=0)), origin or recorded(folder)
    counted = in_child(_counted, origin, folder / "counting", names)
    moments = [Moment(name, at, CODES[at % len(CODES)]) for name, number in counted for at in range(1, number + 1)]
    chosen = sorted(random.Random(seed).sample(moments, min(most, len(moments))))
    batches = [chosen[begin : begin + 15] for begin in range(0, len(chosen), 15)]

    def batch(number: int, which: int) -> None:
        try:
            problems, counts = in_child(_tried, origin, folder / f"trial-{which}", batches[number])
        except AssertionError as error:
            problems, counts = [f"{batches[number][0].name}: {error}"], Counter()
        report.add("", [], **counts)
        for problem in problems:
            report.add(f"seed {seed}", [problem])

    side_by_side(batch, range(len(batches)))
    return report


def test_where_a_disk_does_not_say_whether_a_file_is_there_it_is_not_taken_for_missing(tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_text("{}")
    for there in (Folder(tmp_path).exists, lambda key: asyncio.run(FolderStore(tmp_path).exists(key))):
        for at in (1, 2):  # asking for the key's own status, and what it is
            with Failing(tmp_path, at) as failing, suppress(OSError):
                assert there("zarr.json"), failing.failed
            assert failing.failed


def test_a_read_that_fails_once_loses_nothing_and_changes_no_number(origin: Path, tmp_path: Path) -> None:
    report = reads(6, 0, tmp_path, origin, ["dataset", "verify --repair"])
    assert report.counts["failed"] >= 5
    assert report.counts["told"] >= 3, "the faults reach what is read"
    assert not report.problems, "\n".join([str(report), *report.problems])


# Processes that are killed ----------------------------------------------------------------------------------------


def dying(folder: Path, at: int) -> Callable[[], int]:
    """Have this process be killed before the k-th change below a folder; return what tells how many there were."""
    changes, lock = 0, threading.Lock()

    def changing(path: Any, elsewhere: bool = False) -> None:
        nonlocal changes
        if elsewhere or (isinstance(path, str | Path) and f"{path}/".startswith(f"{folder}/")):
            with lock:
                changes += 1
                if changes == at:
                    os.kill(os.getpid(), signal.SIGKILL)

    def noted(original: Callable[..., Any], path: Any, *more: Any, **named: Any) -> Any:
        changing(path, elsewhere=named.get("dir_fd") is not None)
        return original(path, *more, **named)

    def opened(original: Callable[..., Any], file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        if {*mode} & {*"wax+"}:
            changing(file)
        return original(file, mode, *more, **named)

    for name in CHANGES:
        setattr(os, name, partial(noted, getattr(os, name)))
    io.open = partial(opened, io.open)  # type: ignore[assignment]
    return lambda: changes


def killed(name: str, folder: Path, at: int) -> int:
    """Do something until this process is killed; return how many changes there were if it was not."""
    alone(folder)
    told = dying(folder, at)
    with suppress(TrajstoreError):
        DOING[name].do(folder)
    return told()


def examined(origin: Path, folder: Path, name: str) -> list[str]:
    """Look at what is left, and do it again."""
    stores = Stores(origin, folder)
    alone(stores.folder)
    problems = stores.wrong(DOING[name])
    if not DOING[name].writes:
        answer = DOING[name].do(stores.folder)
        stores.lay_out(DOING[name])
        problems += ["another answer"] if DOING[name].do(stores.folder) != answer else []
    return problems


def kills(most: int, seed: int, folder: Path, origin: Path | None = None, names: Sequence[str] = KILLED) -> Report:
    """Kill every command before every change, or a sample of so many."""
    report, origin = Report("killed commands", Counter(killed=0)), origin or recorded(folder)

    def trial(name: str, at: int, where: Path) -> int:
        stores = Stores(origin, where)
        stores.lay_out(DOING[name])
        process, connection = start(killed, name, stores.folder, at)
        with closing(connection):
            connection.recv()
            process.join(HANGS)
            process.kill()
            if process.exitcode == -signal.SIGKILL:
                changes = 0
            else:
                fine, changes = connection.recv()
                if not fine:
                    report.add(f"{name}, change {at}", [str(changes)])
                    return 0
        try:
            problems = in_child(examined, origin, where, name)
        except AssertionError as error:
            problems = [str(error)]
        report.add(f"seed {seed}, {name}, before change {at}", problems, killed=not changes)
        return changes

    moments = [(name, at) for name in names for at in range(1, trial(name, 0, folder / "counting") + 1)]
    chosen = random.Random(seed).sample(moments, min(most, len(moments)))
    side_by_side(lambda number, which: trial(*chosen[number], folder / f"trial-{which}"), range(len(chosen)))
    report.counts["of"] = len(moments)
    return report


@pytest.mark.slow
def test_a_command_that_is_killed_loses_nothing_and_is_ended_by_the_next(origin: Path, tmp_path: Path) -> None:
    report = kills(12, 1, tmp_path, origin)
    assert report.counts["killed"] == 12
    assert not report.problems, "\n".join([str(report), *report.problems])
