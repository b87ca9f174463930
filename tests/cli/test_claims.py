"""`trajstore claims`: one experiment that cannot be read hides no other, and is told."""

from __future__ import annotations

import json

import trajstore as ts


def test_an_experiment_that_cannot_be_read_is_told_after_the_claims_of_the_others(tmp_path, trajstore):
    store = tmp_path / "s.zarr"
    for name in ("broken", "sound"):
        ts.run(ts.Experiment.preset("quadratic", {"name": name, "steps": 5, "seeds": [0]}), store, workers=0)
    asked = ("claims", str(store), "--claim", "closed-form", "--json")
    code, whole, _ = trajstore(*asked)
    assert code == 0
    (store / "broken" / "zarr.json").write_text("{")
    code, out, err = trajstore(*asked)
    assert json.loads(out) == [row for row in json.loads(whole) if row["experiment"] == "sound"] != []
    assert (code, err.count("\n")) == (1, 1)
    assert "experiment 'broken'" in err
    (store / "sound" / "zarr.json").write_text("{")
    code, out, err = trajstore(*asked)
    assert (code, out, err.count("\n")) == (1, "", 1)
