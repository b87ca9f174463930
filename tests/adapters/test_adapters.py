"""The adapters: what a trainer of another library did is what is stored, and its own checkpoints decide."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trajstore as ts
from trajstore.adapters._names import Names
from trajstore.errors import ConfigurationError, ConflictError
from trajstore.reading.verify import verify
from trajstore.storage.format.metrics import MEASURES

# What other libraries warn of when they use each other, or find in a tiny training.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
    *(
        pytest.mark.filterwarnings(f"ignore:::{library}")
        for library in ("accelerate", "lightning", "pytorch_lightning", "torchmetrics", "transformers")
    ),
]

QUICK = {"durability": "none"}
X = torch.linspace(-1, 1, 32)[:, None]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors of a few numbers are no work for several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def copied(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def witness(model, optimizer, seen):
    """See the model after each step of its optimizer, through torch's own hook: no trainer is asked."""
    optimizer.register_step_post_hook(lambda *_: seen.append((copied(model), optimizer.param_groups[0]["lr"])))


def assert_recorded(path, seen, start):
    stored = ts.open(path)["a"]
    (slab,) = stored.slabs()
    assert slab.last_step == len(seen)
    for n, state in enumerate([start, *(state for state, _ in seen)]):
        found = stored.state_dict(order="forward", seed=0, step=n)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state), n
    rates = stored.dataset().lr.sel(order="forward", seed=0).values
    assert rates[1 : len(seen) + 1].tolist() == [lr for _, lr in seen]
    assert list(verify(stored.store)) == []


def contents(path):
    """What is stored, without when and where it was made."""
    return ts.open(path)["a"].dataset().load().drop_attrs(deep=False)


def assert_equal(path, whole):
    assert contents(path).identical(contents(whole))
    assert list(verify(ts.open(path))) == []


# ---------------------------------------------------------------------------------------------------- Lightning


@pytest.fixture(scope="module")
def lightning():
    pytest.importorskip("pytorch_lightning", reason="needs the extra: pip install 'trajstore[lightning]'")
    return import_module("trajstore.adapters.lightning")


def module(lightning, *, seen=None, losses=None, fail_at=None, dropout=0.0, seed=0):
    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Linear(1, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(dropout), nn.Linear(6, 1)
            )
            self.batches = 0

        def training_step(self, batch, index):
            self.batches += 1
            if self.batches == fail_at:
                raise RuntimeError("in the middle")
            loss = nn.functional.mse_loss(self.net(batch[0]), batch[0].square())
            if losses is not None:
                losses.append(loss.item())
            self.log("train/loss", loss, on_step=True, on_epoch=True)
            self.log("step", float(index))
            return loss

        def validation_step(self, batch, index):
            self.log("val/loss", nn.functional.mse_loss(self.net(batch[0]), batch[0].square()))

        def on_train_epoch_end(self):
            self.log("late", float(self.current_epoch))

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
            if seen is not None:
                witness(self, optimizer, seen)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Net()


def trained(lightning, path, net, epochs, *, saves=None, checkpoint=None, parts=3, **how):
    callbacks = [lightning.RecorderCallback(path, "a", **how, **QUICK)]
    if saves is not None:
        home = lightning.Trainer.__module__.partition(".trainer")[0]
        keeper = import_module(f"{home}.callbacks").ModelCheckpoint
        callbacks.append(keeper(saves, "{epoch}", save_top_k=-1))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=parts,
        callbacks=callbacks,
        default_root_dir=path.parent,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=saves is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = DataLoader(TensorDataset(X), batch_size=4)
    trainer.fit(net, batches, batches, ckpt_path=checkpoint)


@pytest.fixture(scope="module")
def whole(lightning, tmp_path_factory):
    """A training that nothing interrupts, with its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    trained(lightning, folder / "s.zarr", module(lightning), 4, saves=folder)
    return folder


def test_lightning_records_every_step(lightning, tmp_path):
    seen, losses = [], []
    net = module(lightning, seen=seen, losses=losses, dropout=0.2)
    start = copied(net)
    trained(lightning, tmp_path / "s.zarr", net, 8)
    assert_recorded(tmp_path / "s.zarr", seen, start)
    assert len(seen) == 24
    ds = ts.open(tmp_path / "s.zarr")["a"].dataset().sel(order="forward", seed=0)
    assert (ts.open(tmp_path / "s.zarr")["a"].slabs()[0].complete, ds.sizes["step"]) == (True, 25)
    parts = [losses[8 * epoch + k : 8 * epoch + min(k + 3, 8)] for epoch in range(8) for k in (0, 3, 6)]
    assert ds.loss.values[1:] == pytest.approx([sum(part) / 3 for part in parts])
    assert [n for n in range(25) if np.isfinite(ds.val_loss[n])] == list(range(3, 25, 3))
    assert ds.late.values[3::3].tolist() == list(range(8))
    assert np.isfinite(ds.train_loss_step.values[1:]).all()
    assert ds.train_loss_epoch.values[3::3] == pytest.approx(np.reshape(losses, (8, 8)).mean(1))
    assert ds.step_.values[[1, 2, 3]].tolist() == [2, 5, 7]
    assert np.isnan(ds.loss[0])


def test_lightning_commits_what_came_before_an_error(lightning, tmp_path):
    seen = []
    net = module(lightning, seen=seen, fail_at=23)
    start = copied(net)
    with pytest.raises(RuntimeError, match="in the middle"):
        trained(lightning, tmp_path / "s.zarr", net, 4)
    assert_recorded(tmp_path / "s.zarr", seen, start)
    assert (len(seen), ts.open(tmp_path / "s.zarr")["a"].slabs()[0].complete) == (8, False)


@pytest.mark.parametrize("checkpoint", ["epoch=1.ckpt", "epoch=0.ckpt", None])
def test_lightning_goes_on_from_its_own_checkpoint(lightning, tmp_path, whole, checkpoint):
    """From one of the last recorded step, from an earlier one, or from none."""
    path = tmp_path / "s.zarr"
    trained(lightning, path, module(lightning), 2, saves=tmp_path)
    net = module(lightning, seed=7 if checkpoint else 0)
    trained(lightning, path, net, 4, checkpoint=checkpoint and tmp_path / checkpoint, resume=True)
    assert_equal(path, whole / "s.zarr")


def test_lightning_goes_on_after_an_error(lightning, tmp_path, whole):
    path = tmp_path / "s.zarr"
    with pytest.raises(RuntimeError, match="in the middle"):
        trained(lightning, path, module(lightning, fail_at=20), 4, saves=tmp_path)
    assert ts.open(path)["a"].slabs()[0].last_step == 7
    trained(lightning, path, module(lightning, seed=7), 4, checkpoint=tmp_path / "epoch=1.ckpt", resume=True)
    assert_equal(path, whole / "s.zarr")


def test_lightning_goes_on_after_an_error_within_a_step(lightning, tmp_path, whole):
    """Batch normalization has moved on since the last step, so the state to go on from is the checkpoint's."""
    path = tmp_path / "s.zarr"
    with pytest.raises(RuntimeError, match="in the middle"):
        trained(lightning, path, module(lightning, fail_at=21), 4, saves=tmp_path)
    trained(lightning, path, module(lightning, seed=7), 4, checkpoint=tmp_path / "epoch=1.ckpt", resume=True)
    assert_equal(path, whole / "s.zarr")


def test_lightning_refuses_what_cannot_go_on(lightning, tmp_path, whole):
    path = tmp_path / "s.zarr"
    trained(lightning, path, module(lightning), 2)
    with pytest.raises(ConflictError, match="is recorded already, up to step 6; give resume=True"):
        trained(lightning, path, module(lightning), 4)
    with pytest.raises(ConflictError, match="seed 0: the trainer's step 0 differs from the recorded step 0; give the"):
        trained(lightning, path, module(lightning, seed=1), 4, resume=True)
    with pytest.raises(ConflictError, match="the trainer's step 1 differs from the recorded step 1"):
        trained(lightning, path, module(lightning, dropout=0.5), 4, resume=True)
    with pytest.raises(ConflictError, match="the trainer resumes at step 9, but the recording at step 6; give"):
        trained(lightning, path, module(lightning), 4, checkpoint=whole / "epoch=2.ckpt", resume=True)
    assert ts.open(path)["a"].slabs()[0].last_step == 6
    trained(lightning, path, module(lightning), 4, checkpoint=whole / "epoch=1.ckpt", resume=True)
    assert_equal(path, whole / "s.zarr")


def test_lightning_counts_from_where_a_recording_begins(lightning, tmp_path, whole):
    trained(lightning, tmp_path / "s.zarr", module(lightning), 3, checkpoint=whole / "epoch=1.ckpt")
    stored = ts.open(tmp_path / "s.zarr")["a"]
    assert (stored.slabs()[0].last_step, stored.slabs()[0].complete) == (3, True)
    begun = stored.state_dict(order="forward", seed=0, step=0)
    there = ts.open(whole / "s.zarr")["a"].state_dict(order="forward", seed=0, step=6)
    assert all(torch.equal(begun[name], there[name]) for name in there)


def test_lightning_with_two_optimizers(lightning, tmp_path):
    """The last of a batch's steps is recorded."""

    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(1, 1), nn.Linear(1, 1)
            self.automatic_optimization = False

        def training_step(self, batch, index):
            for optimizer, layer in zip(self.optimizers(), (self.one, self.other), strict=True):
                optimizer.zero_grad()
                self.manual_backward(layer(batch[0]).square().mean())
                optimizer.step()

        def configure_optimizers(self):
            one, other = (torch.optim.SGD(layer.parameters(), lr) for layer, lr in ((self.one, 0.1), (self.other, 0.2)))
            witness(self, other, seen)
            return one, other

    seen = []
    trained(lightning, tmp_path / "s.zarr", Net(), 1, parts=1)
    stored = ts.open(tmp_path / "s.zarr")["a"]
    ds = stored.dataset().sel(order="forward", seed=0)
    assert np.flatnonzero(ds.recorded).tolist() == list(range(0, 17, 2))
    assert (ds.lr.values[2], ds.lr_1.values[2]) == (0.1, 0.2)
    last = stored.state_dict(order="forward", seed=0, step=16)
    assert all(torch.equal(last[name], seen[-1][0][name]) for name in last)


# ------------------------------------------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def hugging():
    for library in ("transformers", "accelerate"):
        pytest.importorskip(library, reason="needs the extra: pip install 'trajstore[transformers]'")
    return import_module("trajstore.adapters.transformers")


def language_model(seed=0):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    size = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 8, "vocab_size": 11}
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))


def prepared(hugging, path, model, steps, *, fail_at=None, seen=None, saves=None, **how):
    """Return a trainer and its recorder; its model has dropout, its batches are shuffled."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Fails(TrainerCallback):
        def on_step_begin(self, args, state, control, **others):
            if state.global_step == fail_at:
                raise RuntimeError("in the middle")

    class Watched(Trainer):
        def create_optimizer(self, *args):
            optimizer = super().create_optimizer(*args)
            if seen is not None:
                witness(model, optimizer, seen)
            return optimizer

    arguments = TrainingArguments(
        output_dir=str(saves or path.parent),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_steps=steps,
        learning_rate=0.01,
        weight_decay=0.1,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=4,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="no" if saves is None else "steps",
        save_steps=3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    words = torch.randint(0, 11, (40, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in words]
    recorder = hugging.RecorderCallback(path, "a", **how, **QUICK)
    return Watched(model, arguments, train_dataset=data, eval_dataset=data[:4], callbacks=[recorder, Fails()]), recorder


@pytest.fixture(scope="module")
def hugged(hugging, tmp_path_factory):
    """A training that nothing interrupts, with its checkpoints."""
    folder = tmp_path_factory.mktemp("hugged")
    prepared(hugging, folder / "s.zarr", language_model(), 12, saves=folder)[0].train()
    return folder


def test_transformers_records_every_step(hugging, tmp_path):
    seen, model = [], language_model()
    start = copied(model)
    trainer, _ = prepared(hugging, tmp_path / "s.zarr", model, 18, seen=seen)
    trainer.train()
    assert_recorded(tmp_path / "s.zarr", seen, start)
    assert len(seen) == 18
    stored = ts.open(tmp_path / "s.zarr")["a"]
    assert (stored.slabs()[0].complete, stored.operator) == (True, "adamw")
    ds = stored.dataset().sel(order="forward", seed=0)
    told = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert ds.loss.values[1:].tolist() == told
    assert [n for n in range(19) if np.isfinite(ds.eval_loss[n])] == [3, 6, 9, 12, 15, 18]
    assert ds.lr.values[1:6] == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.01])
    assert set(stored.schema.metrics) - set(MEASURES) == {"lr", "loss", "grad_norm", "epoch", "eval_loss"}


def test_transformers_commits_what_came_before_an_error(hugging, tmp_path):
    seen, model = [], language_model()
    start = copied(model)
    trainer, recorder = prepared(hugging, tmp_path / "s.zarr", model, 12, seen=seen, fail_at=8)
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.train()
    recorder.close()
    assert len(seen) == 8
    assert_recorded(tmp_path / "s.zarr", seen, start)


@pytest.mark.parametrize("checkpoint", ["checkpoint-6", "checkpoint-3", None])
def test_transformers_goes_on_from_its_own_checkpoint(hugging, tmp_path, hugged, checkpoint):
    """From one of the last recorded step, from an earlier one, or from none."""
    path = tmp_path / "s.zarr"
    prepared(hugging, path, language_model(), 6, saves=tmp_path)[0].train()
    trainer, _ = prepared(hugging, path, language_model(seed=7 if checkpoint else 0), 12, resume=True)
    trainer.train(resume_from_checkpoint=checkpoint and str(tmp_path / checkpoint))
    assert_equal(path, hugged / "s.zarr")


def test_transformers_trains_again_after_an_error_with_the_same_callback(hugging, tmp_path, hugged):
    path = tmp_path / "s.zarr"
    trainer, recorder = prepared(hugging, path, language_model(), 12, saves=tmp_path, fail_at=8, resume=True)
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.train()
    again, unused = prepared(hugging, tmp_path / "unused.zarr", language_model(7), 12)
    again.remove_callback(unused)
    again.add_callback(recorder)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_equal(path, hugged / "s.zarr")


def test_transformers_goes_on_after_it_was_killed(hugging, tmp_path, hugged):
    path = tmp_path / "s.zarr"
    program = textwrap.dedent(
        """
        import os, sys, torch
        from importlib import import_module
        from pathlib import Path
        from tests import test_adapters as t
        torch.set_num_threads(1)
        hugging, folder = import_module("trajstore.adapters.transformers"), Path(sys.argv[1])
        trainer, recorder = t.prepared(hugging, folder / "s.zarr", t.language_model(), 12, saves=folder)
        def killed(args, state, control, **others):
            if state.global_step == 8:
                while t.ts.open(folder / "s.zarr")["a"].slabs()[0].last_step < 6:
                    pass
                os.kill(os.getpid(), 9)
        recorder.on_step_begin = killed
        trainer.train()
        """
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, check=False)
    assert ended.returncode == -9
    trainer, _ = prepared(hugging, path, language_model(7), 12, resume=True)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_equal(path, hugged / "s.zarr")


def test_transformers_refuses_what_cannot_go_on(hugging, tmp_path, hugged):
    path = tmp_path / "s.zarr"
    prepared(hugging, path, language_model(), 6)[0].train()
    trainer, _ = prepared(hugging, path, language_model(), 12)
    with pytest.raises(ConflictError, match="is recorded already, up to step 6; give resume=True"):
        trainer.train()
    trainer, _ = prepared(hugging, path, language_model(3), 12, resume=True)
    with pytest.raises(ConflictError, match="the trainer's step 0 differs from the recorded step 0"):
        trainer.train()
    with pytest.raises(ConflictError, match="the trainer resumes at step 9, but the recording at step 6"):
        trainer.train(resume_from_checkpoint=str(hugged / "checkpoint-9"))
    trainer.train(resume_from_checkpoint=str(hugged / "checkpoint-6"))
    assert_equal(path, hugged / "s.zarr")


# --------------------------------------------------------------------------------------------------------- both


def test_names_that_the_store_can_hold(tmp_path):
    with ts.record(tmp_path / "s.zarr", "a", nn.Linear(1, 1), **QUICK) as rec:
        names = Names(ts.open(tmp_path / "s.zarr")["a"].schema)
        asked = [
            "loss",
            "val/acc",
            "val_acc",
            "Val_Acc",
            "step",
            "seed",
            "1st",
            "é",
            "",
            "param_norm",
            "a" * 200,
            "val/acc",
        ]
        given = [names[name] for name in asked]
        rec.step(**dict.fromkeys(given, 1.0))
    first = ["loss", "val_acc", "val_acc_", "Val_Acc__", "step_", "seed_", "_1st", "_", "__", "param_norm_"]
    assert given[: len(first)] == first
    assert given[-1] == given[1]
    assert set(given) < set(ts.open(tmp_path / "s.zarr")["a"].schema.metrics)


def test_importing_trajstore_imports_none_of_these_libraries():
    program = "import sys, trajstore as ts; ts.record; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"lightning", "pytorch_lightning", "transformers", "accelerate"} & set(told.stdout.split())


@pytest.mark.parametrize(
    ("adapter", "libraries"), [("lightning", ("lightning", "pytorch_lightning")), ("transformers", ("transformers",))]
)
def test_a_missing_library_is_named_with_its_extra(adapter, libraries):
    program = f"import sys; sys.modules.update(dict.fromkeys({libraries!r})); import trajstore.adapters.{adapter}"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert told.stderr.splitlines()[-1].endswith(f'pip install "trajstore[{adapter}]"')
    assert told.stderr.splitlines()[-1].startswith("ImportError: ")


def test_a_model_in_parts_is_refused_by_lightning(lightning, tmp_path):
    trainer = SimpleNamespace(is_global_zero=True, strategy=type("FSDPStrategy", (), {})())
    with pytest.raises(ConfigurationError, match="FSDPStrategy cuts the model into parts; record it whole"):
        lightning.RecorderCallback(tmp_path / "s.zarr", "a").on_train_start(trainer, nn.Linear(1, 1))


def test_a_model_in_parts_is_refused_by_transformers(hugging, tmp_path, monkeypatch):
    state = SimpleNamespace(distributed_type=SimpleNamespace(value="FSDP"))
    monkeypatch.setattr("accelerate.state.AcceleratorState", lambda: state)
    with pytest.raises(ConfigurationError, match="FSDP cuts the model into parts; record it whole"):
        hugging.RecorderCallback(tmp_path / "s.zarr", "a").on_train_begin(
            None, SimpleNamespace(is_world_process_zero=True), None, model=nn.Linear(1, 1), optimizer=None
        )


def test_unknown_arguments_are_refused_at_once(hugging):
    with pytest.raises(TypeError, match=r"has no argument 'snapshot'; did you mean 'snapshots'\?"):
        hugging.RecorderCallback("s.zarr", "a", snapshot=3)
