"""Where a process may open no more files, one line says which file and what to do, and nothing is taken for damaged."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path

import duckdb
import pytest
from trajstore.cli import main as program

import trajstore as ts
from tests.conftest import SMALL_NET, sampled
from trajstore.errors import OpenFilesError, TrajstoreError
from trajstore.reading.verify import verify

TINY = {**SMALL_NET, "steps": 5, "seeds": [0]}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    ts.run(ts.Experiment.of(TINY), tmp_path / "runs.zarr", engine="reference")
    ts.open(tmp_path / "runs.zarr").sql("SELECT count(*) FROM metrics").fetchall()
    return tmp_path / "runs.zarr"


@contextmanager
def exhausted(left: int) -> Iterator[None]:
    """Open files until no more than some can be opened, and the system grants no others."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as held:
        lowest = os.open(os.devnull, os.O_RDONLY)  # no number below it is free
        held.callback(os.close, lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1 + left, before[1]))
        held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        yield


@pytest.fixture
def granted_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hard limit could not be raised again by the tests that follow: the soft one stands for it."""
    monkeypatch.setattr("trajstore._common.system.allow_more_files", lambda error: False)
    monkeypatch.setattr("trajstore.storage.places.durable.allow_more_files", lambda error: False)


def content(store: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in store.rglob("*") if file.is_file()}


DOINGS: dict[str, Callable[[Path], object]] = {
    "open": lambda store: ts.open(store)["net"],
    "dataset": lambda store: ts.open(store)["net"].dataset().load(),
    "state": lambda store: ts.open(store)["net"].state_dict(order="forward", seed=0, step=3),
    "verify": lambda store: list(verify(ts.Store(store))),
    "repair": lambda store: list(verify(ts.Store(store), repair=True)),
    "resume": lambda store: ts.run(ts.Experiment.of(TINY), store, engine="reference", resume=True),
    "extend": lambda store: ts.run(ts.Experiment.of({**TINY, "seeds": [0, 1]}), store, engine="reference", extend=True),
}


@pytest.mark.usefixtures("granted_no_more")
@pytest.mark.parametrize(("doing", "left"), sampled(product(DOINGS, [0, 1, 2]), every=2))
def test_what_cannot_be_opened_is_said_in_one_line_and_nothing_is_changed(doing: str, left: int, store: Path) -> None:
    before = content(store)
    with exhausted(left):
        try:
            DOINGS[doing](store)
            told = None
        except (TrajstoreError, OSError) as error:
            told = error
    if left == 0:
        assert told is not None
        assert re.search(r"^/\S+ cannot be opened: too many files are open.*`ulimit -n", str(told)), told
    assert {file: content for file, content in content(store).items() if file in before} == before or doing == "extend"
    assert not [found for found in verify(ts.Store(store)) if not found.harmless]
    ts.run(ts.Experiment.of({**TINY, "seeds": [0, 1]}), store, engine="reference", extend=True)
    assert all(slab.complete for slab in ts.open(store)["net"].slabs())


@pytest.mark.parametrize("doing", DOINGS)
def test_as_many_are_opened_as_the_system_grants(doing: str, store: Path) -> None:
    with exhausted(0):
        DOINGS[doing](store)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert soft > 1_000 or soft == hard


def test_what_duckdb_cannot_open_is_said_likewise(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trajstore.reading.sql import query

    def refused(*_: object) -> None:
        raise duckdb.IOException('IO Error: Cannot open file "/a/b.parquet": Too many open files')

    monkeypatch.setattr(query, "_confined", refused)
    with pytest.raises(OpenFilesError, match=r"/a/b\.parquet cannot be opened: too many files .*ulimit -n"):
        ts.open(store).sql("SELECT 1")


def test_the_program_says_it_of_any_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(**_: object) -> None:
        raise OSError(24, "Too many open files", "/lib/some.py")

    monkeypatch.setattr("typer.main.get_command", lambda app: type("C", (), {"main": staticmethod(fails)}))
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "/lib/some.py cannot be opened: too many files" in err
    assert "ulimit -n" in err
