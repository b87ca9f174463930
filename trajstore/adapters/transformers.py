"""Record what a Hugging Face Trainer does.

::

    from trajstore.adapters.transformers import RecorderCallback

    callback = RecorderCallback("runs.zarr", "mine", seed=0, snapshots=ts.every(10))
    Trainer(model, TrainingArguments(..., logging_steps=1), train_dataset=data, callbacks=[callback]).train()
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Unpack

if not find_spec("transformers"):
    raise ImportError('trajstore.adapters.transformers needs transformers: pip install "trajstore[transformers]"')

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trajstore.adapters._follower import Follower, How
from trajstore.errors import ConfigurationError

__all__ = ["RecorderCallback"]

_TIMES = ("_runtime", "_per_second", "_time")
"""How names of measured times end: a step that is done again could not come out the same with them."""


class RecorderCallback(TrainerCallback):
    """Records a Trainer's model: its state when training begins, and after every step of its optimizer.

    Takes what `ts.record` takes, besides the model and the optimizer, which the trainer knows. Step n is the trainer's
    `global_step`, counted from where the recording began, whatever gradients were accumulated for it; `lr` is the rate
    of the optimizer's first group that it was made with. What the trainer logs, in training and evaluation, is added to
    the last step as it appears, without times. That holds for the loss, too, which callbacks are told in no other way:
    with ``logging_steps=1`` each step has its own, otherwise some have a mean over the steps since the last.

    Trainer tells callbacks of no errors: if training fails, what was recorded is committed when Python exits, when the
    same callback trains again, or by `close()`, as in ``with contextlib.closing(callback):``.

    Going on is the trainer's affair: `train(resume_from_checkpoint=...)` says from which step, and the recorder, given
    ``resume=True``, restores nothing. A checkpoint of where the recording ended works as it is. From an earlier one, or
    from none, the steps in between are done again without being recorded, and have to come out the same; Trainer
    restores random generators and skips batches, so they do, if the arithmetic is deterministic. Refused in one line:
    steps that come out otherwise, a checkpoint of another run, and one that is later than the last state that the
    recorder has committed.

    Distributed, the first process records; FSDP, DeepSpeed and tensor parallelism are refused.
    """

    def __init__(self, path: str | Path, name: str, **how: Unpack[How]) -> None:
        super().__init__()
        self._follower = Follower(path, name, how)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Any,  # noqa: ANN401
        **others: object,
    ) -> None:
        """Record θ₀, or meet what is recorded; only now everything is restored and on its device."""
        if not state.is_world_process_zero:
            return
        _refuse_parts(model)
        self._rate = float("nan")
        optimizer = getattr(optimizer, "optimizer", optimizer)  # what accelerate has wrapped
        self._follower.begin(model, optimizer, at=state.global_step, until=state.max_steps)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Any,  # noqa: ANN401
        **others: object,
    ) -> None:
        """Note the learning rate: when the step ends, its scheduler has changed it."""
        self._rate = float(optimizer.param_groups[0]["lr"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: object
    ) -> None:
        """Record a step of the optimizer."""
        self._follower.step(state.global_step, lr=self._rate)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, Any],
        **others: object,
    ) -> None:
        """Add what the trainer logs, in training and in evaluation."""
        if {"train_loss", "train_runtime"} <= logs.keys():  # at its end: over this call of `train`, wherever that began
            return
        known = {name: value for name, value in logs.items() if name != "learning_rate" and not name.endswith(_TIMES)}
        self._follower.log({name: value for name, value in known.items() if isinstance(value, int | float)})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: object) -> None:
        """Let the recording go on from this checkpoint, too."""
        self._follower.keep()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: object
    ) -> None:
        """Finish."""
        self.close()

    def close(self) -> None:
        """End the recording; needed only where training failed and the program goes on."""
        self._follower.close()


def _refuse_parts(model: nn.Module) -> None:
    """Refuse a model of which this process holds a part."""
    from accelerate.state import AcceleratorState

    kind = AcceleratorState().distributed_type.value
    if any(hasattr(p, "placements") for p in model.parameters()):
        kind = "tensor parallelism"
    elif kind not in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        return
    raise ConfigurationError(f"{kind} cuts the model into parts; record it whole, in one process or data-parallel")
