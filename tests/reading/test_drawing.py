"""How batches were drawn is told from what is stored, and it is how they were drawn."""

from __future__ import annotations

import sys

import pytest

import trajstore as ts
from tests.conftest import forget
from trajstore.errors import ConfigurationError
from trajstore.reading.drawing import Drawing, drawing_of
from trajstore.reading.origin import attributes_of

OWN = """
import torch, trajstore as ts
from dataclasses import dataclass
generator = torch.Generator().manual_seed(0)
X = torch.randn(12, 3, generator=generator, dtype=torch.float64)
Y = X.sum(1, keepdim=True) + torch.randn(12, 1, generator=generator, dtype=torch.float64)
def module(batch_size=4, sampling="iid"):
    return ts.ModuleProblem(lambda: torch.nn.Linear(3, 1).double(), torch.nn.functional.mse_loss, (X, Y),
                            batch_size=batch_size, sampling=sampling)
@dataclass(frozen=True)
class Silent:
    def build(self, device):
        return module(3, "shuffle").build(device)
class Tells:
    def build(self, device):
        return module(3, "shuffle").build(device)
    def describe(self):
        return {"sampling": "shuffle"}
def silent():
    return Silent()
def tells():
    return Tells()
def rows():
    from trajstore.problems.least_squares import LeastSquares
    return LeastSquares(n=12, d=3, batch_size=4, sampling="shuffle")
"""
TABLE = {"operator": {"family": "sgd", "lr": 0.05}, "steps": 12, "seeds": [0, 1], "orders": ["forward"]}


def own(function, **arguments):
    return {"family": "factory", "function": f"own_batches:{function}", "arguments": arguments}


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_batches.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        ({"family": "quadratic"}, Drawing(0, "iid")),
        ({"family": "two-constants"}, Drawing(1, "iid")),
        ({"family": "least-squares", "n": 12, "d": 2, "batch_size": 4}, Drawing(4, "iid")),
        ({"family": "least-squares", "n": 12, "d": 2, "batch_size": 4, "sampling": "shuffle"}, Drawing(4, "shuffle")),
        ({"family": "regression", "width": 4, "points": 12, "batch_size": 3, "sampling": "shuffle"},
         Drawing(3, "shuffle")),
        (own("module"), Drawing(4, "iid")),
        (own("module", sampling="shuffle", batch_size=6), Drawing(6, "shuffle")),
        (own("rows"), Drawing(4, "shuffle")),
        (own("tells"), Drawing(3, "shuffle")),
        (own("silent"), Drawing(3, None)),
    ],
)  # fmt: skip
def test_it_is_how_they_were_drawn_and_needs_no_code_of_the_user(record, module, monkeypatch, problem, expected):
    stored = record({**TABLE, "name": "own", "problem": problem})
    drawn = stored.dataset()["batch_index"].values if expected.batch_size else None
    if "own_batches" in sys.modules:
        forget("own_batches")
    monkeypatch.setitem(sys.modules, "own_batches", None)  # importing it would now fail
    assert drawing_of(ts.open(stored.store.place.address)["own"].attributes) == expected
    assert drawing_of(attributes_of(stored.dataset())) == expected
    if drawn is not None and expected.sampling is not None and problem["family"] != "two-constants":
        assert drawn.shape[-1] == expected.batch_size
        epochs = drawn.reshape(len(drawn), -1, 12)  # 12 examples
        whole = all(sorted(epoch) == list(range(12)) for seed in epochs.tolist() for epoch in seed)
        assert whole == (expected.sampling == "shuffle")


def test_a_problem_as_an_object_tells_as_much(tmp_path, module):
    from own_batches import module as make

    experiment = ts.Experiment.of({**TABLE, "name": "own", "problem": make(3, "shuffle")})
    assert drawing_of(ts.run(experiment, tmp_path / "s.zarr").attributes) == Drawing(3, "shuffle")


def test_of_a_loop_only_what_it_says_is_known(tmp_path):
    import torch

    for name, config, expected in (("silent", {}, None), ("told", {"batch_size": 32}, 32)):
        with ts.record(tmp_path / "s.zarr", name, torch.nn.Linear(2, 1), config=config) as rec:
            rec.step(loss=1.0)
        assert drawing_of(ts.open(tmp_path / "s.zarr")[name].attributes) == Drawing(expected, None)


def test_a_loop_does_not_pass_for_a_problem(tmp_path):
    import torch

    with pytest.raises(ConfigurationError, match="config: 'family' is how trajstore marks a loop"):
        ts.record(tmp_path / "s.zarr", "mine", torch.nn.Linear(2, 1), config={"family": "quadratic"})


def test_runs_tell_it_too(record, module):
    store = record({**TABLE, "name": "own", "problem": own("module", sampling="shuffle", batch_size=6)}).store
    assert store.sql("SELECT DISTINCT batch_size, sampling FROM runs").fetchall() == [(6, "shuffle")]
