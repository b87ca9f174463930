"""The recorder: what a training loop did is what is stored, whatever becomes of the loop."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import trajstore as ts
from tests.tools.hostile import rewrite
from tests.tools.waiting import HANGS
from trajstore.errors import BusyError, ConfigurationError, ConflictError, NotFoundError, ResumedWarning
from trajstore.reading.verify import verify

X = torch.linspace(-1, 1, 32)[:, None]
QUICK = {"durability": "none"}


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(1, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 6), nn.Linear(6, 1)
    )
    net.append(nn.Linear(6, 1))
    del net[-1]
    return net


def train(rec, net, optimizer, until: int, seen=None, scheduler=None, **how) -> None:
    """A loop as people write it; its batches depend on the step alone."""
    for n in range(rec.last + 1, until + 1):
        batch = X[torch.randperm(32, generator=torch.Generator().manual_seed(n))[:8]]
        loss = nn.functional.mse_loss(net(batch), batch.square())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        rec.step(loss=loss, lr=optimizer.param_groups[0]["lr"], **how)
        if seen is not None:
            seen[n] = {k: v.detach().clone() for k, v in net.state_dict().items()}


def test_what_the_loop_did_is_what_is_stored(tmp_path):
    net = model()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    seen = {0: {k: v.detach().clone() for k, v in net.state_dict().items()}}
    with ts.record(tmp_path / "s.zarr", "mine", net, seed=3, optimizer=optimizer, config={"width": 6}, **QUICK) as rec:
        train(rec, net, optimizer, 150, seen)
    stored = ts.open(tmp_path / "s.zarr")["mine"]
    for n in (0, 1, 63, 64, 100, 150):
        found = stored.state_dict(order="forward", seed=3, step=n)
        assert found.keys() == seen[n].keys()
        assert all(torch.equal(found[name], seen[n][name]) for name in found)
    fresh = model()
    fresh.load_state_dict(stored.state_dict(order="forward", seed=3, step=150))
    ds = stored.dataset().sel(order="forward", seed=3)
    assert ds.recorded.values.sum() == 151
    weights = [torch.cat([seen[n][k].flatten().double() for k, _ in net.named_parameters()]) for n in range(151)]
    assert np.allclose(ds.param_norm[:151], [w.norm() for w in weights])
    assert np.allclose(ds.start_distance[:151], [(w - weights[0]).norm() for w in weights])
    assert np.allclose(ds.step_distance[1:151], [(b - a).norm() for a, b in pairwise(weights)])
    assert np.isfinite(ds.loss[1:151]).all()
    assert np.isnan(ds.loss[0])
    row = stored.store.sql("SELECT width, lr, operator, complete, last_step FROM runs").fetchall()
    assert row == [(6, 0.01, "adam", True, 150)]
    assert list(verify(stored.store)) == []


@pytest.mark.parametrize("memory", [False, True])
def test_resuming_gives_the_same_bytes_as_never_stopping(tmp_path, memory):
    """Dropout draws from torch's generator, Adam has a memory, the rate a schedule: all of it is put back."""

    def recorded(path, until, **how):
        net = model()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
        rec = ts.record(
            path,
            "mine",
            net,
            optimizer=optimizer,
            also={"scheduler": scheduler},
            optimizer_state=memory,
            **how,
            **QUICK,
        )
        with rec:
            train(rec, net, optimizer, until, scheduler=scheduler)
        return ts.open(path)["mine"].dataset().load()

    whole = recorded(tmp_path / "a.zarr", 90)
    recorded(tmp_path / "b.zarr", 37)
    torch.rand(5)
    with pytest.warns(ResumedWarning, match="resumed at step 37. Your loop has to go on with the batches after that"):
        again = recorded(tmp_path / "b.zarr", 90, resume=True)
    assert again.identical(whole.assign_attrs(again.attrs))
    if memory:
        layout = ts.open(tmp_path / "a.zarr")["mine"].schema.layout
        exp_avg = next(e for e in layout.entries if e.name == "exp_avg/0.weight")
        moments = whole.params[0, 0, exp_avg.offset : exp_avg.offset + 6].values
        assert not moments[:, 0].any()
        assert moments[:, 1:91].all()


def test_after_an_error_in_the_loop_what_was_recorded_is_there_and_goes_on(tmp_path):
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def interrupted() -> None:
        with ts.record(tmp_path / "s.zarr", "a", net, optimizer=optimizer, **QUICK) as rec:
            train(rec, net, optimizer, 70)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    (slab,) = ts.open(tmp_path / "s.zarr")["a"].slabs()
    assert (slab.last_step, slab.complete) == (70, False)
    with pytest.warns(ResumedWarning, match="at step 70"):
        rec = ts.record(tmp_path / "s.zarr", "a", net, optimizer=optimizer, resume=True, **QUICK).__enter__()
    assert (rec.last, rec.resumed) == (70, True)
    train(rec, net, optimizer, 80)
    with torch.no_grad():
        net[0].weight += 1  # in the middle of a step: this is not the state of step 80
    rec.close()
    rec = ts.record(tmp_path / "s.zarr", "a", net, optimizer=optimizer, resume=True, **QUICK)
    told = "at step 70.*steps 71 to 80 are recorded already and must come out the same"
    with pytest.warns(ResumedWarning, match=told):
        rec.__enter__()
    train(rec, net, optimizer, 82)
    rec.close()
    assert ts.open(tmp_path / "s.zarr")["a"].slabs()[0].last_step == 82


def test_mutating_a_tensor_right_after_the_step_changes_nothing_that_is_stored(tmp_path):
    net = nn.Linear(300, 300)
    with ts.record(tmp_path / "s.zarr", "a", net, steps=20, **QUICK) as rec, torch.no_grad():
        for n in range(1, 21):
            net.weight.fill_(n)
            net.bias.fill_(-n)
            rec.step()
            net.weight.fill_(float("nan"))
    stored = ts.open(tmp_path / "s.zarr")["a"]
    for n in range(1, 21):
        state = stored.state_dict(order="forward", seed=0, step=n)
        assert (state["weight"] == n).all()
        assert (state["bias"] == -n).all()


def test_policies_layers_and_precision(tmp_path):
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    policy = ts.every(50) | ts.window(0, 3)
    how = {"snapshots": policy, "layers": ["4.*", "1.running_*"], "dtype": "bfloat16"}
    seen: dict = {}
    with ts.record(tmp_path / "s.zarr", "a", net, optimizer=optimizer, **how, **QUICK) as rec:
        train(rec, net, optimizer, 120, seen)
    stored = ts.open(tmp_path / "s.zarr")["a"]
    assert [n for n in stored.schema.snapshots if n <= 120] == [0, 1, 2, 3, 50, 100]
    state = stored.state_dict(order="forward", seed=0, step=100)
    assert set(state) == {"4.weight", "4.bias", "1.running_mean", "1.running_var"}
    assert torch.equal(state["4.weight"], seen[100]["4.weight"].bfloat16().float())
    with pytest.raises(NotFoundError, match="no state is stored for step 99"):
        stored.state_dict(order="forward", seed=0, step=99)
    ds = stored.dataset()
    assert ds.recorded.values.sum() == 121
    assert stored.schema.parameters == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_every_precision_comes_back_exactly(tmp_path, kind):
    net = nn.Linear(40, 40).to(kind)
    seen = []
    with ts.record(tmp_path / "s.zarr", "a", net, steps=5, **QUICK) as rec, torch.no_grad():
        for _ in range(5):
            net.weight += torch.randn_like(net.weight)
            rec.step()
            seen.append(net.weight.detach().clone())
    stored = ts.open(tmp_path / "s.zarr")["a"]
    for n, weight in enumerate(seen, start=1):
        found = stored.state_dict(order="forward", seed=0, step=n)["weight"]
        assert found.dtype == kind
        assert torch.equal(found, weight)


def test_metrics_appear_when_they_like_and_batches_are_told_apart(tmp_path):
    net = nn.Linear(2, 1)
    with ts.record(tmp_path / "s.zarr", "a", net, steps=10, **QUICK) as rec:
        rec.log(loss=7.0)
        for n in range(1, 11):
            rec.step(loss=torch.tensor(1.0 / n), batch=torch.tensor([n % 2, 5]))
            if n % 5 == 0:
                rec.log(val_loss=np.float32(n))
    ds = ts.open(tmp_path / "s.zarr")["a"].dataset().sel(order="forward", seed=0)
    assert ds.loss.values.tolist() == pytest.approx([7.0, *(1 / n for n in range(1, 11))])
    assert [n for n in range(11) if np.isfinite(ds.val_loss[n])] == [5, 10]
    batches = ds.batch_id.values
    assert len(set(batches[1:].tolist())) == 2
    assert batches[1] == batches[3] != batches[2]
    assert list(verify(ts.open(tmp_path / "s.zarr"))) == []


def test_what_is_known_later_may_come_in_any_order_of_steps(tmp_path):
    net = nn.Linear(2, 1)
    with ts.record(tmp_path / "s.zarr", "a", net, steps=200, **QUICK) as rec:
        for n in range(1, 201):
            rec.step(loss=n)
            if n % 20 == 0:
                rec.log(n - 20, sharpness=-n)
        for step, value in ((3, 0.5), (1, float("nan")), (2, 7)):
            rec.log(step, sharpness=value)
        with pytest.raises(ConflictError, match="'loss' is given with its step, and step 5 is recorded already"):
            rec.log(5, loss=1)
        with pytest.raises(ConflictError, match="'sharpness' already has another value at step 3"):
            rec.log(3, sharpness=0.6)
        with pytest.raises(ConflictError, match="step 201 is not recorded yet"):
            rec.log(201, sharpness=0.6)
    stored = ts.open(tmp_path / "s.zarr")["a"]
    expected = {20 * k: -20.0 * (k + 1) for k in range(10)} | {3: 0.5, 2: 7.0}
    found = stored.dataset().sharpness.sel(order="forward", seed=0)
    assert {n: float(found[n]) for n in range(201) if not np.isnan(found[n])} == expected
    query = "SELECT count(sharpness), count(*) FILTER (isnan(sharpness)), count(*) FROM metrics"
    assert stored.store.sql(query).fetchall() == [(13, 1, 201)]  # not a number is not the same as not measured
    assert list(verify(stored.store)) == []
    with pytest.warns(ResumedWarning):
        rec = ts.record(tmp_path / "s.zarr", "a", net, steps=200, resume=True, **QUICK).__enter__()
    rec.log(100, sharpness=-120)
    rec.log(7, sharpness=1)
    rec.close()
    assert float(stored.dataset().sharpness[0, 0, 7]) == 1
    (chunk,) = (tmp_path / "s.zarr/a/sharpness/c").rglob("0/0/0")
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (finding,) = [f for f in verify(stored.store) if "chunk" not in f.what]
    assert "steps 0 to 200: 'sharpness' is not what was committed" in str(finding)
    list(verify(stored.store, repair=True))
    assert [found for found in verify(stored.store) if not found.harmless] == []


def test_a_recording_may_be_longer_than_was_said(tmp_path, monkeypatch):
    monkeypatch.setattr("trajstore.recording.loop.recorder._GROWTH", 16)
    net = nn.Linear(2, 1)
    with ts.record(tmp_path / "s.zarr", "a", net, steps=10, **QUICK) as rec, torch.no_grad():
        for n in range(1, 100):
            net.weight.fill_(n)
            rec.step(loss=n)
    stored = ts.open(tmp_path / "s.zarr")["a"]
    assert stored.schema.steps >= 99
    assert [s.last_step for s in stored.slabs()] == [99]
    assert stored.dataset().params[0, 0, 0, :100].values.tolist()[1:] == list(range(1, 100))
    assert list(verify(stored.store)) == []


def test_many_seeds_and_orders_of_one_loop(tmp_path):
    for order in ("forward", "shuffled"):
        for seed in (2, 0):
            net = nn.Linear(2, 1)
            with ts.record(tmp_path / "s.zarr", "a", net, seed=seed, order=order, steps=4, **QUICK) as rec:
                for _ in range(4):
                    rec.step(loss=seed)
    stored = ts.open(tmp_path / "s.zarr")["a"]
    assert (stored.schema.orders, stored.schema.seeds) == (("forward", "shuffled"), (2, 0))
    assert all(slab.complete and slab.last_step == 4 for slab in stored.slabs())


def test_wrong_requests_are_told(tmp_path):
    net, path = nn.Linear(2, 1), tmp_path / "s.zarr"
    for wrong, message in [
        ({"layers": "conv*"}, "layers: no parameter is named like 'conv\\*'"),
        ({"dtype": "int8"}, "dtype is 'int8'; choose one of float32"),
        ({"optimizer_state": True}, "give the optimizer"),
        ({"order": "a b"}, "order 'a b'"),
        ({"seed": -1}, "seed -1"),
        ({"also": {"x": 3}}, "also: 'x' has no state_dict"),
        ({"config": {"f": torch.nn}}, "config: 'f' is a module"),
        ({"sketch": 100}, "power of two"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            ts.record(path, "a", net, **wrong)
    with pytest.raises(ConfigurationError, match=r"every\(0\)"):
        ts.every(0)
    assert not path.exists()
    with ts.record(path, "a", net, steps=4, **QUICK) as rec:
        with pytest.raises(ConfigurationError, match=r"metric 'loss' is a Tensor of shape \(3,\); give one number"):
            rec.step(loss=torch.zeros(3))
        rec.step(loss=1)
        with pytest.raises(ConflictError, match="step 1 comes after step 1"):
            rec.step(1)
        with pytest.raises(BusyError, match="order 'forward', seed 0 is being written by process"):
            ts.record(path, "a", net, resume=True).__enter__()
    with pytest.raises(ConflictError, match="is recorded already, up to step 1; give resume=True to continue"):
        ts.record(path, "a", net).__enter__()
    with pytest.raises(ConflictError, match=r"differs in record.snapshots: 'every\(1\)' / 'every\(2\)'"):
        ts.record(path, "a", net, snapshots=ts.every(2), seed=1).__enter__()
    with pytest.raises(ConflictError, match="differs in parameter weight"):
        ts.record(path, "a", nn.Linear(3, 1), seed=1).__enter__()
    rec = ts.record(path, "b", net, **QUICK).__enter__()
    for name, told in (("seed", "an array or column has that name"), ("param_norm", "every experiment has one")):
        with pytest.raises(ConfigurationError, match=f"metric '{name}': {told}"):
            rec.step(**{name: 1})
    rec.close()


def test_an_error_on_the_way_reaches_the_loop(tmp_path, monkeypatch):
    from trajstore.errors import WriteError
    from trajstore.storage.places.durable import DurableStore

    original = DurableStore.set_sync

    def full(self, key, value):
        if "params/c" in key:
            raise OSError(28, "No space left on device")
        original(self, key, value)

    monkeypatch.setattr(DurableStore, "set_sync", full)
    net = nn.Linear(50, 50)
    told = r"seed 0: steps 0 to \d+ could not be written \(No space left on device\)"
    rec = ts.record(tmp_path / "s.zarr", "a", net, **QUICK).__enter__()

    def go_on() -> None:
        for _ in range(100_000):
            rec.step()

    with pytest.raises(WriteError, match=told):
        go_on()
    with pytest.raises(WriteError, match=told):
        rec.close()


def test_a_loop_that_dies_without_closing_does_not_hang(tmp_path):
    program = textwrap.dedent(
        """
        import sys, torch, trajstore as ts
        rec = ts.record(sys.argv[1], "a", torch.nn.Linear(100, 100)).__enter__()
        for _ in range(200):
            rec.step(loss=1.0)
        raise SystemExit(7)
        """
    )
    command = [sys.executable, "-c", program, str(tmp_path / "s.zarr")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=False)
    assert (ended.returncode, ended.stderr) == (7, "")
    (slab,) = ts.open(tmp_path / "s.zarr")["a"].slabs()
    assert slab.last_step == 200
    assert list(verify(ts.open(tmp_path / "s.zarr"))) == []


def test_a_loop_that_was_begun_with_a_family_of_its_own_goes_on(tmp_path):
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with ts.record(tmp_path / "s.zarr", "a", net, optimizer=optimizer, steps=20, **QUICK) as rec:
        train(rec, net, optimizer, 5)
    rewrite(tmp_path / "s.zarr", "a", lambda attributes: attributes["config"]["problem"].update(family="mine"))
    how = {"optimizer": optimizer, "config": {"family": "mine"}, "steps": 20, "resume": True}
    with pytest.warns(ResumedWarning), ts.record(tmp_path / "s.zarr", "a", net, **how, **QUICK) as rec:
        train(rec, net, optimizer, 9)
    assert ts.open(tmp_path / "s.zarr")["a"].slabs()[0].last_step == 9
    with pytest.raises(ConfigurationError, match="'family' is how trajstore marks a loop"):
        ts.record(tmp_path / "s.zarr", "b", net, config={"family": "mine"})
