"""The layout: how a state's named tensors lie in the flat vectors `params` and `counters`.

Floating-point tensors go to `params` (parameters, then buffers, then optimizer memory where that is stored),
integers to `counters`. A layout reads both back into named arrays with their shapes and dtypes, so that a
strict `load_state_dict` works. It is plain data and knows no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trajstore.errors import ConfigurationError
from trajstore.storage.format.checking import checked_layout

__all__ = ["Entry", "Layout", "Role"]

Role = Literal["parameter", "buffer", "memory", "position"]

_FLOATS = {"float64": "float64", "float32": "float32", "float16": "float32", "bfloat16": "float32"}
"""dtype of a tensor → dtype of a vector that holds it exactly."""
_INTEGERS = frozenset({"int64", "int32", "int16", "int8", "uint8", "bool"})


@dataclass(frozen=True)
class Entry:
    """One tensor: where it lies and what it is."""

    name: str
    role: Role
    shape: tuple[int, ...]
    dtype: str
    array: Literal["params", "counters"] = "params"
    offset: int = 0
    in_state_dict: bool = True

    @property
    def size(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    @property
    def read_as(self) -> str:
        """The dtype in which NumPy has it: bfloat16 and float16 as float32."""
        return _FLOATS.get(self.dtype, self.dtype)

    @property
    def part(self) -> slice:
        """Where it lies in its flat vector."""
        return slice(self.offset, self.offset + self.size)


@dataclass(frozen=True)
class Layout:
    """All tensors of a state, in order."""

    entries: tuple[Entry, ...]
    tied: Mapping[str, str]
    """Second name of a shared tensor → the name of its entry."""

    @classmethod
    def of(cls, tensors: Iterable[Entry], tied: Mapping[str, str]) -> Layout:
        """Assign arrays and offsets to tensors in their order."""
        ends = {"params": 0, "counters": 0}
        entries = []
        for e in tensors:
            if e.dtype not in _FLOATS and e.dtype not in _INTEGERS:
                raise ConfigurationError(
                    f"{e.role} {e.name!r} has dtype {e.dtype}; real floats and integers can be stored"
                )
            array: Literal["params", "counters"] = "params" if e.dtype in _FLOATS else "counters"
            entries.append(replace(e, array=array, offset=ends[array]))
            ends[array] += e.size
        return cls(tuple(entries), dict(tied))

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of `params`: the smallest that holds every float exactly."""
        return np.result_type(np.float32, *(_FLOATS[e.dtype] for e in self.entries if e.array == "params"))

    def size(self, array: Literal["params", "counters"]) -> int:
        """Return the length of a flat vector."""
        return sum(e.size for e in self.entries if e.array == array)

    @property
    def row_bytes(self) -> int:
        """How many bytes one flat state takes."""
        return self.size("params") * self.dtype.itemsize

    @property
    def parameters(self) -> int:
        """How many of `params` are parameters; they come first."""
        return sum(e.size for e in self.entries if e.role == "parameter")

    def unflatten(self, params: NDArray[Any], counters: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return the tensors of a `state_dict`, by name, bfloat16 and float16 as float32."""
        vectors = {"params": params, "counters": counters}
        named = {}
        for e in self.entries:
            if e.role in ("parameter", "buffer") and e.in_state_dict:
                named[e.name] = vectors[e.array][e.part].reshape(e.shape).astype(e.read_as)
        return named | {alias: named[name] for alias, name in self.tied.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the layout as the attribute that is stored."""
        return {
            "entries": [asdict(e) | {"shape": list(e.shape)} for e in self.entries],
            "tied": dict(self.tied),
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Layout:
        """Read the stored attribute, which is checked first."""
        checked_layout(stored)
        return cls(tuple(Entry(**e | {"shape": tuple(e["shape"])}) for e in stored["entries"]), stored["tied"])
