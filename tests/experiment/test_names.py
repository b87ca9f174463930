"""Names that every file system can hold, and variants that are stored as such."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import trajstore as ts
from tests.conftest import SMALL_NET
from trajstore.errors import ConfigurationError, ConflictError
from trajstore.experiment.experiment import Record
from trajstore.experiment.presets import family_of
from trajstore.storage.format.digest import config_digest
from trajstore.store import Store

TINY = {**SMALL_NET, "steps": 4, "seeds": [0]}


def record(folder: Path, name: str, **changes: object) -> ts.StoredExperiment:
    return ts.run(ts.Experiment.of({**TINY, "name": name, **changes}), folder / "s.zarr", engine="reference")


def loop(folder: Path, name: str) -> None:
    net = torch.nn.Linear(1, 1)
    with ts.record(folder / "s.zarr", name, model=net, optimizer=torch.optim.SGD(net.parameters(), 0.1)) as rec:
        rec.step(loss=1.0)


@pytest.mark.parametrize("how", [record, loop])
@pytest.mark.parametrize("name", ["CON", "con", "Aux", "nul.x", "COM1", "lpt9.run", "x.", "zarr.JSON", "Small"])
def test_names_that_could_not_be_copied_are_refused_for_new_experiments(tmp_path, how, name):
    record(tmp_path, "small")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ConfigurationError, ConflictError), match="Windows"):
        how(tmp_path, name)
    assert list(Store(tmp_path / "s.zarr")) == ["small"]
    assert [f for f in sorted(tmp_path.rglob("*")) if f.is_dir()] == [f for f in before if f.is_dir()]


@pytest.mark.parametrize("name", ["x ", "x\u0301", "é", "a/b", "a:b", "a*b", "a?", "a|b", "..", "x\n"])
def test_names_of_other_signs_are_refused(name):
    with pytest.raises(ConfigurationError, match="use up to 100 letters, digits"):
        ts.Experiment.of({**TINY, "name": name})


@pytest.mark.parametrize("name", ["console", "com", "com10", "small.x", "a.con", "x-1"])
def test_other_names_are_not_refused(tmp_path, name):
    assert record(tmp_path, name).name == name


def test_experiments_of_such_names_that_exist_are_read_and_continued(tmp_path):
    record(tmp_path, "small")
    for name in ("Small", "con", "x."):
        stored = record(tmp_path, f"other-{name.strip('.')}")
        folder = tmp_path / "s.zarr" / stored.name
        config = json.loads((folder / "zarr.json").read_text())
        folder.rename(tmp_path / "s.zarr" / name)
        assert config["attributes"]["trajstore"]["config"]["name"] == stored.name
        assert Store(tmp_path / "s.zarr")[name].dataset()["train_loss"].notnull().all()


def test_a_merge_does_not_put_two_names_together_that_are_one_elsewhere(trajstore, tmp_path):
    record(tmp_path, "small")
    ts.run(ts.Experiment.of({**TINY, "name": "Small"}), tmp_path / "t.zarr", engine="reference")
    code, _, err = trajstore("merge", "t.zarr", "s.zarr")
    assert (code, err.count("\n")) == (2, 1)
    assert "s.zarr has 'small' already, and to Windows and macOS that is the same" in err
    assert list(Store(tmp_path / "s.zarr")) == ["small"]


def test_metrics_of_a_loop_have_such_names_neither(tmp_path):
    net = torch.nn.Linear(1, 1)
    with (
        ts.record(tmp_path / "s.zarr", "net", model=net, optimizer=torch.optim.SGD(net.parameters(), 0.1)) as rec,
        pytest.raises(ConfigurationError, match="metric name 'aux': no folder on Windows can have it"),
    ):
        rec.step(aux=1.0)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("steps", "10", "an experiment: steps is '10'; input should be a valid integer"),
        ("steps", 10.0, "an experiment: steps is 10.0; input should be a valid integer"),
        ("steps", True, "an experiment: steps is True; input should be a valid integer"),
        ("seeds", (0, "1"), "an experiment: seeds[1] is '1'; input should be a valid integer"),
        ("seeds", (np.int64(3),), "an experiment: seeds[0] is np.int64(3); input should be a valid integer"),
        ("seeds", 3, "an experiment: seeds is 3; input should be a valid tuple"),
        ("orders", ("forward",), "an experiment: orders[0] is 'forward'; input should be"),
        ("name", 3, "an experiment: name is 3; input should be a valid string"),
        ("init_seed", "0", "an experiment: init_seed is '0'; input should be a valid integer"),
        ("record", {"every": 2}, "an experiment: record is {'every': 2}; input should be"),
        ("problem", {"family": "quadratic"}, "an experiment: problem is {'family': 'quadratic'}; give a declaration"),
        ("operator", "sgd", "an experiment: operator is 'sgd'; give a declaration"),
        ("variant_of", "other", "cannot be a variant of 'other': its name would begin with 'other.'"),
    ],
)
def test_an_experiment_made_directly_refuses_other_types(field, value, says):
    table = ts.Experiment.of(TINY)
    fields = {name: getattr(table, name) for name in ("name", "problem", "operator", "steps", "orders", "seeds")}
    assert ts.Experiment(**fields).config() == table.config()
    with pytest.raises(ConfigurationError) as told:
        ts.Experiment(**{**fields, field: value})
    assert says in str(told.value)


@pytest.mark.parametrize(("field", "value"), [("every", "3"), ("every", 2.0), ("steps", [1, 2]), ("tolerance", "x")])
def test_a_record_made_directly_refuses_other_types(field, value):
    with pytest.raises(ConfigurationError, match=f"record: {field} is "):
        Record(**{field: value})


def test_a_number_of_snapshots_is_every_so_many(tmp_path):
    net = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for number, snapshots in enumerate((10, ts.every(10))):
        with ts.record(
            tmp_path / "s.zarr", f"net-{number}", model=net, optimizer=optimizer, snapshots=snapshots, steps=30
        ) as rec:
            for _ in range(30):
                rec.step(loss=1.0)
    one, other = (ts.open(tmp_path / "s.zarr")[f"net-{number}"] for number in range(2))
    assert one.schema.snapshots == other.schema.snapshots == (0, 10, 20, 30)
    assert one.config["record"] == other.config["record"]


@pytest.mark.parametrize("snapshots", ["10", 2.5, True, [10]])
def test_other_snapshots_are_refused(tmp_path, snapshots):
    net = torch.nn.Linear(1, 1)
    with pytest.raises(ConfigurationError, match="give a number k for every k-th step"):
        ts.record(
            tmp_path / "s.zarr", "net", model=net, optimizer=torch.optim.SGD(net.parameters()), snapshots=snapshots
        )
    with pytest.raises(ConfigurationError, match=r"every\(0\)"):
        ts.record(tmp_path / "s.zarr", "net", model=net, optimizer=torch.optim.SGD(net.parameters()), snapshots=0)


def test_what_is_a_variant_is_stored_and_not_read_from_a_dot(trajstore, tmp_path):
    for name in ("lr-0", "lr-0.02", "lr-0.large"):
        record(tmp_path, name)
    for variant in ("a", "b.c"):
        record(tmp_path, f"mine.v1.{variant}", variant_of="mine.v1")
    store = ts.open(tmp_path / "s.zarr")
    assert store.families() == {"mine.v1.a": "mine.v1", "mine.v1.b.c": "mine.v1"}
    assert list(store.variants("mine.v1")) == ["a", "b.c"]
    assert list(store.variants("lr-0")) == ["lr-0"]
    code, out, _ = trajstore("claims", "s.zarr", "lr-0", "--claim", "regularized-wins", "--json")
    code, out, err = trajstore("claims", "s.zarr", "mine.v1", "--json")
    assert code == 0, err
    assert {row["experiment"] for row in json.loads(out)} <= {"mine.v1", ""}


def test_what_a_variant_takes_is_predicted():
    from trajstore.recording.cost import cost

    assert cost(ts.Experiment.of({**TINY, "name": "mine.a", "variant_of": "mine"}), engine="reference").snapshots == 10


def test_variants_of_presets_that_were_stored_without_it_are_known():
    assert family_of("fig14.lambda-0.5") == "fig14"
    assert family_of("fig14-small.large") == "fig14-small"
    assert family_of("mine.small-batch") == "mine"
    assert family_of("lr-0.02") is None
    assert family_of("lambda-0.5") is None


def test_a_variant_of_a_preset_under_another_name_is_an_experiment_of_its_own():
    own = ts.Experiment.preset("fig14.large", scale="small")
    assert (own.name, own.variant_of) == ("fig14-small.large", "fig14-small")
    renamed = ts.Experiment.preset("fig14.large", {"name": "x"}, scale="small")
    assert (renamed.name, renamed.variant_of) == ("x", None)
    assert ts.Experiment.of({"preset": "fig14.large", "scale": "small", "name": "x"}).variant_of is None


def test_an_experiment_stored_before_variants_were_is_continued(tmp_path):
    stored = record(tmp_path, "mine.large")
    file = tmp_path / "s.zarr" / "mine.large" / "zarr.json"
    document = json.loads(file.read_text())
    attributes = document["attributes"]["trajstore"]
    del attributes["config"]["variant_of"]
    attributes["config_digest"] = config_digest(attributes["config"])
    attributes["digest"] = config_digest({k: v for k, v in attributes.items() if k != "digest"})
    file.write_text(json.dumps(document))
    assert ts.open(tmp_path / "s.zarr").families() == {"mine.large": "mine"}
    again = ts.Experiment.of({**TINY, "name": "mine.large"})
    assert ts.run(again, tmp_path / "s.zarr", resume=True).name == stored.name
    family = ts.Experiment.of({**TINY, "name": "mine.large", "variant_of": "mine", "orders": "backward/2"})
    ts.run(family, tmp_path / "s.zarr", engine="reference", extend=True)
    assert ts.open(tmp_path / "s.zarr")["mine.large"].variant_of == "mine"
