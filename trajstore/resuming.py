"""Progress as bytes: what is stored so that a recording can go on, in the safetensors format (no pickles)."""

from __future__ import annotations

import json

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from trajstore.engine import Iterate
from trajstore.engine.walk import Progress
from trajstore.flattening import tensors_of
from trajstore.state import Memory, State, Tensors

__all__ = ["pack", "unpack"]

_STORY = "story"
"""The tensor that holds, as JSON in bytes, what is no tensor."""


def pack(progress: Progress) -> bytes:
    """Return progress as bytes."""
    kind, start = progress.way[-1]
    tensors = _named("last", progress.last)
    if kind == "backward" and start > 0:  # a forward leg goes on from where it stands, a first leg from θ₀
        tensors |= _named("anchor", progress.anchor)
    story = {
        "way": progress.way,
        "last": [progress.last.step, progress.last.metrics],
        "anchor": [progress.anchor.step, progress.anchor.metrics],
        "order": list(tensors),
    }
    tensors[_STORY] = torch.frombuffer(bytearray(json.dumps(story).encode()), dtype=torch.uint8)
    return bytes(save(tensors))


def unpack(content: bytes, device: torch.device) -> Progress | None:
    """Read progress back; None where it is not one of this version's."""
    try:
        tensors = load(content)
        story = json.loads(bytes(tensors.pop(_STORY).tolist()))
        there = {name: tensors[name].to(device) for name in story["order"]}
    except (SafetensorError, KeyError, ValueError):
        return None
    last = Iterate(story["last"][0], _state("last", there), story["last"][1])
    anchor = Iterate(story["anchor"][0], _state("anchor", there), story["anchor"][1])
    return Progress(tuple((kind, start) for kind, start in story["way"]), anchor, last)


def _named(whose: str, iterate: Iterate) -> dict[str, Tensor]:
    # Cloned, since tensors of one wave share their storage, which safetensors refuses.
    return {
        f"{whose}/{role}/{name}": tensor.detach().cpu().contiguous().clone()
        for role, name, tensor in tensors_of(iterate.state, memory=True)
    }


def _state(whose: str, tensors: Tensors) -> State:
    found: dict[str, Tensors] = {"parameter": {}, "buffer": {}}
    memory: Memory = {}
    position = torch.tensor(0)
    for name, tensor in tensors.items():
        owner, role, rest = name.split("/", 2)
        if owner != whose:
            continue
        if role == "memory":
            slot, _, parameter = rest.partition("/")
            memory.setdefault(slot, {})[parameter] = tensor
        elif role == "position":
            position = tensor
        else:
            found[role][rest] = tensor
    return State(found["parameter"], found["buffer"], memory, position)
