"""SQL: right answers, nothing but reading, an index that is only a cache."""

from __future__ import annotations

import os
import re
import shutil
import stat
from datetime import UTC, datetime
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
from trajstore.errors import ConflictError, QueryError, StatisticError
from trajstore.reading.handles import open_root
from trajstore.reading.sql import definitions_file, rows_of, write_answer
from trajstore.reading.sql.catalog import Catalog
from trajstore.reading.sql.index import refresh
from trajstore.reading.sql.query import _confined
from trajstore.reading.sql.reading import reading, reads


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


# What may be asked: whatever only reads, and nothing else.

SELECTS = {
    "SELECT": "SELECT 1", "EXPLAIN": "EXPLAIN SELECT 1",
}  # fmt: skip
REFUSED = {
    "INSERT": "INSERT INTO metrics SELECT * FROM metrics",
    "UPDATE": "UPDATE metrics SET step = 0",
    "DELETE": "DELETE FROM metrics",
    "MERGE_INTO": "MERGE INTO metrics USING runs ON (true) WHEN MATCHED THEN DELETE",
    "CREATE": "CREATE TABLE t (x INT)",
    "ALTER": "ALTER VIEW metrics RENAME TO others",
    "DROP": "DROP VIEW metrics",
    "PREPARE": "PREPARE p AS SELECT 1",
    "EXECUTE": "EXECUTE p",
    "TRANSACTION": "BEGIN",
    "COPY": "COPY metrics TO '{inside}'",
    "COPY_DATABASE": "COPY FROM DATABASE memory TO other (SCHEMA)",
    "VACUUM": "VACUUM",
    "EXPORT": "EXPORT DATABASE '{folder}'",
    "PRAGMA": "PRAGMA database_list",
    "CALL": "CALL pragma_version()",
    "SET": "SET threads = 1",
    "LOAD": "INSTALL httpfs",
    "ATTACH": "ATTACH '{inside}' AS other",
    "DETACH": "DETACH memory",
    "MULTI": "PIVOT metrics ON step USING sum(leg)",
}
NOT_IN_SQL = {"INVALID", "ANALYZE", "RELATION", "LOGICAL_PLAN", "EXTENSION", "VARIABLE_SET", "CREATE_FUNC"}
"""What no text is parsed as: DuckDB has these types for itself, or only names them."""


def test_every_type_of_statement_is_known_here():
    known = {*SELECTS, *REFUSED, *NOT_IN_SQL}
    assert known == set(duckdb.StatementType.__members__)
    assert {name for name, kind in duckdb.StatementType.__members__.items() if reads(kind)} == set(SELECTS)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A store that is only asked, and whatever could be written if something could."""
    folder = tmp_path_factory.mktemp("asked")
    experiment = ts.Experiment.preset("quadratic", {"steps": 2, "seeds": [0]})
    store = ts.run(experiment, folder / "runs.zarr").store
    store.sql("SELECT 1")
    (folder / "outside.csv").write_text("a\n1\n")
    return store


@pytest.fixture(scope="module")
def connection(asked):
    """The connection that a query of this store gets."""
    return _confined(refresh(asked), ())


def refused(store, query, monkeypatch):
    """Return why a query is refused, and see that nothing came of it."""
    folder = store.place.beside.parent
    index = store.place.beside / "index"
    (inside,) = (index / "metrics").glob("*.parquet")
    names = {"folder": index, "inside": inside, "outside": folder / "outside.csv"}
    monkeypatch.chdir(folder)
    before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in folder.rglob("*")}
    with pytest.raises(QueryError) as caught:
        rows_of(store.sql(query.format(**names)))
    assert "\n" not in str(caught.value)
    assert {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in folder.rglob("*")} == before
    return str(caught.value)


ASKED_AS = ["{0}", "{0};", "/* x */ {0}", "-- é\n{0}", "EXPLAIN {0}", "explain analyze {0}", "EXPLAIN (ANALYZE) {0}",
            "EXPLAIN (FORMAT json) {0}", "/* é */ EXPLAIN ANALYZE /* SELECT 1 */ {0}", "-- x\nEXPLAIN -- x\n{0}",
            "SELECT 1; {0}", "{0}; SELECT 1", "EXPLAIN SELECT 1; {0}"]  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_no_statement_but_a_select_is_asked_in_whatever_way(asked, connection, monkeypatch, kind):
    assert [s.type.name for s in duckdb.extract_statements(REFUSED[kind].format(inside="x", folder="x"))] == [kind]
    assert refused(asked, REFUSED[kind], monkeypatch).startswith(("only SELECT", "PIVOT takes"))
    for form in ASKED_AS:
        with pytest.raises((QueryError, duckdb.ParserException)) as caught:
            reading(connection, form.format(REFUSED[kind]))
        assert re.search("only SELECT|one statement|PIVOT takes|syntax error", str(caught.value))


@pytest.mark.parametrize("form", ASKED_AS[:-3])
def test_a_select_is_asked_in_whatever_way(connection, form):
    for query in ("SELECT 'é', 1", "FROM metrics", "WITH a AS (FROM runs) FROM a"):
        assert connection.sql(reading(connection, form.format(query))).fetchall()


@pytest.mark.parametrize(
    ("query", "says"),
    [
        # What is a SELECT for the parser, and writes.
        ("WITH a AS (COPY metrics TO '{inside}') FROM a", "not COPY"),
        ("EXPLAIN ANALYZE WITH a AS (COPY metrics TO '{inside}') FROM a", "not COPY"),
        ("EXPLAIN ANALYZE (WITH a AS (COPY metrics TO '{inside}') FROM a)", "not COPY"),
        ("FROM (WITH a AS (COPY metrics TO '{inside}') FROM a)", "not COPY"),
        ("SELECT (WITH a AS (COPY metrics TO '{inside}') SELECT count(*) FROM a)", "not COPY"),
        ("WITH a AS (INSERT INTO metrics VALUES (1) RETURNING *) FROM a", "not INSERT"),
        ("WITH a AS (UPDATE metrics SET step = 0 RETURNING *) FROM a", "not UPDATE"),
        ("WITH a AS (DELETE FROM metrics RETURNING *) FROM a", "not DELETE"),
        ("FROM query('WITH a AS (COPY metrics TO ''{inside}'') FROM a')", "'query' cannot be used"),
        ("FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))", "cannot be used"),
        # Memory at an address, settings, extensions.
        ("FROM pandas_scan(1)", "cannot be used"),
        ("FROM system.main.pandas_scan(1::UBIGINT)", "cannot be used"),
        ("FROM arrow_scan(1, 1, 1)", "cannot be used"),
        ("FROM enable_logging()", "cannot be used"),
        ("FROM enable_profiling(save_location := '{outside}')", "cannot be used"),
        ("FROM checkpoint()", "cannot be used"),
        ("FROM duckdb_secrets()", "cannot be used"),
        ("CREATE SECRET (TYPE s3)", "not CREATE"),
        ("CREATE OR REPLACE MACRO tail_variance(a) AS TABLE SELECT 1", "not CREATE"),
        ("CREATE OR REPLACE TEMP VIEW metrics AS SELECT 1", "not CREATE"),
        ("UPDATE EXTENSIONS", "only SELECT"),
        ("LOAD httpfs", "not LOAD"),
        ("RESET lock_configuration", "not SET"),
        ("USE memory", "not SET"),
        # Files, by functions and by names.
        *(("FROM " + function + "('{outside}')", "cannot be used") for function in (
            "read_csv", "READ_CSV", "read_csv_auto", "read_text", "read_blob", "read_json", "read_parquet", "sniff_csv",
            "parquet_metadata", "glob", "read_duckdb", "main.read_text",
        )),
        ("FROM read_text('{inside}')", "cannot be used"),
        ("SELECT * FROM runs WHERE seed IN (SELECT size FROM read_text('{outside}'))", "cannot be used"),
        ("DESCRIBE FROM read_csv('{outside}')", "cannot be used"),
        ("FROM (PIVOT (FROM read_csv('{outside}')) ON a IN (1) USING sum(a))", "cannot be used"),
        ("FROM '{outside}'", "Permission Error"),
        ('FROM "{outside}"', "Permission Error"),
        ("DESCRIBE '{outside}'", "Permission Error"),
        ("SUMMARIZE '{outside}'", "Permission Error"),
        ("FROM '{folder}/../../outside.csv'", "Permission Error"),
        ("FROM '/proc/self/environ.csv'", "Permission Error"),
        ("FROM 's3://bucket/file.parquet'", "Permission Error"),
        ("FROM 'https://example.com/file.csv'", "Permission Error"),
        ("FROM 'file:{outside}'", "Error"),
        # What is not there.
        ("SELECT getenv('HOME')", "getenv"),
        ("FROM store", "store"),  # a variable of this program
        ("SELECT no_such FROM metrics", "no_such"),
        ("SELECT order FROM metrics", 'write the column as "order"'),
        ("SELEC 1", "Parser Error"),
        ("SELECT $1", "parameters"),
        ("EXPLAIN", "Parser Error"),
        ("EXPLAIN EXPLAIN SELECT 1", "Parser Error"),
        ("", "one statement; this has 0"),
        ("-- nothing", "one statement; this has 0"),
        ("SELECT " + "(" * 100_000 + "1" + ")" * 100_000, "nested more than 500 deep"),
        ("FROM " + "(FROM " * 100_000 + "runs" + ")" * 100_000, "nested more than 500 deep"),
        ("SELECT " + " + ".join(["1"] * 100_000), "expression depth"),
    ],
)  # fmt: skip
def test_what_does_more_than_read_the_store_is_refused(asked, monkeypatch, query, says):
    assert says in refused(asked, query, monkeypatch)


def test_table_functions_that_are_not_known_to_read_are_refused(connection):
    own = {"pandas_scan", "read_text", "query", "seq_scan", "enable_logging"}
    every = {name for (name,) in connection.sql(
        "SELECT DISTINCT function_name FROM duckdb_functions() WHERE function_type IN ('table', 'table_macro')"
    ).fetchall()}  # fmt: skip
    assert own < every
    answered = set()
    for name in every:
        try:
            reading(connection, f"FROM {name}()")
        except QueryError as error:
            if "cannot be used here" in str(error):
                continue
        answered.add(name)
    macros = {name for name in answered if name.startswith("_") or name.endswith("variance") or name == "convergence"}
    assert answered - macros <= {
        "range", "generate_series", "unnest", "repeat", "repeat_row", "histogram", "histogram_values", "summary",
        "json_each", "json_tree", "duckdb_columns", "duckdb_databases", "duckdb_functions", "duckdb_keywords",
        "duckdb_schemas", "duckdb_settings", "duckdb_tables", "duckdb_types", "duckdb_views", "pragma_platform",
        "pragma_show", "pragma_table_info", "pragma_version", "pg_timezone_names",
    }  # fmt: skip


def test_the_settings_confine_by_themselves(asked, connection):
    """Whoever gets past the parser still reads the index alone, and cannot change that."""
    outside = asked.place.beside.parent / "outside.csv"
    for query in (
        f"FROM read_csv('{outside}')", f"COPY runs TO '{outside}'", f"ATTACH '{outside}' AS other", "FROM glob('/*')",
        "SET enable_external_access = true", "SET lock_configuration = false", "RESET allowed_directories",
        "INSTALL httpfs", "LOAD httpfs", "SET autoload_known_extensions = true", "FROM asked", "FROM outside",
        f"FROM enable_profiling(save_location := '{outside}')", "FROM enable_logging()",
        "CREATE PERSISTENT SECRET s (TYPE http)", "SET python_enable_replacements = true",
    ):  # fmt: skip
        with pytest.raises(duckdb.Error):
            connection.sql(query)
    assert outside.read_text() == "a\n1\n"


@pytest.mark.parametrize(
    "query",
    [
        "FROM runs", "EXPLAIN (SELECT 1)", "EXPLAIN ((SELECT 1))", "VALUES (1)", "TABLE runs", "SHOW TABLES",
        "DESCRIBE metrics", "DESCRIBE SELECT 1", "SUMMARIZE metrics", "SHOW runs", "FROM (DESCRIBE runs)",
        "WITH a AS (SELECT 1 AS x) SELECT x FROM a", "WITH a AS MATERIALIZED (FROM runs) FROM a JOIN a b USING (seed)",
        "WITH RECURSIVE a AS (SELECT 1 x UNION ALL SELECT x + 1 FROM a WHERE x < 3) FROM a",
        "PIVOT runs ON seed IN (0, 1) USING sum(last_step)", "UNPIVOT runs ON seed, last_step",
        "FROM runs UNION BY NAME SELECT 3 AS seed ORDER BY ALL DESC NULLS LAST LIMIT 3 OFFSET 1",
        "SELECT DISTINCT ON (seed) seed::DECIMAL(9, 3), {'type': 'COPY_NODE'} FROM runs, LATERAL (SELECT 1) LIMIT 100%",
        "SELECT sum(step) OVER w FROM metrics WINDOW w AS (ORDER BY step) QUALIFY row_number() OVER w = 1",
        "SELECT list_transform([1], lambda x: x + 1), [1, 2]::INT[2], 'a'::ENUM ('a'), x'00', INTERVAL 1 DAY",
        "FROM runs ASOF JOIN runs r ON runs.seed >= r.seed", "FROM metrics USING SAMPLE 2", "FROM range(3)",
        "SELECT unnest([1, 2])", "FROM histogram(metrics, step)", "FROM tail_variance('quadratic', 'train_loss', 3)",
        "FROM duckdb_columns()", "SELECT seed FROM runs GROUP BY CUBE (seed)", "SELECT 1 IN (SELECT seed FROM runs) a",
    ],
)  # fmt: skip
def test_reading_is_allowed_in_all_its_forms(connection, query):
    assert rows_of(connection.sql(reading(connection, query)))


@pytest.mark.parametrize("form", [[], ["--json"], ["--csv"], ["--parquet", "{out}"]])
@pytest.mark.parametrize("query", ["WITH a AS (COPY runs TO '{out}') FROM a", "FROM read_text('/etc/hostname')"])
def test_no_form_of_an_answer_lets_a_query_do_more(asked, trajstore, tmp_path, form, query):
    names = {"out": tmp_path / "out"}
    code, _, told = trajstore("sql", str(asked), *(part.format(**names) for part in (query, *form)))
    assert code != 0
    assert "cannot be used here" in told or "only SELECT" in told
    assert list(tmp_path.iterdir()) == []


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
    open_root(tmp_path / "s.zarr")
    store = ts.open(tmp_path / "s.zarr")
    for table in ("experiments", "runs", "metrics", "segments"):
        assert store.sql(f"SELECT * FROM {table}").fetchall() == []
    assert os.listdir(tmp_path / "s.zarr") == ["zarr.json"]  # noqa: PTH208


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ('SELECT CAST("order" AS INT) FROM metrics', "Conversion Error"),
        ("SELECT error('x')", "x"),
    ],
)
def test_what_fails_only_while_rows_are_fetched_is_an_error_of_the_query_too(record, query, says):
    relation = record("quadratic", steps=2, seeds=[0]).store.sql(query)
    with pytest.raises(QueryError, match=says):
        rows_of(relation)


def test_times_with_a_zone_are_text(asked):
    ((told, one, again),) = rows_of(asked.sql("SELECT TIMESTAMPTZ '2020-02-29 12:00:00+00', 1 AS a, 2 AS a"))
    assert (datetime.fromisoformat(told), one, again) == (datetime(2020, 2, 29, 12, tzinfo=UTC), 1, 2)


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


# One name, one meaning: every macro against its function on recordings of all kinds of grids.

GRIDS = {
    "even": {"steps": 45},
    "sparse": {"steps": 120, "record": {"every": 3}},
    "off its grid at the end": {"steps": 134, "record": {"every": 3}},
    "uneven at the end": {"steps": 60, "record": {"steps": [*range(50), 52, 57, 60]}},
    "uneven at the beginning": {"steps": 200, "record": {"steps": [*range(20), *range(20, 201, 4)]}},
    "adaptive": {"steps": 80, "record": {"adaptive": "train_loss", "tolerance": 1e-5}},
}
WINDOW = 15


def by_slab(store, macro, metric, columns, window=WINDOW):
    rows = store.sql(f"SELECT \"order\", seed, {columns} FROM {macro}('{store_name(store)}', '{metric}', {window})")
    return {(order, seed): rest for order, seed, *rest in rows.fetchall()}


def store_name(store):
    (name,) = store
    return name


@pytest.mark.parametrize("grid", GRIDS)
def test_every_macro_says_what_its_function_says(record, grid):
    experiment = record("quadratic", seeds=[0, 1], **GRIDS[grid])
    agrees(experiment.store, experiment.dataset().load(), "train_loss")


@pytest.mark.parametrize("level", [0.0, -1e8])
def test_macros_agree_where_a_metric_is_measured_now_and_then(tmp_path, level):
    seldom = {step: value if step % 3 == 0 else None for step, value in noisy(level).items()}
    store = loops(tmp_path, seldom, {step: value for step, value in noisy(level, seed=1).items() if step % 3 == 0})
    agrees(store, store["loop"].dataset().load(), "m", rel=1e-6 if level else 1e-9)


def test_macros_agree_on_what_rests(tmp_path):
    store = loops(tmp_path, dict.fromkeys(range(1, 41), 0.1), {n: 0.1 + 1e-17 * n for n in range(1, 41)})
    agrees(store, store["loop"].dataset().load(), "m")
    rolled = store.sql(f"SELECT DISTINCT variance FROM rolling_variance('loop', 'm', {WINDOW}) WHERE why IS NULL")
    assert rolled.fetchall() == [(0.0,)]


def agrees(store, ds, metric, rel=1e-9):
    """Every number of SQL is that of Python; where Python refuses, SQL has none, and says why."""
    for estimator in (analysis.level_variance, analysis.tail_variance, analysis.step_variance):
        told = by_slab(store, estimator.__name__, metric, "variance, from_step, to_step, why")
        assert set(told) == {(str(o), int(k)) for o in ds["order"].values for k in ds["seed"].values}
        try:
            expected = estimator(ds, metric, WINDOW)
        except StatisticError:  # of a slab that has all steps SQL tells what Python tells of this slab alone
            for (order, seed), (variance, first, last, why) in told.items():
                assert (variance is None) == (why is not None)
                if variance is not None:
                    alone = estimator(ds.sel(order=[order], seed=[seed]), metric, WINDOW)
                    assert (first, last) == (alone.attrs["from_step"], alone.attrs["to_step"])
                    assert variance == pytest.approx(alone.item(), rel=rel, abs=0)
            continue
        for (order, seed), (variance, first, last, why) in told.items():
            assert (first, last, why) == (expected.attrs["from_step"], expected.attrs["to_step"], None)
            assert variance == pytest.approx(float(expected.sel(order=order, seed=seed)), rel=rel, abs=0)
    told = by_slab(store, "convergence", metric, "diameter, last, moved, slope, why", 40)
    for (order, seed), (diameter, last, moved, slope, why) in told.items():
        if diameter is None:
            assert why
            with pytest.raises(StatisticError):
                analysis.convergence(ds, metric, 40)
            continue
        alone = ds.sel(order=[order], seed=[seed])
        seen = analysis.windows.window_of(alone, metric, 40)
        (series,) = seen.values[0]
        assert diameter == pytest.approx(analysis.convergence(alone, metric, 40)["diameter"].item(), rel=rel)
        assert (last, moved) == (series[-1], pytest.approx(np.abs(np.diff(series)).mean(), rel=rel))
        assert slope == pytest.approx(scipy.stats.linregress(seen.steps, series).slope, rel=1e-6, abs=1e-300)
    rolled = f"rolling_variance('{store_name(store)}', '{metric}', {WINDOW})"
    rows = store.sql(f'SELECT "order", seed, step, variance, why FROM {rolled}').fetchall()
    assert sum(variance is not None for _, _, _, variance, _ in rows) > 0
    for order, seed, step, variance, why in rows:
        assert (variance is None) == (why is not None)
        try:
            there = analysis.tail_variance(ds.sel(order=[order], seed=[seed], step=slice(None, step)), metric, WINDOW)
            expected = there.item() if there.attrs["to_step"] == step else None
        except StatisticError:
            expected = None
        if variance is None and expected is not None:  # too few digits, or other slabs have steps that this one lacks
            assert why.startswith(("a line leaves less", "this last step", "steps before this one are missing"))
        else:
            assert variance == (None if expected is None else pytest.approx(expected, rel=rel, abs=0))


def test_a_descent_far_larger_than_what_is_left_of_it_has_no_digits_and_no_number(tmp_path):
    rng = np.random.default_rng(0)
    store = loops(tmp_path, {n: 1e6 * n + 1e-3 * rng.normal() for n in range(1, 41)})
    rows = store.sql("SELECT variance, why FROM rolling_variance('loop', 'm', 20) WHERE step >= 20").fetchall()
    assert all(variance is None and why.startswith("a line leaves less than 1e-10") for variance, why in rows)
    ((variance, why),) = store.sql("SELECT variance, why FROM tail_variance('loop', 'm', 20)").fetchall()
    expected = float(analysis.tail_variance(store["loop"].dataset(), "m", 20).sel(order="forward", seed=0))
    assert (variance, why) == (pytest.approx(expected, rel=1e-2), None)


def test_moves_before_the_window_are_compared_only_at_the_same_distances(record):
    store = record("quadratic", seeds=[0], **GRIDS["uneven at the beginning"]).store
    told = by_slab(store, "convergence", "train_loss", "moved, moved_before, why", 30)
    for moved, before, why in told.values():
        assert (moved is not None, before) == (True, None)
        assert why == "moved_before: the 30 steps before step 84 are recorded at other distances"


@pytest.mark.parametrize("level", [0.0, -1e8])
def test_rolling_variance_is_that_of_every_window(tmp_path, level):
    curve = noisy(level)
    store = loops(tmp_path, curve)
    rows = store.sql("SELECT step, variance, why FROM rolling_variance('loop', 'm', steps := 20) ORDER BY step")
    steps, variances, whys = zip(*rows.fetchall(), strict=True)
    assert steps == tuple(range(61))
    assert variances[:20] == (None,) * 20
    assert whys[0] == "not measured at this step"
    assert whys[19:21] == ("measured at 19 steps up to here, fewer than 20", None)
    rolled = analysis.rolling_variance(store["loop"].dataset(), "m", 20).sel(order="forward", seed=0).values[19:]
    assert variances[20:] == pytest.approx(rolled, rel=1e-7 if level else 1e-12)
    windows = np.lib.stride_tricks.sliding_window_view(np.array(list(curve.values())), 20)
    residuals = [np.polyfit(np.arange(20), w - w.mean(), 1, full=True)[1][0] / 18 for w in windows]
    assert variances[20:] == pytest.approx(residuals, rel=1e-7 if level else 1e-9)


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
    assert rows == [(None, "measured at 60 steps, fewer than 100")]
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
    assert "uneven distances where test_loss changes most" in why


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
        ("(SELECT content FROM read_text('/etc/hostname')), 'm'", "cannot be used here"),
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
    monkeypatch.setattr("trajstore.reading.sql.index._SMALL_FILES", 3)
    query = "SELECT seed, step, m, param_norm FROM metrics ORDER BY ALL"
    curves, counts = [], []
    for seed in range(6):
        curves.append(noisy(0, steps=5, seed=seed) | {3: np.nan, 4: None})
        store = loops(tmp_path, curves[-1], first=seed)
        rows = store.sql(query).fetchall()
        counts.append(len(Catalog.of(store.place.beside / "index").slabs))
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


@pytest.mark.parametrize("table", ["experiments", "runs", "metrics", "segments", "catalog"])
def test_a_link_in_an_index_that_came_with_a_store_is_followed_nowhere(record, tmp_path, table):
    store = record("quadratic", steps=4, seeds=[0]).store
    query = "SELECT * FROM metrics, runs, experiments, segments ORDER BY ALL"
    answer, index = repr(store.sql(query).fetchall()), store.place.beside / "index"
    (file,) = [index / "catalog.json"] if table == "catalog" else (index / table).glob("*.parquet")
    outside = shutil.move(file, tmp_path / "outside")
    os.utime(outside, (1, 1))
    before = (outside.stat(), outside.read_bytes())
    for extra in (file, index / "metrics" / "other.parquet"):
        extra.symlink_to(outside)
    assert repr(store.sql(query).fetchall()) == answer
    assert not file.exists() or stat.S_ISREG(file.lstat().st_mode)
    assert (outside.stat().st_mtime, outside.read_bytes()) == (before[0].st_mtime, before[1])


def test_data_frames_are_asked_beside_the_stores_tables(record):
    import pandas as pd

    store = ts.open(record("quadratic", steps=5, seeds=[0, 1]).store.place)
    frame = pd.DataFrame({"seed": [0, 1], "mine": [10.0, 20.0]})
    query = "SELECT DISTINCT seed, mine FROM metrics JOIN theirs USING (seed) ORDER BY ALL"
    assert store.sql(query, theirs=frame).fetchall() == [(0, 10.0), (1, 20.0)]
    with pytest.raises(QueryError, match="theirs"):
        store.sql(query)
