"""Import: what a checkpoint holds is what is stored, and no checkpoint runs anything."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import trajstore as ts
from tests.recording.test_resume import contents
from tests.tools.hostile import state_chunk
from trajstore.errors import ConfigurationError, ConflictError, DamageError, NotFoundError, WriteError
from trajstore.exchange.export import export_metrics, export_state
from trajstore.exchange.importing import import_checkpoints
from trajstore.exchange.importing.pattern import Pattern
from trajstore.reading.verify import verify

PATTERN = "seed{seed}/step{step}.*"
QUICK = {"durability": "none"}


class Net(nn.Module):
    """BatchNorm, a tied weight, and every dtype that can be stored."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.outer.weight = self.inner.weight
        self.norm, self.last = nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.gain = nn.Parameter(torch.rand(4).bfloat16())
        self.halves = nn.Parameter(torch.rand(2, 3).half())
        self.doubles = nn.Parameter(torch.rand(2, dtype=torch.float64))
        self.scalar = nn.Parameter(torch.rand(()))
        self.register_buffer("bytes8", torch.tensor([0, 255], dtype=torch.uint8))
        self.register_buffer("ints16", torch.tensor([[-3], [7]], dtype=torch.int16))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("empty", torch.zeros(0, 2))


def net(seed: int, step: int) -> Net:
    """A net of which everything depends on the seed and the step."""
    torch.manual_seed(1000 * seed + step)
    made = Net()
    made.norm.running_mean.normal_()
    made.norm.num_batches_tracked += step
    made.ints16 += step
    return made


def state(seed: int, step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3, 2), step + seed / 8), "b": torch.tensor([1.0, -step])}


def write(folder: Path, seed: int, step: int, tensors=None, wrap=None, ending="pt", **how) -> Path:
    """Write a checkpoint where PATTERN finds it."""
    file = folder / f"seed{seed}" / f"step{step:04}.{ending}"
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = state(seed, step) if tensors is None else tensors
    if ending == "safetensors":
        save_file({name: t.clone() for name, t in tensors.items()}, file)
    else:
        torch.save(wrap(tensors) if wrap else tensors, file, **how)
    return file


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == t.dtype and torch.equal(one[name], t) for name, t in other.items()
    )


@pytest.mark.parametrize("ending", ["pt", "pth", "ckpt", "safetensors"])
def test_every_tensor_comes_back_as_it_was(tmp_path, ending):
    steps = [300, 0, 7, 1000, 20]
    files = [write(tmp_path, seed, n, net(seed, n).state_dict(), ending=ending) for n in steps for seed in (2, 0)]
    stored = import_checkpoints(tmp_path / "s.zarr", "mine", files, PATTERN, **QUICK)
    assert (stored.schema.seeds, stored.schema.snapshots) == ((0, 2), (0, 7, 20, 300, 1000))
    for seed in (2, 0):
        for n in steps:
            found = stored.state_dict(order="forward", seed=seed, step=n)
            assert same(found, net(seed, n).state_dict())
            Net().load_state_dict(found, strict=True)
    roles = {entry.name: entry.role for entry in stored.schema.layout.entries}
    buffers = {name for name, role in roles.items() if role == "buffer"}
    named = {name for name, _ in Net().named_buffers()} - {"empty"}  # of floats, and with an unknown name
    assert buffers == named
    assert dict(stored.schema.layout.tied) == ({} if ending == "safetensors" else {"outer.weight": "inner.weight"})
    assert list(verify(stored.store)) == []


def test_norms_distances_and_sketches_are_measured_from_the_first_step_of_each_slab(tmp_path):
    steps = {0: [5, 10, 20, 40], 3: [0, 10, 40]}
    files = [write(tmp_path, seed, n) for seed, those in steps.items() for n in reversed(those)]
    stored = import_checkpoints(tmp_path / "s.zarr", "mine", files, PATTERN, **QUICK)
    ds = stored.dataset()
    for seed, those in steps.items():
        slab = ds.sel(order="forward", seed=seed)
        assert np.flatnonzero(slab.recorded).tolist() == those
        assert slab.snapshot[slab.stored].values.tolist() == those
        weights = [torch.cat([t.flatten() for t in state(seed, n).values()]).double() for n in those]
        at = slab.sel(step=those)
        assert np.allclose(at.param_norm, [w.norm() for w in weights])
        assert np.allclose(at.start_distance, [(w - weights[0]).norm() for w in weights])
        assert np.isnan(at.step_distance[0])
        assert np.allclose(at.step_distance[1:], [(b - a).norm() for a, b in pairwise(weights)])
        assert np.allclose(at.sketch, [w - weights[0] for w in weights])
    rows = stored.store.sql("SELECT seed, step, param_norm IS NULL, batch_loss IS NULL FROM metrics ORDER BY ALL")
    assert rows.fetchall() == [(seed, n, False, True) for seed, those in steps.items() for n in those]
    for seed, step, told in [
        (0, 0, "step 0 was not imported; the nearest that was is step 5; for others, import everything again"),
        (3, 20, "step 20 was not imported; the nearest that was is step 10; for others, import everything again"),
        (0, 50, "step 50 was not imported; the nearest that was is step 40; import checkpoints of it"),
    ]:
        with pytest.raises(NotFoundError, match=f"seed {seed}: {told}"):
            stored.state_dict(order="forward", seed=seed, step=step)


def test_steps_far_apart_leave_segments_empty(tmp_path, monkeypatch):
    monkeypatch.setattr("trajstore.exchange.importing.request.segment_length", lambda layout: 2)
    steps = {0: range(1, 10), 1: [9], 2: [4, 5, 9]}
    files = [write(tmp_path, seed, n) for seed, those in steps.items() for n in those]
    stored = import_checkpoints(tmp_path / "s.zarr", "mine", files, PATTERN, **QUICK)
    assert [(s.recorded, s.last_step, s.complete) for s in stored.slabs()] == [(9, 9, True), (1, 9, True), (3, 9, True)]
    for seed, those in steps.items():
        assert all(same(stored.state_dict(order="forward", seed=seed, step=n), state(seed, n)) for n in those)
    assert list(verify(stored.store)) == []


def test_one_checkpoint_is_an_experiment(tmp_path):
    file = write(tmp_path, 0, 0)
    stored = import_checkpoints(tmp_path / "s.zarr", "mine", [file], PATTERN, **QUICK)
    assert same(stored.state_dict(order="forward", seed=0, step=0), state(0, 0))
    assert (stored.schema.steps, stored.slabs()[0].complete) == (0, True)
    assert list(verify(stored.store)) == []


def test_a_session(trajstore, tmp_path):
    for n in (10, 20, 0):
        for seed in (0, 1):
            write(tmp_path, seed, n, wrap=lambda t: {"epoch": 3, "model": t, "optimizer": {"state": {}}})
    files = [str(f.relative_to(tmp_path)) for f in sorted(tmp_path.glob("seed*/*.pt"))]
    options = ["--pattern", "seed{seed}/step{step}.pt"]
    code, out, err = trajstore("import", "s.zarr", "mine", *files, *options, "--dry-run")
    assert (code, err) == (0, "")
    assert "order 'forward', seed 1: 3 files, steps 0 to 20, 3 to import" in out
    assert "6 to import, 0 stored already" in out
    assert not Path("s.zarr").exists()
    code, out, err = trajstore("import", "s.zarr", "mine", *files[:4], *options)
    assert (code, err) == (0, "")
    said, done = out.splitlines()
    assert said == "mine: the state dicts are under 'model'"
    assert done.startswith("mine: 4 files imported, 0 stored already, 2 slabs, ")
    code, out, err = trajstore("import", "s.zarr", "mine", *files, *options)
    assert (code, err) == (0, "")
    assert out.splitlines()[1].startswith("mine: 2 files imported, 4 stored already, 2 slabs, ")

    code, out, _ = trajstore("ls", "s.zarr", "--json")
    (row,) = json.loads(out)
    assert (row["problem"], row["operator"], row["slabs"], row["complete"], row["steps"]) == (
        "import", "unknown", 2, 2, 20
    )  # fmt: skip
    code, out, _ = trajstore("info", "s.zarr", "mine")
    assert code == 0
    assert ", 1 slab, import, " in out
    fills = json.loads(trajstore("info", "s.zarr", "mine", "--json")[1])["fills"]
    named = {name: digest for fill in fills for name, digest in fill["files"].items()}
    assert sorted(named) == files
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", digest) for digest in named.values())
    assert fills[0]["keys"] == ["model"]
    code, out, _ = trajstore("sql", "s.zarr", 'SELECT "order", seed, last_step FROM runs ORDER BY ALL', "--json")
    assert json.loads(out) == [{"order": "forward", "seed": seed, "last_step": 20} for seed in (0, 1)]
    assert trajstore("verify", "s.zarr")[:2] == (0, "s.zarr: sound\n")


@pytest.mark.parametrize("rounded", [None, "bfloat16"])
def test_what_was_stopped_goes_on_to_the_same_bytes(tmp_path, monkeypatch, rounded):
    monkeypatch.setattr("trajstore.exchange.importing.request.segment_length", lambda layout: 4)
    files = [write(tmp_path, seed, n) for seed in (0, 1) for n in range(1, 21, 2)]
    how = {"snapshot_dtype": rounded, **QUICK}
    whole = import_checkpoints(tmp_path / "whole.zarr", "mine", files, PATTERN, **how)
    for left in (3, 10, 14):
        store = tmp_path / f"{left}.zarr"

        def interrupt(done: int, where: str, left: int = left, seen: list[str] = []) -> None:  # noqa: B006
            seen.append(where)
            if where.startswith("experiment") and len(seen) % 20 == left:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            import_checkpoints(store, "mine", files, PATTERN, progress=interrupt, **how)
        stopped = ts.open(store)["mine"]
        assert sum(slab.recorded for slab in stopped.slabs()) == left
        assert len(digests(stopped)) == left
        assert list(verify(stopped.store)) == []
        again = import_checkpoints(store, "mine", files, PATTERN, **how)
        assert contents(store) == contents(tmp_path / "whole.zarr")
        assert digests(again) == digests(whole)
        assert all(slab.complete for slab in again.slabs())
        assert again.dataset().assign_attrs(whole.dataset().attrs).identical(whole.dataset())
        assert list(verify(again.store)) == []


def test_one_file_is_one_file(trajstore, tmp_path):
    command = ["import", "s.zarr", "mine", str(write(tmp_path, 0, 7)), "--pattern", PATTERN]
    _, out, _ = trajstore(*command, "--dry-run")
    assert "order 'forward', seed 0: 1 file, steps 7 to 7, 1 to import\n" in out
    _, out, _ = trajstore(*command)
    assert out.startswith("mine: 1 file imported, 0 stored already, 1 slab, ")


def test_what_is_told_of_an_import_is_what_it_is(trajstore, tmp_path):
    files = [str(write(tmp_path, 0, n)) for n in (100, 200, 300)]
    assert trajstore("import", "s.zarr", "mine", *files, "--pattern", PATTERN)[::2] == (0, "")
    start = "distance of the parameters to the first imported step of the slab"
    _, out, _ = trajstore("info", "s.zarr", "mine")
    assert "steps        300, states stored at 3 of them\n" in out
    assert f"start_distance: {start}\n" in out
    group = ts.open("s.zarr")["mine"].group
    assert group["start_distance"].attrs["description"] == start
    difference = "projection of the parameters' difference to the first imported step of the slab"
    assert group["sketch"].attrs["description"] == difference
    assert trajstore("export", "s.zarr", "mine", "--numpy", "-o", "out")[0] == 0
    layout = json.loads(Path("out/layout.json").read_text())
    assert layout["arrays"]["sketch"]["about"] == difference
    assert {metric["name"]: metric["about"] for metric in layout["metrics"]}["start_distance"] == start
    assert trajstore("verify", "s.zarr")[:2] == (0, "s.zarr: sound\n")


def digests(stored: ts.StoredExperiment) -> dict[str, str]:
    """What is noted of files, whichever import noted it."""
    return {name: digest for fill in stored.attributes["fills"] for name, digest in fill["files"].items() if digest}


def test_an_import_that_stopped_before_its_fill_ended_is_ended_by_another(tmp_path, monkeypatch):
    """As when it is killed: every step is committed, and nothing is noted."""
    files = [write(tmp_path, seed, n) for seed in (0, 1) for n in (1, 2)]
    times = iter(["it began", KeyboardInterrupt()])

    def now() -> str:
        if isinstance(time := next(times), str):
            return time
        raise time

    with monkeypatch.context() as patch:
        patch.setattr("trajstore.recording.fills.now", now)
        with pytest.raises(KeyboardInterrupt):
            import_checkpoints(tmp_path / "s.zarr", "mine", files[:2], PATTERN, **QUICK)
    stopped = ts.open(tmp_path / "s.zarr")["mine"]
    assert [(s.recorded, s.complete) for s in stopped.slabs()] == [(2, False)]
    assert digests(stopped) == {}
    before = contents(tmp_path / "s.zarr")
    again = import_checkpoints(tmp_path / "s.zarr", "mine", files[:2], PATTERN, **QUICK)
    assert contents(tmp_path / "s.zarr") == before
    assert [(s.recorded, s.complete) for s in again.slabs()] == [(2, True)]
    assert digests(again) == {
        f"seed0/step{n:04}.pt": f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
        for n, file in enumerate(files[:2], 1)
    }
    assert list(verify(again.store)) == []
    as_it_is = everything(tmp_path / "s.zarr")
    import_checkpoints(tmp_path / "s.zarr", "mine", files[:1], PATTERN, **QUICK)
    assert everything(tmp_path / "s.zarr") == as_it_is
    import_checkpoints(tmp_path / "s.zarr", "mine", files, PATTERN, **QUICK)
    assert [fill["slabs"] for fill in ts.open(tmp_path / "s.zarr")["mine"].attributes["fills"]] == [
        [["forward", 0]], [["forward", 0]], [["forward", 1]]
    ]  # fmt: skip


def test_a_file_that_changes_during_an_import_is_an_error_of_writing(tmp_path):
    files = [write(tmp_path, 0, n) for n in range(8)]

    def change(done: int, where: str) -> None:
        files[-1].write_text("hello")

    with pytest.raises(WriteError, match=r"step0007.pt cannot be read.*; what was imported before is kept;"):
        import_checkpoints(tmp_path / "s.zarr", "mine", files, PATTERN, progress=change, **QUICK)
    stopped = ts.open(tmp_path / "s.zarr")["mine"]
    assert len(digests(stopped)) == stopped.slabs()[0].recorded == 7
    write(tmp_path, 0, 7)
    assert import_checkpoints(tmp_path / "s.zarr", "mine", files, PATTERN, **QUICK).slabs()[0].complete


def test_more_files_are_added_and_those_that_are_stored_must_be_the_same(tmp_path):
    path = tmp_path / "s.zarr"
    how = {"pattern": PATTERN, **QUICK}
    first = [write(tmp_path, 0, n) for n in (10, 20)] + [write(tmp_path, 1, 20)]
    import_checkpoints(path, "mine", first, **how)
    later = [write(tmp_path, 0, 30), write(tmp_path, 4, 10), write(tmp_path, 4, 40)]
    stored = import_checkpoints(path, "mine", later, **how)
    assert (stored.schema.seeds, stored.schema.snapshots) == ((0, 1, 4), (0, 10, 20, 30, 40))
    assert [s.recorded for s in stored.slabs()] == [3, 1, 2]
    ds = stored.dataset().sel(order="forward", seed=0, step=30)
    assert float(ds.start_distance) == pytest.approx(np.hypot(20 * 6**0.5, 20))
    assert float(ds.step_distance) == pytest.approx(np.hypot(10 * 6**0.5, 10))
    before = everything(path)
    assert import_checkpoints(path, "mine", first + later, **how).name == "mine"
    assert everything(path) == before
    for files, told in [
        ([write(tmp_path / "x", 0, 20, state(0, 21)), write(tmp_path, 0, 50)],
         "seed 0: step 20 is stored already, and .*/x/seed0/step0020.pt holds other numbers"),
        ([write(tmp_path, 0, 15)], "imported to step 40, and step 15 before that has no place in it"),
        ([write(tmp_path, 1, 10)], "seed 1: step 10 .* comes before step 20, which is stored already"),
        ([write(tmp_path, 7, 50, {"w": torch.zeros(3, 2)})], "no tensor 'b', which what is stored has"),
        ([write(tmp_path, 8, 50, {**state(0, 0), "w": torch.zeros(2, 2)})],
         r"tensor 'w' has shape \(2, 2\), in what is stored it has \(3, 2\)"),
    ]:  # fmt: skip
        with pytest.raises(ConflictError, match=told):
            import_checkpoints(path, "mine", files, **how)
        assert everything(path) == before
    with pytest.raises(ConflictError, match=r"differs in record.codec: 'pcodec' / 'portable'"):
        import_checkpoints(path, "mine", first, codec="portable", **how)
    ts.run(ts.Experiment.preset("quadratic", {"steps": 2, "seeds": [0]}), path)
    with pytest.raises(ConflictError, match="'quadratic' exists already and was not imported"):
        import_checkpoints(path, "quadratic", first, **how)
    assert list(verify(stored.store)) == []


def everything(folder: Path) -> dict[str, int]:
    return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in folder.rglob("*")}


def test_rounded_states_are_measured_before_they_are_rounded(tmp_path):
    path = tmp_path / "s.zarr"
    how = {"pattern": PATTERN, "snapshot_dtype": "bfloat16", **QUICK}
    tensors = [{"w": torch.tensor([1 + n / 10_000, 2.0])} for n in range(3)]
    first, second, third = (write(tmp_path, 0, n, t) for n, t in enumerate(tensors))
    import_checkpoints(path, "mine", [first, second], **how)
    with pytest.raises(ConflictError, match="step 2 is measured against step 0, which is stored rounded; give the fi"):
        import_checkpoints(path, "mine", [second, third], **how)
    stored = import_checkpoints(path, "mine", [first, second, third], **how)
    slab = stored.dataset().sel(order="forward", seed=0)
    assert np.allclose(slab.start_distance, [0, 1e-4, 2e-4], rtol=1e-3)
    assert np.allclose(slab.step_distance[1:], 1e-4, rtol=1e-3)
    assert (slab.params == 1).sel(param=0).all()


def test_what_a_repair_took_out_is_imported_again(tmp_path, monkeypatch):
    monkeypatch.setattr("trajstore.exchange.importing.request.segment_length", lambda layout: 4)
    path = tmp_path / "s.zarr"
    files = [write(tmp_path, 0, n) for n in range(1, 20)]
    stored = import_checkpoints(path, "mine", files, PATTERN, **QUICK)
    whole = contents(path)
    for chunk in (0, 2):
        file = path / "mine" / "params" / "c" / "0" / "0" / "0" / str(chunk)
        file.write_bytes(file.read_bytes()[:-3])
    found = list(verify(stored.store, repair=True))
    assert [f.repaired for f in found] == [True, True]
    assert all("not what was committed; importing again writes it anew" in str(f) for f in found)
    assert ts.open(path)["mine"].slabs()[0].recorded == 12
    import_checkpoints(path, "mine", files, PATTERN, **QUICK)
    assert [f for f in verify(stored.store) if not f.harmless] == []
    assert contents(path) == whole


class Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("how", ["zip", "old", "bare", "opcodes", "module"])
def test_a_pickle_that_would_run_something_is_refused(trajstore, tmp_path, how):
    mark = tmp_path / "mark"
    good, file = write(tmp_path, 0, 1), write(tmp_path, 0, 2)
    if how == "bare":
        file.write_bytes(pickle.dumps(Evil(mark)))
    elif how == "opcodes":
        file.write_bytes(f"cos\nsystem\n(S'touch {mark}'\ntR.".encode())
    elif how == "module":
        torch.save(Net(), file)
    else:
        torch.save({**state(0, 2), "x": Evil(mark)}, file, _use_new_zipfile_serialization=how == "zip")
    code, out, err = trajstore("import", "s.zarr", "mine", str(good), str(file), "--pattern", PATTERN)
    assert (code, out) == (2, "")
    assert err.startswith(f"trajstore: {file}: refused, and nothing in it was run: it is ")
    assert err.count("\n") == 1
    assert "weights_only" not in err
    assert not mark.exists()
    assert not Path("s.zarr").exists()
    if how == "bare":  # the test would tell
        pickle.loads(file.read_bytes())
        assert mark.exists()


def broken(folder: Path) -> None:
    """Files of every wrong kind."""
    whole = write(folder, 0, 1).read_bytes()
    write(folder, 0, 2)
    write(folder, 0, 10, {"w": torch.zeros(2, 2), "b": torch.zeros(2)})
    write(folder, 0, 11, {"w": torch.zeros(3, 2), "b": torch.zeros(2).double()})
    write(folder, 0, 12, {"w": torch.zeros(3, 2)})
    write(folder, 0, 13, {**state(0, 0), "more": torch.zeros(1)})
    write(folder, 0, 14, {"w": torch.zeros(3, 2, dtype=torch.complex64)})
    write(folder, 0, 15, {"w": torch.zeros(3, 2).to_sparse()})
    write(folder, 0, 16, {"epoch": 3, "net": state(0, 0)})
    write(folder, 0, 17, {"model": state(0, 0), "state_dict": state(0, 0)})
    write(folder, 0, 18, {"n": torch.ones(3, dtype=torch.int64), "running_mean": torch.ones(3)})
    write(folder, 0, 19, {"a": {"b": {"c": 3, "w": torch.ones(1)}}})
    write(folder, 0, 20, [torch.ones(3)])
    write(folder, 0, 21, {"epoch": 3, "model": {**state(0, 0), "scale": 3}})
    write(folder, 0, 22, {**state(0, 0), "names": ["w", "b"]})
    write(folder, 0, 1, ending="safetensors")
    (folder / "seed0" / "step0030.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "seed0" / "step0031.pt").write_bytes(b"")
    (folder / "seed0" / "step0032.pt").write_text("hello\n")
    (folder / "seed0" / "step0033.txt").write_text("hello\n")
    (folder / "seed0" / "step0034.safetensors").write_bytes(write(folder, 0, 3, ending="safetensors").read_bytes()[:-4])
    (folder / "seed0" / "step0035.safetensors").write_bytes(b"junk")
    (folder / "seed0" / "step0036.pt").mkdir()
    shutil.copy(folder / "seed0" / "step0001.pt", folder / "seed0" / "step1.pt")
    shutil.copy(folder / "seed0" / "step0001.pt", folder / "seed0" / f"step{10**9}.pt")


BAD = [
    (["9"], [], "seed0/step0009.pt: there is no such file"),
    (["36"], [], "seed0/step0036.pt is a folder; name the files in it, as in seed0/step0036.pt/*.pt"),
    (["10"], [], "step0010.pt: tensor 'w' has shape (2, 2), in seed0/step0001.pt it has (3, 2)"),
    (["11"], [], "step0011.pt: tensor 'b' is float64, in seed0/step0001.pt it is float32"),
    (["12"], [], "step0012.pt: it has no tensor 'b', which seed0/step0001.pt has"),
    (["13"], [], "step0013.pt: it has a tensor 'more', which seed0/step0001.pt has not"),
    (["14"], [], "tensor"),
    (["15"], [], "step0015.pt: tensor 'w' is sparse"),
    (["16"], [], "step0016.pt holds 'epoch', 'net'; say with --key under which the state dict is"),
    (["16"], ["--key", "net"], "step0001.pt has no key 'net'; there is 'w', 'b'"),
    (["17"], [], "step0017.pt holds a state dict under each of 'model', 'state_dict'; choose with --key"),
    (["20"], [], "step0020.pt holds a list, not a state dict"),
    (["21"], [], "step0021.pt: 'scale' under 'model' is a value of type int, not a tensor; save the state dict with"),
    (["22"], [], "step0022.pt: 'names' is a value of type list, not a tensor; save the state dict without it"),
    (["30"], [], "step0030.pt cannot be read: it is no checkpoint, is cut off, or damaged"),
    (["31"], [], "step0031.pt cannot be read"),
    (["32"], [], "step0032.pt cannot be read"),
    (["seed0/step0033.txt"], [], "the ending says the format; .pt, .pth, .ckpt, .safetensors can be read"),
    (["seed0/step0034.safetensors"], [], "step0034.safetensors cannot be read: it is no checkpoint, is cut off"),
    (["seed0/step0035.safetensors"], [], "step0035.safetensors cannot be read"),
    (["seed0/step0001.safetensors"], [], "step0001.pt and seed0/step0001.safetensors are both order 'forward', seed 0"),
    (["seed0/step1.pt"], [], "seed0/step0001.pt and seed0/step1.pt are both order 'forward', seed 0, step 1"),
    ([f"seed0/step{10**9}.pt"], [], "step 1000000000 is beyond the largest that can be"),
    (["a.pt", "b.pt"], [], "pattern 'seed{seed}/step{step}.*' does not fit a.pt, b.pt"),
    (["2"], ["--pattern", "seed{seed}/*.pt"], "has no {step}; write it as in seed{seed}/step{step}.pt"),
    (["2"], ["--pattern", "step{step}.pt"], "has no {seed}; add it, or give the seed itself (--seed 0)"),
    (["2"], ["--pattern", "seed{seed}/{epoch}{step}.pt"], "'{epoch}' is not one of {seed}, {step}, {order} and *"),
    (["2"], ["--pattern", "*{seed}/*{step}*.pt", "--seed", "1"], "the pattern has {seed}, so leave --seed out"),
    (["2"], ["--order", "a b"], "order 'a b': use up to 100 characters"),
    (["2"], ["--pattern", "*{step}.pt", "--seed", "-1"], "seed -1 must be a whole number"),
    (["2"], ["--codec", "zip"], "'zip' is not one of"),
    (["2"], ["--snapshot-dtype", "int8"], "'int8' is not one of"),
    (["2"], ["--no-such"], "No such option"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "options", "says"), BAD, ids=[" ".join((*f, *o)) for f, o, _ in BAD])
def test_a_wrong_request_gets_one_clear_line_and_writes_nothing(trajstore, tmp_path, files, options, says):
    broken(tmp_path)
    named = [f"seed0/step{int(f):04}.pt" if f.isdigit() else f for f in ["1", *files]]
    before = everything(tmp_path)
    if "--pattern" not in options:
        options = [*options, "--pattern", PATTERN]
    code, out, err = trajstore("import", "s.zarr", "mine", *named, *options)
    assert (code, out) == (2, "")
    assert err.startswith("trajstore: ")
    assert err.count("\n") == 1
    assert says in err
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("file", "key", "says"),
    [
        (14, None, "step0014.pt: buffer 'w' has dtype complex64; real floats and integers can be stored"),
        (18, None, "step0018.pt holds no parameters"),
        (19, "a.b", "step0019.pt: 'c' under 'a.b' is a value of type int, not a tensor"),
        (19, "a.x", "step0019.pt has no key 'a.x'; there is 'b'"),
        (19, "a.b.c", "step0019.pt: there is no state dict under 'a.b.c', but a int"),
    ],
)
def test_a_wrong_checkpoint_by_itself(tmp_path, file, key, says):
    broken(tmp_path)
    with pytest.raises(ConfigurationError, match=re.escape(says)):
        import_checkpoints(tmp_path / "s", "mine", [tmp_path / "seed0" / f"step{file:04}.pt"], PATTERN, key=key)
    with pytest.raises(ConfigurationError, match="a safetensors file has no nested keys"):
        import_checkpoints(tmp_path / "s", "mine", [tmp_path / "seed0" / "step0001.safetensors"], PATTERN, key="w")
    assert not (tmp_path / "s").exists()


def test_where_the_state_dict_is(tmp_path):
    wraps = {
        None: [lambda t: t, lambda t: {"module": t, "epoch": 1}, lambda t: {"state_dict": t, "loss": [0.5]}],
        "trainer.model": [lambda t: {"trainer": {"model": t, "other": t}}, lambda t: {"trainer.model": t, "model": t}],
    }
    for key, those in wraps.items():
        files = [write(tmp_path / str(key), 0, n, wrap=wrap) for n, wrap in enumerate(those)]
        stored = import_checkpoints(tmp_path / "s", f"key-{key}", files, PATTERN, key=key, **QUICK)
        assert all(same(stored.state_dict(order="forward", seed=0, step=n), state(0, n)) for n in range(len(files)))


def test_files_that_cannot_be_mapped_into_memory_are_read(tmp_path):
    old, new = write(tmp_path, 0, 1, _use_new_zipfile_serialization=False), write(tmp_path, 0, 2)
    packed = tmp_path / "seed0" / "step0003.pt"
    with (
        zipfile.ZipFile(write(tmp_path / "x", 0, 3)) as whole,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as to,
    ):
        for entry in whole.infolist():
            to.writestr(entry.filename, whole.read(entry))
    stored = import_checkpoints(tmp_path / "s", "mine", [old, new, packed], PATTERN, **QUICK)
    assert all(same(stored.state_dict(order="forward", seed=0, step=n), state(0, n)) for n in (1, 2, 3))


def test_tensors_are_one_only_where_they_are_in_every_file(tmp_path):
    one = torch.ones(3)
    tied, apart = {"a": one, "b": one}, {"a": one, "b": torch.zeros(3)}
    files = [write(tmp_path, 0, 1, tied), write(tmp_path, 0, 2, apart), write(tmp_path, 0, 3, tied)]
    stored = import_checkpoints(tmp_path / "s", "mixed", files, PATTERN, **QUICK)
    assert dict(stored.schema.layout.tied) == {}
    assert same(stored.state_dict(order="forward", seed=0, step=2), apart)
    stored = import_checkpoints(tmp_path / "s", "tied", files[::2], PATTERN, **QUICK)
    assert stored.schema.layout.parameters == 3
    before = everything(tmp_path / "s")
    more = [write(tmp_path, 0, 4, tied), write(tmp_path, 0, 5, apart)]
    with pytest.raises(
        ConflictError, match=r"step0005.pt: tensors 'b' and 'a' are one in experiment 'tied', and differ"
    ):
        import_checkpoints(tmp_path / "s", "tied", more, PATTERN, **QUICK)
    assert everything(tmp_path / "s") == before
    equal = {"a": one * 5, "b": one * 5}
    stored = import_checkpoints(tmp_path / "s", "tied", [write(tmp_path, 0, 4, equal)], PATTERN, **QUICK)
    assert same(stored.state_dict(order="forward", seed=0, step=4), equal)


@pytest.mark.parametrize(
    ("pattern", "path", "told"),
    [
        ("seed{seed}/step{step}.pt", "/data/7/seed01/step000300.pt", ("01", "000300", None)),
        ("{order}/{seed}-{step}.pth", "/data/backward/3-4.pth", ("3", "4", "backward")),
        ("run*{seed}/ckpt*{step}*.pt", "/data/run12/ckpt_epoch300_best.pt", ("12", "300", None)),
        ("seed{seed}/seed{seed}_{step}.pt", "/data/seed3/seed3_10.pt", ("3", "10", None)),
        ("seed{seed}/seed{seed}_{step}.pt", "/data/seed3/seed4_10.pt", None),
        ("seed{seed}/step{step}.pt", "/data/aseed3/step1.pt", None),
        ("seed{seed}/step{step}.pt", "/data/seed3/step1.pt.bak", None),
        ("seed{seed}.{step}.pt", "/data/seed3x1.pt", None),
        ("s{seed}/*/{step}.pt", "/data/s3/a/b/1.pt", None),
    ],
)
def test_what_a_path_says(pattern, path, told):
    found = Pattern(pattern).match(Path(path))
    assert told == (None if found is None else (found["seed"], found["step"], found.get("order")))


def test_a_path_that_can_be_read_in_two_ways_is_refused():
    with pytest.raises(ConfigurationError, match=r"fits /data/a1b2c3.pt in two ways"):
        Pattern("*{seed}*{step}.pt").match(Path("/data/a1b2c3.pt"))


def test_an_import_cannot_be_replayed_and_a_store_can_but_for_it(trajstore, tmp_path):
    import_checkpoints(tmp_path / "s.zarr", "mine", [write(tmp_path, 0, 1)], PATTERN, **QUICK)
    why = "experiment 'mine' was imported, and how to compute it is not stored: it cannot be replayed"
    told = f"trajstore: {why}; `trajstore verify` without --replay checks what is stored\n"
    assert trajstore("verify", "s.zarr", "mine", "--replay") == (2, "", told)
    ts.run(ts.Experiment.preset("quadratic", {"steps": 2, "seeds": [0], "orders": ["forward"]}), tmp_path / "s.zarr")
    code, out, err = trajstore("verify", "s.zarr", "--replay")
    same = "experiment 'quadratic', order 'forward', seed 0: 3 steps came out the same, bit for bit"
    assert (code, out.splitlines(), err) == (0, [same, why, "s.zarr: sound"], "")


def test_what_is_not_there_is_to_be_imported_and_not_resumed(tmp_path):
    files = [write(tmp_path, 0, 1), write(tmp_path, 0, 2), write(tmp_path, 1, 1)]
    stored = import_checkpoints(tmp_path / "s", "mine", files, PATTERN, order="forward", **QUICK)
    with pytest.raises(NotFoundError, match=r"seed 1: step 2 was not imported; the nearest .* step 1; import checkpoi"):
        export_state(stored, tmp_path / "x.safetensors", order="forward", seed=1, step=2)
    import_checkpoints(tmp_path / "s", "mine", [write(tmp_path, 2, 1)], PATTERN, order="other", **QUICK)
    stored = ts.open(tmp_path / "s")["mine"]
    with pytest.raises(NotFoundError, match="seed 2: step 1 is not recorded yet; import checkpoints of it"):
        stored.state_dict(order="forward", seed=2, step=1)
    with pytest.raises(NotFoundError, match="order 'forward', seed 2: nothing is recorded yet; import checkpoints"):
        export_metrics(stored, tmp_path / "x.parquet", orders=["forward"], seeds=[2])


def test_orders_come_from_the_names_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for order, n in (("forward", 1), ("shuffled", 2)):
        Path(order).mkdir()
        torch.save(state(0, n), f"{order}/{n}.pt")
    files = ["forward/1.pt", "shuffled/2.pt"]
    stored = import_checkpoints("s", "mine", files, "{order}/{step}.pt", seed=5, **QUICK)
    assert (stored.schema.orders, stored.schema.seeds) == (("forward", "shuffled"), (5,))
    assert same(stored.state_dict(order="shuffled", seed=5, step=2), state(0, 2))


@pytest.mark.parametrize("more", [-1, 1, 10**7])
def test_what_is_stored_is_compared_only_if_it_is_as_long_as_it_says(more: int, tmp_path: Path) -> None:
    """A chunk of states may come from a stranger: it fills no more memory than its array declares."""
    files = [write(tmp_path, 0, n) for n in (10, 20)]
    path = tmp_path / "s.zarr"
    import_checkpoints(path, "mine", files, PATTERN, **QUICK)
    chunk = path / "mine" / "params" / "c" / "0" / "0" / "0" / "0"
    array = json.loads((path / "mine" / "params" / "zarr.json").read_text())
    numbers = int(np.prod(array["chunk_grid"]["configuration"]["chunk_shape"]))
    chunk.write_bytes(state_chunk(numbers + more, array["data_type"]))
    with pytest.raises(DamageError, match=r"seed 0, step 10.*another number of values"):
        import_checkpoints(path, "mine", files, PATTERN, **QUICK)
