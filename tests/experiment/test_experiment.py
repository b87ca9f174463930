"""Experiments from tables, files and presets; errors that name the field."""

from __future__ import annotations

import functools
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import trajstore as ts
from trajstore.errors import ConfigurationError
from trajstore.experiment.configuration import build, describe, differences, merge
from trajstore.experiment.experiment import read_toml
from trajstore.operators.adam import Adam
from trajstore.operators.schedules.cosine import Cosine

PLAIN = {"name": "q", "problem": {"family": "quadratic"}, "operator": {"family": "sgd", "lr": 0.1}, "steps": 5}


def test_families_nest():
    operator = build("operator", {"family": "adam", "lr": 0.1, "schedule": {"family": "cosine", "total": 10}})
    assert operator == Adam(0.1, schedule=Cosine(10))
    assert build("operator", describe(operator)) == operator


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"problem": {"family": "quadratc"}}, "unknown problem 'quadratc'; did you mean 'quadratic'"),
        ({"problem": {}}, "problem: {} does not say which; write family = 'regression'"),
        ({"problem": 5}, "problem: 5 does not say which"),
        ({"operator": [1]}, r"operator: \[1\] does not say which"),
        ({"operator": "sgd"}, "operator sgd needs lr"),
        ({"operator": {"family": "adam", "schedule": 5}}, "schedule: 5 does not say which"),
        ({"operator": {"family": "adam", "schedule": "cosine"}}, "schedule cosine needs total"),
        ({"record": 5}, "record is 5"),
        ({"orders": 5}, "orders is 5"),
        ({"preset": 5}, "unknown preset 5"),
        ({"problem": {"family": "two-constants", "x0": float("nan")}}, "x0 is nan; input should be a finite number"),
        ({"steps": 10**20}, "steps is 100000000000000000000; it"),
        ({"steps": 10**9}, "from 1 to 100,000,000"),
        ({"name": "zarr.json"}, "experiment name 'zarr.json'"),
        ({"problem": {"family": "quadratic", "spectrun": [1]}}, "no field 'spectrun'; did you mean 'spectrum'"),
        ({"problem": {"family": "regression", "width": "wide"}}, "problem regression: width is 'wide'"),
        ({"problem": {"family": "regression", "curve": "x^4"}}, "curve is 'x\\^4'; input should be 'x\\^2'"),
        ({"problem": {"family": "quadratic", "spectrum": [1, "a"]}}, r"spectrum\[1\] is 'a'"),
        ({"operator": {"family": "sgd"}}, "operator sgd needs lr"),
        ({"operator": {"family": "sgd", "lr": 0.1, "by": "batch"}}, "operator sgd: by is 'batch'"),
        ({"operator": {"family": "sgd", "lr": 0.1, "schedule": {"family": "cos"}}}, "unknown schedule 'cos'"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1.5}, "an experiment: steps is 1.5"),
        ({"seeds": []}, "seeds must be given"),
        ({"seeds": [1, 1]}, "each once; got 1, 1"),
        ({"seeds": [-1]}, "seed -1 must be"),
        ({"orders": ["forward", "forward"]}, "orders must be given, each once"),
        ({"orders": ["sideways"]}, "'sideways' at character 1"),
        ({"orders": ["backward/2?train_accuracy"]}, "no metric 'train_accuracy' to decide on; did you mean|there is"),
        ({"orders": ["backward+backward@5"]}, "starts at step 5, but the last step is 5"),
        ({"record": {"every": 0}}, "record: every is 0"),
        ({"record": {"every": 2, "snapshot_every": 3}}, "a multiple of every = 2"),
        ({"record": {"sketch": 100}}, "a power of two"),
        ({"record": {"steps": [1, 9]}}, "record: step 9 is beyond the last step 5"),
        ({"record": {"steps": [-1]}}, "it must hold steps from 0 on"),
        ({"record": {"steps": []}}, "it must hold steps from 0 on"),
        ({"record": {"steps": [1], "every": 2}}, "leave out every and log_until"),
        ({"record": {"log_until": 0}}, "log_until is 0"),
        ({"record": {"log_until": 6}}, "log_until is 6, beyond the last step 5"),
        ({"record": {"codec": "gzip"}}, "record: codec is 'gzip'"),
        ({"name": "a/b"}, "experiment name 'a/b'"),
        ({"name": "a..b"}, "experiment name 'a..b'"),
        ({"name": ""}, "experiment name ''"),
        ({"stepz": 3}, "no field 'stepz'; did you mean 'steps'"),
        ({"preset": "fig44"}, "unknown preset 'fig44'; did you mean 'fig4'"),
    ],
)
def test_a_wrong_field_is_named(change, says):
    with pytest.raises(ConfigurationError, match=says) as caught:
        ts.Experiment.of({**PLAIN, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["name", "problem", "operator", "steps"])
def test_a_missing_field_is_named(missing):
    with pytest.raises(ConfigurationError, match=f"an experiment needs {missing}"):
        ts.Experiment.of({k: v for k, v in PLAIN.items() if k != missing})


def test_a_file_may_start_from_a_preset(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('preset = "fig4"\nsteps = 30\n[problem]\nwidth = 10\n[operator]\nfamily = "adam"\n')
    experiment = ts.Experiment.of(read_toml(file))
    assert (experiment.name, experiment.steps) == ("mine", 30)
    assert experiment.config()["problem"]["depth"] == 3
    assert experiment.config()["operator"]["lr"] == 1e-3  # another family starts from its own defaults


@pytest.mark.parametrize(("text", "says"), [("steps = ", "is not TOML"), (None, "cannot read")])
def test_a_file_that_cannot_be_read_is_named(text, says, tmp_path):
    file = tmp_path / "x.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigurationError, match=says):
        read_toml(file)


def test_merging_and_differences():
    base = {"a": {"family": "x", "p": 1, "q": 2}, "b": 3}
    assert merge(base, {"a": {"p": 5}}) == {"a": {"family": "x", "p": 5, "q": 2}, "b": 3}
    assert merge(base, {"a": {"family": "y"}}) == {"a": {"family": "y"}, "b": 3}
    assert differences(base, merge(base, {"a": {"p": 5}, "c": 1})) == ["a.p: 1 / 5", "c: None / 1"]
    assert differences(base, base) == []


def test_a_long_list_is_compared_at_all_its_places():
    note = "x" * 90
    stored = [{"lr": 0.1, "note": note, "decay": None}, {"lr": 0.1}]
    assert differences({"phases": stored}, {"phases": [{"lr": 0.1, "note": note}, {"lr": 0.9}]}) == [
        "phases[1].lr: 0.1 / 0.9"
    ]
    assert differences({"phases": stored}, {"phases": [{"lr": 0.1, "note": note}, {"lr": 0.1}]})


_NAMES = st.sampled_from(["family", "a", "b", "n" * 40])
_PLAIN = st.recursive(
    st.none() | st.integers(0, 2) | st.sampled_from(["", "t" * 50]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=3),
    max_leaves=12,
)


def without_none(table):
    """Leave out what says no more than its absence: tables in tables, but not those in lists."""
    if not isinstance(table, dict):
        return table
    return {key: without_none(value) for key, value in table.items() if value is not None}


@given(st.dictionaries(_NAMES, _PLAIN), st.dictionaries(_NAMES, _PLAIN))
def test_no_difference_goes_unseen(left, right):
    assert bool(differences(left, right)) == (without_none(left) != without_none(right))


def test_what_cannot_be_described_is_refused():
    with pytest.raises(ConfigurationError, match="cannot describe a builtins:object"):
        describe({"thing": object()})


def test_orders_may_be_one_text():
    experiment = ts.Experiment.of({**PLAIN, "orders": "forward, backward/2"})
    assert [str(order) for order in experiment.orders] == ["forward", "backward/2"]


def closing_over(width):
    return lambda: width


def test_functions_are_told_apart_by_what_they_close_over():
    assert describe(closing_over(3)) == describe(closing_over(3))
    assert describe(closing_over(3)) != describe(closing_over(4))
    assert describe(lambda x=1: x) != describe(lambda x=2: x)
    assert describe(functools.partial(closing_over, 3)) == describe(functools.partial(closing_over, 3))
    assert describe(functools.partial(closing_over, 3)) != describe(functools.partial(closing_over, 4))
    one, two = (torch.nn.Linear(1, 1) for _ in range(2))
    assert describe(one) == describe(one) != describe(two)
    bf16 = torch.ones(3, dtype=torch.bfloat16)
    assert describe(bf16) == describe(bf16.clone()) != describe(bf16.float())


def test_functions_typed_at_a_prompt_are_told_apart():
    texts = [
        "x + 1",
        "x + 2",
        "x * 1",
        "x.sin()",
        "x.cos()",
        "[y + 1 for y in x]",
        "(lambda y: y)(x)",
        "(lambda y: x)(x)",
    ]
    made, again = ([describe(eval(f"lambda x: {text}")) for text in texts] for _ in range(2))
    assert made == again
    assert len({repr(one) for one in made}) == len(texts)


def test_functions_of_a_command_line_are_told_apart():
    """From Python 3.13 on the whole line would count as the source of each."""
    program = "from trajstore.experiment.configuration import describe as d; "
    program += "print(*(d(eval(t)) for t in ('lambda: 1', 'lambda: 2')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    one, other = re.findall(r"(?<=.source.: .)\w+", done.stdout)
    assert one != other


@pytest.mark.parametrize(
    ("record", "grid", "snapshots"),
    [
        ({"every": 30}, (0, 30, 60, 90, 100), (0, 30, 60, 90, 100)),
        ({"every": 30, "snapshot_every": 60}, (0, 30, 60, 90, 100), (0, 60, 100)),
        ({"steps": [50, 3, 3]}, (0, 3, 50, 100), (0, 3, 50, 100)),
        ({"steps": [50, 3], "snapshot_every": 10}, (0, 3, 50, 100), (0, 50, 100)),
        (
            {"log_until": 20, "every": 40},
            (0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 40, 80, 100),
            (0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 40, 80, 100),
        ),
    ],
)
def test_grids(record, grid, snapshots):
    experiment = ts.Experiment.of({**PLAIN, "steps": 100, "record": record})
    assert (experiment.grid, experiment.snapshots) == (grid, snapshots)
