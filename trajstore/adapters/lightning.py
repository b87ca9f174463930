"""Record what a Lightning Trainer does.

::

    from trajstore.adapters.lightning import RecorderCallback

    callback = RecorderCallback("runs.zarr", "mine", seed=0, snapshots=ts.every(10))
    Trainer(max_epochs=10, callbacks=[callback]).fit(module, batches)
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Unpack

if find_spec("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer
elif find_spec("pytorch_lightning"):  # the same under its other name
    from pytorch_lightning import Callback, LightningModule, Trainer
else:
    raise ImportError('trajstore.adapters.lightning needs Lightning: pip install "trajstore[lightning]"')

from torch import Tensor
from torch.optim import Optimizer

from trajstore.adapters._follower import Follower, How
from trajstore.errors import ConfigurationError

__all__ = ["RecorderCallback"]

_WHOLE = {"SingleDeviceStrategy", "DDPStrategy"}
"""Strategies in which a process holds all of the model."""


class RecorderCallback(Callback):
    """Records a LightningModule: its state when training begins, and after every step of its optimizer.

    Takes what `ts.record` takes, besides the model and the optimizer, which the trainer knows. Step n is the trainer's
    `global_step`, counted from where the recording began, whatever gradients were accumulated for it; `loss` is the
    loss that its gradient was of, `lr` the rate of the optimizer's first group that it was made with. What the module
    logs (`self.log`), in training and validation, is added to the last step as it appears. Put the callback last, if
    others change weights.

    Going on is the trainer's affair: `fit(..., ckpt_path=...)` says from which step, and the recorder, given
    ``resume=True``, restores nothing. A checkpoint of where the recording ended works as it is. From an earlier one, or
    from none, the steps in between are done again without being recorded, and have to come out the same; Lightning
    restores neither random generators nor the order of shuffled batches, so with dropout or shuffling they do not.
    Refused in one line: steps that come out otherwise, a checkpoint of another run, and one that is later than the last
    state that the recorder has committed.

    With several optimizers, or several steps a batch (manual optimization), the last step of a batch is recorded.
    Distributed, the first process records, with the loss of its own batches; strategies that cut the model into parts
    are refused.
    """

    def __init__(self, path: str | Path, name: str, **how: Unpack[How]) -> None:
        super().__init__()
        self._follower = Follower(path, name, how)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record θ₀, or meet what is recorded; only now everything is restored and on its device."""
        if not trainer.is_global_zero:
            return
        strategy = type(trainer.strategy)
        if not _WHOLE & {kind.__name__ for kind in strategy.__mro__}:
            raise ConfigurationError(f"{strategy.__name__} cuts the model into parts; record it whole, as with 'ddp'")
        self._loss: Tensor | float | None = None
        self._rates: dict[str, float] = {}
        self._seen: dict[str, Any] = {}
        self._step: int = trainer.global_step
        optimizer = trainer.optimizers[0] if len(trainer.optimizers) == 1 else None
        expected = trainer.estimated_stepping_batches
        until = int(expected) if 0 < expected < float("inf") else None
        self._follower.begin(pl_module, optimizer, at=self._step, until=until)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note the learning rate: when the batch ends, schedulers have changed it."""
        if self._follower.recording:
            place = trainer.optimizers.index(optimizer)
            self._rates[f"lr_{place}" if place else "lr"] = float(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Record a step, if the optimizer made one."""
        if not self._follower.recording:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None:  # of a part of the step's batch, divided by the number of parts
            self._loss = loss if self._loss is None else self._loss + loss
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._follower.step(self._step, **self._own())
        self._log(trainer)
        self._loss = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add what validation found."""
        self._log(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add what the last epoch came to: at its end, means would still have to be gathered from all processes."""
        self._log(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let the recording go on from this checkpoint, too."""
        self._follower.keep()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish."""
        self._log(trainer)
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Commit what was recorded."""
        self._follower.close(exception)

    def close(self) -> None:
        """End the recording; the trainer does it, also when training fails."""
        self._follower.close()

    def _own(self) -> dict[str, Any]:
        return self._rates if self._loss is None else {"loss": self._loss, **self._rates}

    def _log(self, trainer: Trainer) -> None:
        """Add what was logged since the last time: the trainer keeps old values, but makes new tensors for new ones."""
        if self._follower.recording:
            logged = dict(trainer.logged_metrics)
            fresh = {name: value for name, value in logged.items() if self._seen.get(name) is not value}
            self._seen = logged
            self._follower.log({name: value for name, value in fresh.items() if name not in ("loss", *self._rates)})
