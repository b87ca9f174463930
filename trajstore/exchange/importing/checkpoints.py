"""Checkpoints: files that hold a state dict, read without running anything that is in them.

`.pt`, `.pth` and `.ckpt` files are pickles, and a pickle can call whatever it likes: torch's restricted reader makes
tensors, numbers, text and containers, and refuses everything else. Tensors are mapped into memory where the file allows
it, so that to look at names and shapes reads no numbers.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trajstore.errors import ConfigurationError

__all__ = ["ENDINGS", "Checkpoint", "Structure", "difference", "read", "same_numbers", "shared", "structure"]

ENDINGS = (".pt", ".pth", ".ckpt", ".safetensors")
_USUAL = ("model", "model_state_dict", "state_dict", "module")
"""Keys under which a training loop usually puts a model's state dict."""

Structure = dict[str, tuple[tuple[int, ...], str]]
"""Name of a tensor → its shape and dtype."""


class Checkpoint(NamedTuple):
    """The tensors of one file."""

    tensors: dict[str, Tensor]
    key: str | None
    """Where in the file they were found, if they are not its top level."""


def read(file: Path, key: str | None = None) -> Checkpoint:
    """Read the state dict of a file: the one under a dotted key, or the file itself, or the one that it holds."""
    _check(file)
    if file.suffix.lower() == ".safetensors":
        if key is not None:
            raise ConfigurationError(f"{file}: a safetensors file has no nested keys; leave --key out")
        return _checked(file, _read_safetensors(file), None)
    return _state_dict(file, _read_pickle(file), key)


def structure(tensors: Mapping[str, Tensor]) -> Structure:
    """Return what all checkpoints of an experiment have in common."""
    return {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}


def difference(own: Structure, other: Structure, where: str) -> str | None:
    """Say what the first difference of two structures is, the second of which is found `where`."""
    for name in {**own, **other}:
        if name not in other:
            return f"it has a tensor {name!r}, which {where} has not"
        if name not in own:
            return f"it has no tensor {name!r}, which {where} has"
    for name, (shape, dtype) in own.items():
        other_shape, other_dtype = other[name]
        if shape != other_shape:
            return f"tensor {name!r} has shape {shape}, in {where} it has {other_shape}"
        if dtype != other_dtype:
            return f"tensor {name!r} is {dtype}, in {where} it is {other_dtype}"
    return None


def shared(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return for each name the first one whose tensor is the very same memory: itself, unless it is tied."""
    first: dict[object, str] = {}
    return {
        name: first.setdefault((t.data_ptr(), t.dtype, t.shape, t.stride()), name) if t.numel() else name
        for name, t in tensors.items()
    }


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are equal in every bit."""
    left, right = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(left, right)


def _check(file: Path) -> None:
    """Refuse what is no file that could be read."""
    try:
        if file.is_dir():
            raise ConfigurationError(f"{file} is a folder; name the files in it, as in {file}/*.pt")
        if not file.exists():
            raise ConfigurationError(f"{file}: there is no such file")
        if not file.is_file():
            raise ConfigurationError(f"{file} is not a regular file")
        with file.open("rb"):
            pass
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from None
    if file.suffix.lower() not in ENDINGS:
        raise ConfigurationError(f"{file}: the ending says the format; {', '.join(ENDINGS)} can be read")


def _read_pickle(file: Path) -> Any:  # noqa: ANN401
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd about a file ends in an error, or does not matter
            return torch.load(file, map_location="cpu", weights_only=True, mmap=_can_be_mapped(file))
    except MemoryError:
        raise
    except UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it is a pickle that asks for {wanted[1][:100]}" if wanted else "it is no pickle that torch.save writes"
        raise ConfigurationError(
            f"{file}: refused, and nothing in it was run: {what}; only tensors, numbers, text and containers of them "
            "are read, as torch.save(model.state_dict(), FILE) writes them"
        ) from None
    except Exception as error:  # files of strangers: whatever they make torch raise is one line
        raise _unreadable(file, error) from None


def _can_be_mapped(file: Path) -> bool:
    """Tell whether tensors lie in the file as they do in memory: not in those of old torch, nor in packed ones."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> ConfigurationError:
    told = " ".join(f"{type(error).__name__}: {error}".split())
    return ConfigurationError(f"{file} cannot be read: it is no checkpoint, is cut off, or damaged ({told[:200]})")


def _state_dict(file: Path, tree: Any, key: str | None) -> Checkpoint:  # noqa: ANN401
    """Find the state dict in what a file holds."""
    if key is not None:
        return _checked(file, _under(tree, key, file), key)
    if _is_state_dict(tree):
        return _checked(file, tree, None)
    if not isinstance(tree, Mapping):
        raise ConfigurationError(f"{file} holds a {type(tree).__name__}, not a state dict")
    found = [name for name in _USUAL if _is_state_dict(tree.get(name))]
    if len(found) == 1:
        return _checked(file, tree[found[0]], found[0])
    if found:
        raise ConfigurationError(f"{file} holds a state dict under each of {_listed(found)}; choose with --key")
    if _is_almost_one(tree):  # to check it names what else is in it
        return _checked(file, tree, None)
    if almost := [name for name in _USUAL if _is_almost_one(tree.get(name))]:
        return _checked(file, tree[almost[0]], almost[0])
    raise ConfigurationError(f"{file} holds {_listed(list(tree))}; say with --key under which the state dict is")


def _under(tree: Any, key: str, file: Path) -> Any:  # noqa: ANN401
    """Return what is under a dotted key; a key may have dots of its own."""
    here, rest = tree, key
    while rest:
        if not isinstance(here, Mapping):
            break
        head, _, after = (rest, "", "") if rest in here else rest.partition(".")
        if head not in here:
            raise ConfigurationError(f"{file} has no key {key!r}; there is {_listed(list(here))}")
        here, rest = here[head], after
    if rest or not isinstance(here, Mapping):
        raise ConfigurationError(f"{file}: there is no state dict under {key!r}, but a {type(here).__name__}")
    return here


def _is_state_dict(tree: Any) -> bool:  # noqa: ANN401
    return isinstance(tree, Mapping) and bool(tree) and all(isinstance(t, Tensor) for t in tree.values())


def _is_almost_one(tree: Any) -> bool:  # noqa: ANN401
    """Tell whether there are tensors, and nothing else that could hold them."""
    if not isinstance(tree, Mapping) or any(isinstance(value, Mapping) for value in tree.values()):
        return False
    return any(isinstance(value, Tensor) for value in tree.values())


def _checked(file: Path, tensors: Mapping[Any, Any], key: str | None) -> Checkpoint:
    """Refuse what is in a state dict and could not be stored, whatever the other files hold."""
    under = "" if key is None else f" under {key!r}"
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not name.isprintable():
            raise ConfigurationError(f"{file}: {name!r}{under} is not the name of a tensor")
        if not isinstance(tensor, Tensor):
            raise ConfigurationError(
                f"{file}: {name!r}{under} is a value of type {type(tensor).__name__}, not a tensor; save the state "
                "dict without it"
            )
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ConfigurationError(f"{file}: tensor {name!r} is sparse, quantized or without data; store it dense")
    return Checkpoint({name: tensor.detach() for name, tensor in tensors.items()}, key)


def _listed(names: list[Any]) -> str:
    shown = ", ".join(repr(name)[:60] for name in names[:8]) or "nothing"
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
