"""The index for SQL is a cache: whatever becomes of its files, an answer is right, or there is none."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest

import trajstore as ts
from tests.conftest import SMALL_NET
from trajstore.errors import DamageError, QueryError, WriteError
from trajstore.reading.sql import answer, query, write_answer
from trajstore.reading.sql.catalog import Catalog
from trajstore.reading.sql.index import places_of
from trajstore.reading.verify import verify

ALL = "SELECT * FROM metrics, runs, experiments, segments ORDER BY ALL"
TINY = {**SMALL_NET, "steps": 3, "seeds": [0], "orders": ["forward"]}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("sample") / "s.zarr"
    for name in ("net", "other"):
        ts.run(ts.Experiment.of({**TINY, "name": name}), store, engine="reference", durability="none")
    return store


@pytest.fixture
def store(sample: Path, tmp_path: Path) -> ts.Store:
    shutil.copytree(sample, tmp_path / "s.zarr")
    return ts.open(tmp_path / "s.zarr")


def asked(store: ts.Store, what: str = ALL) -> str:
    return repr(answer(store, what))


def index_of(store: ts.Store) -> Path:
    assert store.place.beside is not None
    return store.place.beside / "index"


def flip(file: Path, at: int, bit: int = 3) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)


def flips(store: ts.Store, most: int | None) -> Iterator[tuple[Path, int]]:
    files = [file for file in sorted(index_of(store).rglob("*")) if file.is_file()]
    places = [(file, at) for file in files for at in range(file.stat().st_size)]
    yield from places if most is None else random.Random(0).sample(places, most)


def flipped(store: ts.Store, most: int | None) -> list[str]:
    """Flip bytes of an index that is whole, one at a time; return what was answered."""
    asked(store)
    whole, found = index_of(store).with_name("whole"), []
    shutil.copytree(index_of(store), whole)
    for file, at in [*flips(store, most)]:
        flip(file, at)
        try:
            found.append(asked(store))
        except QueryError as error:
            found.append(str(error))
        shutil.rmtree(index_of(store))
        shutil.copytree(whole, index_of(store))
    shutil.rmtree(whole)
    return found


@pytest.mark.parametrize("most", [8, pytest.param(None, marks=pytest.mark.slow)])
def test_a_flipped_byte_of_the_index_changes_no_answer(most: int | None, store: ts.Store) -> None:
    right = asked(store)
    assert {*flipped(store, most)} == {right}


def test_the_flips_are_in_what_is_read(store: ts.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """If nobody looked at the digests, some of them would be seen."""
    right = asked(store)
    monkeypatch.setattr(Catalog, "_is_sound", lambda catalog, path: path.is_file())
    assert {*flipped(store, 8)} > {right}


@pytest.mark.parametrize("written", [False, True])
def test_a_file_that_is_damaged_after_it_was_looked_at_is_written_anew(
    written: bool, store: ts.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what, times = "SELECT * FROM metrics ORDER BY ALL", list[int]()
    right = asked(store, what)
    real = query._confined

    def damaging(index: Any, writable: Any) -> Any:
        connection = real(index, writable)
        if not times:
            for file in index.metrics:
                flip(file, 10)  # of the pages: what is read when rows are fetched
                flip(file, file.stat().st_size // 2)
                flip(file, file.stat().st_size - 6)  # the length of the footer
        times.append(1)
        return connection

    monkeypatch.setattr(query, "_confined", damaging)
    if written:
        write_answer(store, what, tmp_path / "a.parquet")
        assert repr(duckdb.execute(f"FROM '{tmp_path}/a.parquet'").fetchall()) in right
    else:
        assert asked(store, what) == right
    assert len(times) == 2  # it did end in an error at first


def lie(store: ts.Store) -> None:
    """Let every metric in an index be 7, and have its catalog vouch for it."""
    catalog = Catalog.of(index_of(store))
    for file in catalog.files():
        path = catalog.folder / "metrics" / file
        rows = f"SELECT * REPLACE (7::DOUBLE AS train_loss) FROM '{path}'"
        duckdb.execute(f"COPY ({rows}) TO '{path}.new' (FORMAT parquet)")
        Path(f"{path}.new").replace(path)
        catalog.add(path)
    catalog.save()


LOSS = "SELECT DISTINCT train_loss FROM metrics"


def test_an_index_that_came_with_a_store_is_not_believed(
    store: ts.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = asked(store)
    lie(store)
    assert asked(store, LOSS) == "(['train_loss'], [(7.0,)])"  # whoever made it believes it
    before = {file: file.read_bytes() for file in index_of(store).rglob("*.*")}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    assert asked(store) == right
    assert {file: file.read_bytes() for file in index_of(store).rglob("*.*")} == before
    (own,) = places_of(store)
    assert own.is_relative_to(tmp_path / "another")
    assert asked(store) == right


def test_an_index_without_a_seal_is_written_anew(store: ts.Store) -> None:
    right = asked(store)
    lie(store)
    file = index_of(store) / "catalog.json"
    stored = json.loads(file.read_text())
    for key, value in (("seal", "0" * 64), ("seal", None), ("catalog", {**stored["catalog"], "tables": {}})):
        file.write_text(json.dumps({**stored, key: value}))
        assert asked(store) == right
        lie(store)
        stored = json.loads(file.read_text())


def test_a_user_who_can_keep_no_key_believes_what_the_process_wrote(
    store: ts.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    right, before = asked(store), {file: file.stat().st_mtime_ns for file in index_of(store).rglob("*.*")}
    assert asked(store) == right
    assert {file: file.stat().st_mtime_ns for file in index_of(store).rglob("*.*")} == before


def test_verify_compares_the_index_with_the_store(store: ts.Store) -> None:
    right = asked(store)
    assert list(verify(store)) == []
    lie(store)
    found = [*verify(store)]
    assert [str(one) for one in found] == [
        "the store: the index for SQL has other rows in 'metrics' than the store, of "
        f"{name}, forward, 0; it is only a cache ({index_of(store) / 'metrics'})"
        for name in ("net", "other")
    ]
    assert not any(one.harmless for one in found)
    assert all(one.repaired for one in verify(store, repair=True))
    assert list(verify(store)) == []
    assert asked(store) == right
    (file, *_) = (index_of(store) / "runs").glob("*.parquet")
    flip(file, 10)
    (one,) = verify(store)
    assert one.harmless
    assert "is not as it was written; the next query writes it anew" in str(one)
    assert asked(store) == right
    assert list(verify(store)) == []


def test_an_index_that_lags_behind_is_no_finding(store: ts.Store) -> None:
    asked(store)
    ts.run(ts.Experiment.of({**TINY, "seeds": [0, 1]}), store.place.address, extend=True, engine="reference")
    assert list(verify(store)) == []


def full(code: int, folders: tuple[Path, ...]) -> Callable[[Path, Any], Path]:
    """A `Path.replace` that fails below some folders."""
    replace = Path.replace

    def refused(path: Path, target: Any) -> Path:
        if path.suffix == ".partial" and any(path.is_relative_to(folder) for folder in folders):
            raise OSError(code, os.strerror(code), str(path))
        return replace(path, target)

    return refused


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_where_nothing_can_be_written_beside_the_store_the_users_cache_has_the_index(
    code: int, store: ts.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = asked(store)
    shutil.rmtree(index_of(store))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Path, "replace", full(code, (index_of(store),)))
    assert asked(store) == right
    assert [file for file in index_of(store).rglob("*") if file.is_file()] == []
    monkeypatch.setattr(Path, "replace", full(code, (index_of(store), tmp_path / "cache" / "trajstore" / "index")))
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(WriteError, match=f"the index for SQL could not be written .*{os.strerror(code)}"):
        asked(store)


def broken(store: ts.Store) -> None:
    (store.place.path / "net" / "zarr.json").write_text("{")  # type: ignore[attr-defined]


def without_a_chunk(store: ts.Store) -> None:
    (store.place.path / "net" / "train_loss" / "c" / "0" / "0" / "0").unlink()  # type: ignore[attr-defined]


def unreadable(store: ts.Store) -> None:
    (store.place.path / "net" / "committed" / "c" / "0" / "0" / "0" / "0").unlink()  # type: ignore[attr-defined]
    os.mkfifo(store.place.path / "net" / "committed" / "c" / "0" / "0" / "0" / "0")  # type: ignore[attr-defined]


@pytest.mark.parametrize("damage", [broken, without_a_chunk, unreadable])
def test_an_experiment_that_cannot_be_read_hides_no_other_and_is_no_number(
    damage: Callable[[ts.Store], None], store: ts.Store
) -> None:
    alone = [f"SELECT * FROM {table} WHERE experiment = 'other'" for table in ("runs", "metrics", "experiments")]
    alone += ["FROM level_variance('other', 'train_loss', steps := 3)", "DESCRIBE metrics"]
    right = [asked(store, what) for what in alone]
    if damage is without_a_chunk:  # an index that has the numbers may tell them
        shutil.rmtree(index_of(store))
    damage(store)
    assert [asked(store, what) for what in alone] == right
    for what in (
        "FROM runs", "SELECT count(*) FROM metrics", "SELECT count(*) FROM segments",
        "SELECT max(steps) FROM experiments",
        "FROM metrics WHERE experiment = 'net'", "SELECT avg(train_loss) FROM metrics WHERE step > 0",
        "SELECT 1 FROM metrics m JOIN runs r ON m.seed = r.seed WHERE r.experiment = 'other'",
        "FROM level_variance('net', 'train_loss', steps := 3)",
    ):  # fmt: skip
        with pytest.raises(DamageError, match=r"^experiment 'net'"):
            asked(store, what)


def test_a_store_of_which_nothing_can_be_read_says_so(store: ts.Store) -> None:
    for name in ("net", "other"):
        (store.place.path / name / "train_loss" / "c" / "0" / "0" / "0").unlink()  # type: ignore[attr-defined]
    for table in ("runs", "metrics", "segments", "experiments"):
        with pytest.raises(DamageError, match=r"^experiment '(net|other)'.* is missing"):
            asked(store, f"FROM {table}")
        with pytest.raises(DamageError, match=" is missing"):
            store.sql(f"FROM {table}")
