"""Claims hold where theory says so, do not hold once the orders are exchanged, and say what they lack elsewhere."""

from __future__ import annotations

import json

import numpy as np
import pytest
from trajstore.analysis import claims
from trajstore.analysis.examining import CLAIMS, examine
from trajstore.analysis.examining.finding import by_interval
from trajstore.analysis.examining.maps import loss_contracts

import trajstore as ts
from tests.conftest import forget
from tests.tools.calibration import LOSSES, loss_factors
from trajstore.errors import NotFoundError

ORDERS = ["forward", "backward", "backward+backward@200", "backward/40"]
ROWS = {"name": "rows", "problem": {"family": "least-squares", "n": 30, "d": 4, "ridge": 0.5}, "seeds": [0, 1],
        "operator": {"family": "sgd", "lr": 0.05}, "steps": 400, "orders": ["forward", "backward"]}  # fmt: skip
WIDE = {"name": "wide", "problem": {"family": "quadratic", "spectrum": [1.0, 30.0]}, "steps": 20,
        "operator": {"family": "sgd", "lr": 0.1}, "orders": ["forward"], "seeds": [0]}  # fmt: skip
NEAR = {**ROWS, "name": "near", "operator": {"family": "sgd", "lr": 0.001}, "steps": 30,
        "orders": ["forward", "backward", "bracket"]}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    place = tmp_path_factory.mktemp("claims") / "s.zarr"
    many = {"name": "many", "steps": 30, "seeds": list(range(100)), "init_seed": 0}
    for experiment in (
        ts.Experiment.preset("quadratic", {"orders": ORDERS, "seeds": [0, 1]}),
        ts.Experiment.preset("quadratic", many),
        ts.Experiment.preset("two-constants", {"seeds": [0, 1]}),
        *map(ts.Experiment.of, (ROWS, WIDE, NEAR)),
    ):
        ts.run(experiment, place, workers=0)
    return ts.open(place)


@pytest.fixture(scope="module")
def table(store):
    return claims(store)


def verdicts(table, claim, experiment):
    chosen = table[(table["claim"] == claim) & (table["experiment"] == experiment)]
    return chosen["verdict"].tolist()


@pytest.mark.parametrize(
    ("claim", "experiment", "times"),
    [
        ("bound", "quadratic", 2), ("bound", "rows", 2), ("bound", "many", 100), ("converges", "quadratic", 2),
        ("converges", "two-constants", 2), ("rate", "quadratic", 2), ("rate", "rows", 2), ("jumps", "two-constants", 2),
        ("lemma", "quadratic", 1), ("curvature", "quadratic", 1), ("curvature", "wide", 1),
        ("closed-form", "quadratic", 4), ("closed-form", "wide", 1), ("law", "many", 6),
        ("elsewhere", "quadratic", 2), ("oscillates", "quadratic", 2), ("bracket", "near", 2),
        ("less-variance", "rows", 4), ("less-variance", "quadratic", 8),
    ],
)  # fmt: skip
def test_what_theory_says_holds(table, claim, experiment, times):
    assert verdicts(table, claim, experiment) == ["holds"] * times


def test_windows_vary_less_than_forward(table):
    """Never surely more; surely less only where blocks tell: in 200 steps every fifth of 25 begins after a reset."""
    found = table[(table["claim"] == "windows") & (table["experiment"] == "quadratic")]
    assert len(found) == 4
    assert set(found["verdict"]) <= {"holds", "not decidable here"}
    assert (found["value"] > 1).all()


def test_what_theory_says_holds_of_sparse_grids_and_of_float32(tmp_path):
    rough = {"problem": {"dtype": "float32"}, "seeds": [0]}
    few = {"record": {"every": 5}, "seeds": [0, 5], "steps": 100}
    slow = {"name": "slow", "seeds": [0], "operator": {"lr": 0.5}}
    wild = {**NEAR, "name": "wild", "operator": {"family": "sgd", "lr": 1e30}, "steps": 60, "record": {"every": 20}}
    for experiment in (
        ts.Experiment.preset("quadratic", rough),
        ts.Experiment.of({**ROWS, "name": "ridge", "problem": {**ROWS["problem"], "ridge": 0.5, "dtype": "float32"}}),
        ts.Experiment.preset("two-constants", few),
        ts.Experiment.preset("two-constants", slow),
        ts.Experiment.of(wild),
    ):
        ts.run(experiment, tmp_path / "s.zarr", workers=0)
    table = claims(ts.open(tmp_path / "s.zarr"))
    assert set(verdicts(table, "bound", "quadratic") + verdicts(table, "bound", "ridge")) == {"holds"}
    assert verdicts(table, "jumps", "two-constants") == ["holds"] * 2
    assert verdicts(table, "jumps", "slow") == []  # its maps are not constant
    assert set(verdicts(table, "bracket", "wild")) == {"not decidable here"}


def test_what_is_half_recorded_is_examined_as_far_as_it_goes(tmp_path):
    table = {"name": "q", "problem": {"family": "quadratic"}, "operator": {"family": "sgd", "lr": 0.1}, "steps": 240}
    both = ["forward", "backward", "bracket"]
    place = tmp_path / "s.zarr"
    ts.run(ts.Experiment.of({**table, "orders": ["forward"], "seeds": [0, 1]}), place, workers=0)
    ts.run(ts.Experiment.of({**table, "orders": both, "seeds": [0]}), place, workers=0, extend=True)
    table = claims(ts.open(place))
    for claim in ("bound", "closed-form", "converges", "less-variance", "bracket"):
        chosen = table[(table["claim"] == claim) & table["about"].str.contains("seed 1")]
        assert "not decidable here" in chosen["verdict"].tolist(), claim
    for claim in ("bound", "converges", "less-variance"):
        chosen = table[(table["claim"] == claim) & table["about"].str.contains("seed 0")]
        assert set(chosen["verdict"]) == {"holds"}, claim


def test_every_claim_has_a_row_and_says_what_it_lacks(table):
    assert list(dict.fromkeys(table["claim"])) == list(CLAIMS)
    lacking = table[table["experiment"] == ""].set_index("claim")
    assert set(lacking.index) == {"regularized", "stronger"}
    assert (lacking["verdict"] == "not decidable here").all()
    assert "it needs the presets fig14, fig16 or fig18" in lacking["evidence"]["stronger"]
    short = table[(table["claim"] == "less-variance") & (table["experiment"] == "many")]
    assert set(short["evidence"]) == {"train_loss: it was measured at 31 steps, fewer than the window of 192"}


def test_numbers_have_intervals_and_costs(table):
    rates = table[(table["claim"] == "rate") & (table["experiment"] == "quadratic")]
    assert (rates["low"] < 0.9).all()
    assert (rates["high"] > 0.9).all()
    assert rates["evidence"].str.contains(r"that of the products, followed along \d+ steps, is 0.9 ").all()
    windows = table[
        (table["claim"] == "windows") & (table["statistic"] == "variance about lines, forward over backward/40")
    ]
    assert windows["evidence"].str.endswith("; 20.5 times the applications of forward").all()


def exchanged(stored, *names):
    """Exchange the labels of the first two orders in what is read."""

    class Exchanged(ts.StoredExperiment):
        def dataset(self):
            ds = super().dataset()
            return ds.assign_coords(order=["backward", "forward", *ds["order"].values[2:]])

    return Exchanged(stored.store, stored.group)


@pytest.mark.parametrize(
    ("claim", "experiment"),
    [
        ("bound", "quadratic"), ("converges", "rows"), ("wanders", "quadratic"), ("jumps", "two-constants"),
        ("closed-form", "quadratic"), ("less-variance", "rows"), ("windows", "quadratic"),
    ],
)  # fmt: skip
def test_with_the_orders_exchanged_it_does_not_hold(store, claim, experiment):
    found = [one.verdict for one in CLAIMS[claim].ask(exchanged(store[experiment]))]
    expected = "not decidable here" if claim == "converges" else "does not hold"
    assert found
    assert "holds" not in found
    assert expected in found


def test_the_law_of_operators_that_differ_is_rejected(store, tmp_path):
    """Forward with another learning rate in the place of backward: the test of the table rejects it."""
    other = ts.run(
        ts.Experiment.preset("quadratic", {"steps": 30, "seeds": list(range(100)), "init_seed": 0,
                                           "operator": {"lr": 0.3}}), tmp_path / "s.zarr", workers=0,
    )  # fmt: skip

    class Mixed(ts.StoredExperiment):
        def dataset(self):
            ours, theirs = super().dataset().load(), other.dataset().load()
            for name in ("sketch", "train_loss"):
                ours[name].loc[{"order": "backward"}] = theirs[name].sel(order="forward").values
            return ours

    found = list(CLAIMS["law"].ask(Mixed(store.__class__(store.place), store["many"].group)))
    assert "does not hold" in {one.verdict for one in found}


def test_an_interval_decides():
    assert [by_interval(1, "", "", (x, low, high)).verdict for x, low, high in (
        (2, 1.5, 3), (0.5, 0.2, 0.9), (1.2, 0.9, 1.5), (2, float("nan"), float("nan")))] == [
        "holds", "does not hold", "not decidable here", "not decidable here"]  # fmt: skip


def test_what_cannot_be_computed_again_does_not_end_the_table(record, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        "import torch, trajstore as ts\nx = torch.linspace(-1, 1, 8)[:, None]\n"
        "def problem():\n"
        "    return ts.ModuleProblem(lambda: torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, (x, x))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    table = {"name": "own", "problem": {"family": "factory", "function": "own:problem"}, "steps": 100}
    stored = record({**table, "operator": {"family": "sgd", "lr": 0.1}})
    (tmp_path / "own.py").write_text((tmp_path / "own.py").read_text().replace("(-1, 1, 8)", "(-1, 2, 8)"))
    forget("own")
    found = {row.claim: row for row in examine(stored.store)}
    assert list(found) == list(CLAIMS)
    assert found["loss-metric"].verdict == "not decidable here"
    assert "its problem has changed since it was recorded" in found["loss-metric"].evidence
    assert found["converges"].verdict == "holds"


def test_experiments_and_claims_can_be_chosen(store):
    chosen = list(examine(store, ["rows"], ["rate", "jumps"]))
    assert [(row.claim, row.experiment) for row in chosen] == [("rate", "rows")] * 2 + [("jumps", "")]
    with pytest.raises(NotFoundError, match="no claim 'rat'; did you mean 'rate'"):
        list(examine(store, names=["rat"]))
    with pytest.raises(NotFoundError, match=r"no experiment 'row' in .*; did you mean 'rows'"):
        list(examine(store, ["row"]))


def test_the_command_prints_a_table_json_and_answers_sql(store, trajstore):
    where = str(store.place)
    code, out, err = trajstore("claims", where, "rows", "many", "--claim", "bound", "--claim", "jumps")
    assert (code, err) == (0, "")
    assert (
        out.splitlines()[0] == "bound: backward iterates of contractions stay within C kⁿ of their limit (Theorem 2.2)"
    )
    assert "100, from seed 0 to seed 99" in out
    assert "  102 × holds" in out
    assert "jumps: of two constant maps" in out
    assert "not decidable here: nothing here to examine: it needs the preset `two-constants`" in out
    code, out, _ = trajstore("claims", where, "rows", "--claim", "rate", "--json")
    rows = json.loads(out)
    assert [row["about"] for row in rows] == ["seed 0", "seed 1"]
    assert rows[0]["low"] < rows[0]["value"] < rows[0]["high"]
    query = "SELECT experiment, count(*) AS n FROM claims JOIN experiments USING (experiment) GROUP BY ALL ORDER BY ALL"
    code, out, _ = trajstore("claims", where, "rows", "quadratic", "--claim", "bound", "--sql", query, "--json")
    assert json.loads(out) == [{"experiment": "quadratic", "n": 2}, {"experiment": "rows", "n": 2}]
    for arguments, says in (
        (["--claim", "boun"], "no claim 'boun'; did you mean 'bound'?"),
        (["--claim", "bound", "--sql", "DROP TABLE claims"], "only SELECT is possible here"),
    ):
        code, out, err = trajstore("claims", where, "rows", *arguments)
        assert (code, out) == (2, "")
        assert says in err
        assert err.count("\n") == 1


def test_every_claim_is_asked_by_some_recording(store, table, tmp_path):
    asked = set(table[table["experiment"] != ""]["claim"])
    net = {"problem": {"family": "least-squares", "n": 24, "d": 3, "batch_size": 6}, "steps": 8, "seeds": [0, 1, 2],
           "orders": ["forward"]}  # fmt: skip
    regularized = {"family": "order-regularized", "lr": 0.01, "parts": 3}
    for name, operator in (
        ("large", {"family": "sgd", "lr": 0.01}),
        ("weak", {**regularized, "strength": 0.5}),
        ("strong", {**regularized, "strength": 1.0}),
    ):
        table = {**net, "name": f"rows.{name}", "variant_of": "rows", "operator": operator}
        ts.run(ts.Experiment.of(table), tmp_path / "s.zarr", workers=0)
    rows = list(examine(ts.open(tmp_path / "s.zarr")))
    asked |= {row.claim for row in rows if row.experiment}
    assert asked == set(CLAIMS)
    told = [row.evidence for row in rows if row.claim in ("regularized", "stronger")]
    assert all("(99%, 3 seeds)" in evidence for evidence in told)


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_metric_counts_seeds_and_not_pairs(name):
    """A few hundred pairs of one trajectory are no more than one value; intervals over seeds hold."""
    rng = np.random.default_rng(2)
    true = 1 - loss_factors(rng, name, 1_000, 100).mean()
    for seeds in (3, 10):
        which, pairs = np.repeat(np.arange(seeds), 30), 30
        found = [loss_contracts(loss_factors(rng, name, seeds, pairs).ravel(), which) for _ in range(200)]
        assert np.mean([one.low <= true <= one.high for one in found]) >= 0.96
        assert np.mean([one.verdict == ("does not hold" if true > 0 else "holds") for one in found]) <= 0.02
    few = loss_contracts(loss_factors(rng, name, 2, 50).ravel(), np.repeat(np.arange(2), 50))
    assert few.verdict == "not decidable here"
    assert "2 seeds; pairs of one trajectory depend on each other" in few.evidence
