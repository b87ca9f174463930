"""SQL: right answers, nothing but reading, an index that is only a cache."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pytest
import scipy.stats
import torch
from trajstore.analysis import tail_variance
from trajstore.cli.demo import VERDICT

import trajstore as ts
from trajstore import analysis
from trajstore.errors import ConflictError, QueryError
from trajstore.sql import definitions_file, rows_of, write_answer


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
    write_answer(store, query, file)
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
    write_answer(store, "SELECT 1 AS one", file, force=True)
    assert duckdb.read_parquet(str(file)).fetchall() == [(1,)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answer.parquet", "runs.zarr", "runs.zarr.traj"]


# What the macros say of a slab, against NumPy and the analysis on the same numbers.


def loops(tmp_path, *curves, first=0):
    """A store with the experiment `loop`: a seed a curve, whose values are those of the metric `m` from step 1 on."""
    for seed, curve in enumerate(curves, start=first):
        with ts.record(tmp_path / "s.zarr", "loop", torch.nn.Linear(1, 1), seed=seed, durability="none") as rec:
            for step, value in curve.items():
                rec.step(step, **({} if value is None else {"m": float(value)}))
    return ts.open(tmp_path / "s.zarr")


def noisy(level, steps=60, seed=0):
    noise = np.random.default_rng(seed).normal(size=steps)
    return dict(enumerate(level + 3 * np.arange(steps) + noise, start=1))


@pytest.mark.parametrize("level", [0.0, -1e8])
def test_macros_agree_with_the_analysis(tmp_path, level):
    store = loops(tmp_path, noisy(level), noisy(level, seed=1))
    ds = store["loop"].dataset()
    for estimator in (analysis.level_variance, analysis.tail_variance, analysis.step_variance):
        expected = estimator(ds, "m", 20).sel(order="forward")
        query = f"SELECT seed, from_step, to_step, variance, why FROM {estimator.__name__}('loop', 'm', steps := 20)"
        rows = store.sql(f"{query} ORDER BY seed").fetchall()
        assert [row[:3] + row[4:] for row in rows] == [(0, 41, 60, None), (1, 41, 60, None)]
        assert [row[3] for row in rows] == pytest.approx(expected.values, rel=1e-11)


@pytest.mark.parametrize("level", [0.0, -1e8])
def test_rolling_variance_is_that_of_every_window(tmp_path, level):
    curve = noisy(level)
    store = loops(tmp_path, curve)
    rows = store.sql("SELECT step, variance, why FROM rolling_variance('loop', 'm', steps := 20) ORDER BY step")
    steps, variances, whys = zip(*rows.fetchall(), strict=True)
    assert steps == tuple(range(61))
    assert variances[:20] == (None,) * 20
    assert whys[18:21] == ("19 steps are recorded up to here, fewer than 20", "not measured at 1 of the steps", None)
    windows = np.lib.stride_tricks.sliding_window_view(np.array(list(curve.values())), 20)
    assert variances[20:] == pytest.approx(windows.var(axis=1, ddof=1), rel=1e-7 if level else 1e-12)


def test_convergence_in_sql_is_what_least_squares_say(tmp_path):
    curve = noisy(1e3)
    columns = "last, diameter, moved_before, moved, slope, slope_t, why"
    row = loops(tmp_path, curve).sql(f"SELECT {columns} FROM convergence('loop', 'm', steps := 20)").fetchall()[0]
    values = np.array(list(curve.values()))
    before, tail = values[-40:-20], values[-20:]
    line = scipy.stats.linregress(np.arange(20), tail)
    moved = [np.abs(np.diff(part)).mean() for part in (before, tail)]
    assert row[:-1] == pytest.approx((tail[-1], np.ptp(tail), *moved, line.slope, line.slope / line.stderr), rel=1e-10)
    assert row[-1] is None


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({55: None}, "not measured at step 55"),
        (dict.fromkeys(range(41, 61)), "not measured from step 41 to 60"),
        ({57: np.nan}, "not finite, or too large to square, at step 57"),
        ({57: np.inf, 58: np.nan}, "not finite, or too large to square, at step 57"),
        ({57: 1e200}, "not finite, or too large to square, at step 57"),
    ],
)
def test_a_slab_without_a_number_says_why_and_others_have_theirs(tmp_path, changed, why):
    store = loops(tmp_path, noisy(0), noisy(0) | changed)
    for macro in ("level_variance", "tail_variance", "step_variance"):
        rows = store.sql(f"SELECT variance IS NULL, why FROM {macro}('loop', 'm', 20) ORDER BY seed").fetchall()
        assert rows == [(False, None), (True, why)]
    rows = store.sql("SELECT COLUMNS(* EXCLUDE ('order', seed)) FROM convergence('loop', 'm', 20) ORDER BY seed")
    sound, other = rows.fetchall()
    assert None not in sound[:-1]
    assert other == (41, 60, None, None, None, None, None, None, why)
    rolled = store.sql("SELECT variance FROM rolling_variance('loop', 'm', 20) WHERE seed = 1 AND step = 60").fetchall()
    assert rolled == [(None,)]


def test_a_slab_that_lags_behind_and_a_window_that_is_too_long_have_no_number(tmp_path):
    lagging = {step: value for step, value in noisy(0).items() if step <= 50}
    store = loops(tmp_path, noisy(0), lagging)
    rows = store.sql("SELECT why FROM tail_variance('loop', 'm', 20) ORDER BY seed").fetchall()
    assert rows == [(None,), ("only 10 of the 20 steps from 41 to 60 are recorded; finish the recording",)]
    rows = store.sql("SELECT DISTINCT variance, why FROM tail_variance('loop', 'm')").fetchall()
    assert rows == [(None, "61 steps are recorded, fewer than 100")]
    ((slope, moved_before, why),) = store.sql(
        "SELECT slope IS NULL, moved_before, why FROM convergence('loop', 'm', 40) WHERE seed = 0"
    ).fetchall()
    assert (slope, moved_before) == (False, None)
    assert why == "moved_before: not all of the 40 steps before step 21 have a finite value"


def test_an_adaptive_grid_has_no_variance_in_sql_either(record):
    grid = {"adaptive": "test_loss", "tolerance": 0.03}
    store = record(steps=60, record=grid, seeds=[0], orders=["forward"]).store
    steps = [n for (n,) in store.sql("SELECT step FROM metrics ORDER BY step").fetchall()]
    assert len(set(np.diff(steps))) > 1
    query = f"SELECT variance, why FROM tail_variance('net', 'test_loss', {len(steps)})"
    ((variance, why),) = store.sql(query).fetchall()
    assert variance is None
    assert why.startswith("the grid is adaptive")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("'lop', 'm'", "no experiment 'lop'; did you mean 'loop'?"),
        ("'zzz', 'm'", "no experiment 'zzz'; there is loop"),
        ("'loop', 'parm_norm'", "experiment 'loop' has no metric 'parm_norm'; did you mean 'param_norm'?"),
        ("'loop', 'train_loss'", "experiment 'loop' has no metric 'train_loss'; "),  # others have it
        ("'loop', 'm', steps := 1", "steps is 1; at least "),
        ("'loop', 'm', steps := NULL", "steps is NULL; at least "),
        ("NULL, 'm'", "no experiment 'NULL'; "),
        ("'loop', NULL", "no metric 'NULL'"),
        ("(SELECT content FROM read_text('/etc/hostname')), 'm'", "Permission Error"),
    ],
)
@pytest.mark.parametrize("macro", ["tail_variance", "rolling_variance", "convergence"])
def test_what_no_slab_can_answer_is_one_line(tmp_path, record, macro, asked, says):
    store = loops(tmp_path, {1: 1.0})
    if "train_loss" in asked:
        ts.run(ts.Experiment.preset("quadratic", {"steps": 2, "seeds": [0]}), tmp_path / "s.zarr")
    with pytest.raises(QueryError) as caught:
        rows_of(store.sql(f"SELECT count(*) FROM {macro}({asked})"))
    assert says in str(caught.value)
    assert "Invalid Input" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_segments_are_the_commit_records(record):
    experiment = record("quadratic", steps=20, seeds=[3])
    records, schema = experiment.commits().records, experiment.schema
    rows = experiment.store.sql("SELECT * FROM segments ORDER BY ALL").fetchall()
    expected = [
        ("quadratic", order, 3, n, *(lambda first, end: (first, end - 1))(*schema.steps_of(n)), *records[i, 0, n, :2],
         records[i, 0, n, 2:].astype("<i8").tobytes().hex())
        for i, order in enumerate(schema.orders) for n in range(schema.segments)
    ]  # fmt: skip
    assert rows == sorted(expected)


def test_a_plain_duckdb_has_the_same_views_and_macros(tmp_path, record):
    store = loops(tmp_path, noisy(0))
    file = definitions_file(store)
    plain = duckdb.connect()
    plain.execute(file.read_text())
    tables, queries = ("experiments", "runs", "metrics", "segments"), ["FROM tail_variance('loop', 'm', steps := 20)"]
    for query in [*(f"FROM {table}" for table in tables), *queries]:
        assert repr(plain.sql(query).fetchall()) == repr(store.sql(query).fetchall())
    loops(tmp_path, noisy(1), first=1)  # who holds it open is not disturbed
    assert store.sql("SELECT count(*) FROM runs").fetchall() == [(2,)]
    assert plain.sql("SELECT DISTINCT seed FROM metrics").fetchall() == [(0,)]
    plain.execute(definitions_file(store).read_text())
    assert plain.sql("SELECT count(*) FROM runs").fetchall() == [(2,)]


def test_small_files_are_merged_and_say_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("trajstore.sql.index._SMALL_FILES", 3)
    query = "SELECT seed, step, m, param_norm FROM metrics ORDER BY ALL"
    curves, counts = [], []
    for seed in range(6):
        curves.append(noisy(0, steps=5, seed=seed) | {3: np.nan, 4: None})
        store = loops(tmp_path, curves[-1], first=seed)
        rows = store.sql(query).fetchall()
        counts.append(len(json.loads((store.place.beside / "index" / "catalog.json").read_text())["slabs"]))
        assert [m for s, step, m, _ in rows if s == seed and step in (1, 2, 5)] == [curves[-1][n] for n in (1, 2, 5)]
        assert all(np.isnan(m) if step == 3 else m is None for _, step, m, _ in rows if step in (0, 3, 4))
    assert counts == [1, 2, 3, 4, 5, 6]
    shutil.rmtree(store.place.beside)
    assert repr(ts.open(tmp_path / "s.zarr").sql(query).fetchall()) == repr(rows)


def test_a_catalog_that_makes_no_sense_is_written_anew(record):
    store = record("quadratic", steps=4, seeds=[0]).store
    answer = store.sql("FROM runs").fetchall()
    for content in ("", "{", "[]", '{"version": 2, "slabs": [[1]], "tables": {}}'):
        (store.place.beside / "index" / "catalog.json").write_text(content)
        assert store.sql("FROM runs").fetchall() == answer


@pytest.mark.parametrize("table", ["experiments", "runs", "metrics", "segments"])
def test_a_damaged_file_of_the_index_is_written_anew(record, table):
    store = record("quadratic", steps=4, seeds=[0]).store
    answer = repr(store.sql(f"FROM {table} ORDER BY ALL").fetchall())
    (file,) = (store.place.beside / "index" / table).glob("*.parquet")
    file.write_bytes(b"")
    assert repr(store.sql(f"FROM {table} ORDER BY ALL").fetchall()) == answer


def test_data_frames_are_asked_beside_the_stores_tables(record):
    import pandas as pd

    store = ts.open(record("quadratic", steps=5, seeds=[0, 1]).store.place)
    frame = pd.DataFrame({"seed": [0, 1], "mine": [10.0, 20.0]})
    query = "SELECT DISTINCT seed, mine FROM metrics JOIN theirs USING (seed) ORDER BY ALL"
    assert store.sql(query, theirs=frame).fetchall() == [(0, 10.0), (1, 20.0)]
    with pytest.raises(QueryError, match="theirs"):
        store.sql(query)
