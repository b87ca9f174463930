"""SQL: right answers, nothing but reading, an index that is only a cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pytest
from trajstore.analysis import tail_variance
from trajstore.cli.demo import VERDICT

import trajstore as ts
from trajstore.errors import ConflictError, QueryError
from trajstore.sql import rows_of, write_answer


def test_metrics_are_those_of_the_dataset(record):
    experiment = record(record={"every": 3})
    ds = experiment.dataset()
    rows = experiment.store.sql('SELECT "order", seed, step, leg, train_loss, test_loss FROM metrics').fetchall()
    assert len(rows) == 2 * 2 * 5
    for order, seed, step, leg, train, test in rows:
        here = ds.sel(order=order, seed=seed, step=step)
        assert (leg, train, test) == (int(here["leg"]), float(here["train_loss"]), float(here["test_loss"]))


def test_unmeasured_is_null_and_diverged_is_nan(record):
    record("quadratic", steps=3, seeds=[0], orders=["forward"])
    experiment = record(steps=3, seeds=[0], orders=["forward"], operator={"family": "sgd", "lr": 1e30})
    types = dict(experiment.store.sql("SELECT column_name, column_type FROM (DESCRIBE metrics)").fetchall())
    assert types["train_loss"] == types["test_loss"] == "DOUBLE"
    rows = experiment.store.sql("SELECT test_loss IS NULL, count(*) FROM metrics GROUP BY ALL ORDER BY ALL").fetchall()
    assert rows == [(False, 4), (True, 4)]  # the quadratic has no test loss
    values = experiment.store.sql("SELECT test_loss FROM metrics WHERE experiment = 'net' ORDER BY step").fetchall()
    stored = experiment.dataset()["test_loss"].values[0, 0]
    assert np.isnan(stored[-1])
    assert np.array_equal([v for (v,) in values], stored, equal_nan=True)


def test_hyperparameters_are_columns_of_runs(record):
    record("quadratic", steps=3, seeds=[0, 5])
    store = record(operator={"family": "adam", "lr": 0.01, "schedule": {"family": "cosine", "total": 9}}).store
    rows = store.sql(
        """SELECT experiment, lr, beta1, noise, width, schedule, schedule_total, count(*)
           FROM runs GROUP BY ALL ORDER BY ALL"""
    ).fetchall()
    assert rows == [
        ("net", 0.01, 0.9, None, 8, "cosine", 9, 4),
        ("quadratic", 0.1, None, 1.0, None, "constant", None, 4),
    ]
    experiments = store.sql(
        "SELECT experiment, steps, orders, seeds, parameters FROM experiments ORDER BY 1"
    ).fetchall()
    assert experiments[0] == ("net", 12, ["forward", "backward"], [0, 1], 97)


def test_variances_in_sql_are_those_of_the_analysis(record):
    experiment = record(name="demo", steps=110)
    detrended = tail_variance(experiment.dataset(), "test_loss", 100)
    for seed, _, _, _, forward, backward, ratio in experiment.store.sql(VERDICT).fetchall():
        assert forward == pytest.approx(float(detrended.sel(order="forward", seed=seed)), rel=1e-9)
        assert backward == pytest.approx(float(detrended.sel(order="backward", seed=seed)), rel=1e-9)
        assert ratio == forward / backward


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("DROP VIEW metrics", "only SELECT is possible here, not DROP"),
        ("CREATE TABLE t (x INT)", "not CREATE"),
        ("INSERT INTO metrics SELECT * FROM metrics", "not INSERT"),
        ("COPY metrics TO 'out.csv'", "not COPY"),
        ("EXPLAIN ANALYZE COPY metrics TO 'out.csv'", "not COPY"),
        ("explain analyze copy metrics to 'out.csv'", "not COPY"),
        ("EXPLAIN COPY metrics TO 'out.csv'", "not COPY"),
        ("EXPLAIN (FORMAT json) COPY metrics TO 'out.csv'", "not COPY"),
        ("/* x */ EXPLAIN ANALYZE COPY metrics TO 'out.csv'", "not COPY"),
        ("-- x\nEXPLAIN ANALYZE COPY metrics TO 'out.csv'", "not COPY"),
        ("EXPLAIN ANALYZE /* x */ COPY metrics TO 'out.csv'", "not COPY"),
        ("ATTACH 'x.db'", "not ATTACH"),
        ("SET threads = 1", "not SET"),
        ("PRAGMA database_list", "not PRAGMA"),
        ("INSTALL httpfs", "not "),
        ("EXPORT DATABASE 'x'", "not "),
        ("SELECT 1; SELECT 2", "one statement; this has 2"),
        ("", "one statement; this has 0"),
        ("SELECT * FROM read_text('/etc/hostname')", "Permission Error"),
        ("SELECT * FROM '/etc/hostname'", "Error"),
        ("SELECT * FROM read_csv('{outside}')", "Permission Error"),
        ("SELECT * FROM glob('/etc/*')", "Permission Error"),
        ("SELEC 1", "Parser Error"),
        ("SELECT order FROM metrics", 'write the column as "order"'),
        ("SELECT no_such FROM metrics", "no_such"),
    ],
)
def test_anything_but_reading_the_store_is_refused(record, tmp_path, monkeypatch, query, says):
    store = record("quadratic", steps=2, seeds=[0]).store
    store.sql("SELECT 1")
    (tmp_path / "outside.csv").write_text("a\n1\n")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(QueryError) as caught:
        store.sql(query.format(outside=tmp_path / "outside.csv")).fetchall()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "query",
    [
        "FROM runs", "EXPLAIN (SELECT 1)", "EXPLAIN (FORMAT json) SELECT 1", "EXPLAIN ((SELECT 1))",
        "WITH a AS (SELECT 1 AS x) SELECT x FROM a", "EXPLAIN SELECT 1", "EXPLAIN ANALYZE SELECT 1", "SHOW TABLES",
        "DESCRIBE metrics", "SUMMARIZE metrics", "VALUES (1)", "SELECT 1;", "  SELECT 1 -- done",
    ],
)  # fmt: skip
def test_reading_is_allowed_in_all_its_forms(record, query):
    assert record("quadratic", steps=2, seeds=[0]).store.sql(query).fetchall()


def index_files(store: ts.Store) -> dict[str, int]:
    index = store.place.beside / "index"
    return {f.relative_to(index).as_posix(): f.stat().st_mtime_ns for f in index.rglob("*.parquet")}


def test_the_index_is_a_cache(record):
    store = record("quadratic", steps=20, seeds=[0, 1]).store
    query = 'SELECT "order", seed, sum(train_loss) FROM metrics GROUP BY ALL ORDER BY ALL'
    answer, files = store.sql(query).fetchall(), index_files(store)
    assert store.sql(query).fetchall() == answer
    assert index_files(store) == files  # nothing new, nothing written
    record(steps=3)
    assert store.sql("SELECT count(*) FROM experiments").fetchall() == [(2,)]
    after = index_files(store)
    assert all(after[name] == files[name] for name in files if name.startswith(("metrics", "segments")))
    of_quadratic = query.replace("GROUP", "WHERE experiment = 'quadratic' GROUP")
    shutil.rmtree(store.place.beside)
    assert store.sql(of_quadratic).fetchall() == answer


def test_a_store_that_cannot_be_written_is_indexed_in_the_users_cache(record, tmp_path, monkeypatch):
    store = record("quadratic", steps=5, seeds=[0]).store
    shutil.rmtree(store.place.beside)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = Path.mkdir

    def mkdir(self, *args, **kwargs):
        if self.is_relative_to(store.place.beside):
            raise OSError(30, "Read-only file system")
        real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert store.sql("SELECT count(*) FROM metrics").fetchall() == [(12,)]
    assert not store.place.beside.exists()
    assert list((tmp_path / "cache" / "trajstore").rglob("*.parquet"))


def test_an_empty_store_has_its_tables(tmp_path):
    ts.store.open_root(tmp_path / "s.zarr")
    store = ts.open(tmp_path / "s.zarr")
    for table in ("experiments", "runs", "metrics", "segments"):
        assert store.sql(f"SELECT * FROM {table}").fetchall() == []
    assert os.listdir(tmp_path / "s.zarr") == ["zarr.json"]  # noqa: PTH208


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ('SELECT CAST("order" AS INT) FROM metrics', "Conversion Error"),
        ("SELECT error('x')", "x"),
        ("SELECT now()", "cast it"),
    ],
)
def test_what_fails_only_while_rows_are_fetched_is_an_error_of_the_query_too(record, query, says):
    relation = record("quadratic", steps=2, seeds=[0]).store.sql(query)
    with pytest.raises(QueryError, match=says):
        rows_of(relation)


def test_a_relation_outlives_what_is_recorded_after_it(record):
    store = record("quadratic", steps=2, seeds=[0]).store
    before = store.sql("SELECT count(*) FROM metrics")
    record(steps=2)
    assert store.sql("SELECT count(*) FROM experiments").fetchall() == [(2,)]
    assert before.fetchall() == [(6,)]


def test_names_and_numbers_that_sql_could_trip_over(record):
    record("quadratic", steps=2, seeds=[2**62], problem={"rotation_seed": 2**62})
    store = record("quadratic", name="other", steps=2, problem={"rotation_seed": 1}).store
    assert store.sql("SELECT DISTINCT rotation_seed FROM runs ORDER BY 1").fetchall() == [(1,), (2**62,)]


def test_an_answer_is_written_as_parquet_with_its_types(record, tmp_path):
    record("quadratic", steps=3, seeds=[0], orders=["forward"])
    store = record(steps=3, seeds=[0], orders=["forward"], operator={"family": "sgd", "lr": 1e30}).store
    query = (
        "SELECT experiment, test_loss, [seed, 7] AS list, DATE '2020-02-29' AS date, 1.25::DECIMAL(9, 3) AS decimal, "
        "{'a': step} AS struct FROM metrics ORDER BY ALL -- the end"
    )
    file = tmp_path / "answer.parquet"
    assert write_answer(store, query, file) == 8
    asked, written = store.sql(query), duckdb.read_parquet(str(file))
    assert (written.columns, written.types) == (asked.columns, asked.types)
    assert repr(written.fetchall()) == repr(asked.fetchall())  # nan is nan only as text
    assert "nan" in repr(written.fetchall())
    assert "None" in repr(written.fetchall())
    with pytest.raises(ConflictError, match="--force"):
        write_answer(store, query, file)
    before = file.read_bytes()
    for wrong in ("SELECT error('x')", "SELECT 1; SELECT 2", "COPY metrics TO 'out.csv'", "SELEC 1"):
        with pytest.raises(QueryError):
            write_answer(store, wrong, file, force=True)
    assert file.read_bytes() == before
    assert write_answer(store, "SELECT 1 AS one", file, force=True) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answer.parquet", "runs.zarr", "runs.zarr.traj"]
