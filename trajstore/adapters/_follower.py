"""A recorder that follows a trainer: its steps, its metrics, and its own idea of where to go on."""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trajstore.adapters._names import Names
from trajstore.errors import ConflictError, ResumedWarning, choices, slab_named
from trajstore.experiment.steps import Policy
from trajstore.recording.loop.recorder import Recorder, record
from trajstore.storage.format.codecs import Codec
from trajstore.storage.places.place import Durability
from trajstore.store import Store

__all__ = ["Follower", "How"]

_NEAR = 1e-9
"""So far apart may norms of equal parameters be that two machines computed."""


class How(TypedDict, total=False):
    """What `ts.record` takes besides a path, a name and what the trainer knows itself."""

    seed: int
    order: str
    config: Mapping[str, Any]
    steps: int
    snapshots: Policy | int | None
    layers: str | Sequence[str] | None
    dtype: str | None
    optimizer_state: bool
    sketch: int
    codec: Codec
    durability: Durability
    resume: bool


class Follower:
    """Records what a trainer does, and leaves to the trainer what it does.

    A trainer restores its model, its optimizer and its own loop from its own checkpoint. So a recording that goes on
    puts nothing back; it checks that the trainer is where it says, and waits until there is something new.
    """

    def __init__(self, path: str | Path, name: str, how: How) -> None:
        for key in how:
            if key not in How.__annotations__:
                raise TypeError(f"RecorderCallback has no argument {key!r}; {choices(key, How.__annotations__)}")
        self._path, self._name, self._how = path, name, how
        self._order, self._seed = how.get("order", "forward"), how.get("seed", 0)
        self._recorder: Recorder | None = None
        self._first = 0
        """The trainer's step at which the recording began."""
        self._new = False
        """Whether the last step is one that was recorded just now."""
        self._there: dict[str, Tensor] = {}
        """What the model was at the last step that was recorded earlier."""

    @property
    def recording(self) -> bool:
        """Whether a recorder is open."""
        return self._recorder is not None

    def begin(self, model: nn.Module, optimizer: Optimizer | None, *, at: int, until: int | None) -> None:
        """Open the recorder at a step of the trainer, who expects to train until another."""
        self.close()
        how = self._how.copy()
        if until is not None and until > at:
            how.setdefault("steps", until if how.get("resume") else until - at)
        recorder = record(self._path, self._name, model, optimizer=optimizer, **how)
        restoring = _put_back(model, optimizer) if how.get("resume") else nullcontext()
        with restoring, warnings.catch_warnings():
            warnings.simplefilter("ignore", ResumedWarning)  # what it asks for is checked here
            recorder.__enter__()
            self._there = _tensors(model) if recorder.resumed else {}
        self._recorder, self._model = recorder, model
        try:
            self._meet(recorder, at)
        except BaseException:
            self.close()
            raise

    def step(self, at: int, **metrics: Any) -> None:  # noqa: ANN401
        """Record a step of the trainer, or check it if it is recorded already."""
        if self._recorder is None:
            return
        number = at - self._first
        if number <= self._recorder.last:
            self._check(self._recorder, number)
            return
        self._recorder.step(number, **{self._names[name]: value for name, value in metrics.items()})
        self._new, self._there = True, {}

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Add metrics to the last step, under names that the store can hold, unless that was recorded before."""
        if self._recorder is not None and self._new and metrics:
            self._recorder.log(**{self._names[name]: value for name, value in metrics.items()})

    def keep(self) -> None:
        """Let the recording go on from the last step: the trainer writes a checkpoint of it."""
        if self._recorder is not None and self._new:
            self._recorder.keep()

    def close(self, error: BaseException | None = None) -> None:
        """Close the recorder, if one is open; an error of the trainer's comes before any of the recorder's own."""
        recorder, self._recorder, self._there = self._recorder, None, {}
        if recorder is not None:
            recorder.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)

    def _meet(self, recorder: Recorder, at: int) -> None:
        """Find out which step of the recording the trainer's present one is."""
        stored = Store(self._path)[self._name]
        self._names = Names(stored.schema)
        self._new = not recorder.resumed
        self._first = 0 if recorder.resumed else at
        if not recorder.resumed:
            return
        if at > recorder.last:
            raise ConflictError(
                f"{self._named}: the trainer resumes at step {at}, but the recording at step {recorder.last}; "
                "give the trainer a checkpoint that is no later, or record under another seed or name"
            )
        norms = stored.dataset()["param_norm"].sel(order=self._order, seed=self._seed)
        self._norms = norms[: recorder.last + 1].values
        self._check(recorder, at)

    def _check(self, recorder: Recorder, number: int) -> None:
        """Refuse a step that came out otherwise than it is recorded: what follows would be another trajectory."""
        recorded = float(self._norms[number])
        own = torch.cat([p.detach().reshape(-1) for p in self._model.parameters()]).double().norm().item()
        same = math.isnan(recorded) or math.isclose(own, recorded, rel_tol=_NEAR)
        if same and number == recorder.last:
            here = _tensors(self._model)
            same = all(torch.equal(here[name], tensor) for name, tensor in self._there.items())
        if not same:
            raise ConflictError(
                f"{self._named}: the trainer's step {number} differs from the recorded step {number}; give the "
                "trainer a checkpoint of that run, and its batches and randomness, or record under another seed or name"
            )

    @property
    def _named(self) -> str:
        return slab_named(self._name, self._order, self._seed)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copy what a model holds to host memory."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in held.items()}


@contextmanager
def _put_back(model: nn.Module, optimizer: Optimizer | None) -> Iterator[None]:
    """Leave a model, an optimizer and the random generators as they were: the trainer has restored them itself."""
    things: list[Any] = [model] if optimizer is None else [model, optimizer]
    states = [copy.deepcopy(thing.state_dict()) for thing in things]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for thing, state in zip(things, states, strict=True):
            thing.load_state_dict(state)
