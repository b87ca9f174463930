"""Proof: does a fast way give what its definition gives, but for rounding?

Whatever is computed in another way than it is defined (compiled, vectorised, replayed) is compared with its definition
on the very numbers that are at hand, before anything that came of it is used: `disproof`. Where it differs it is not
used.

What rounding explains is not known beforehand: Adam divides a gradient that should be zero by almost nothing. So it is
measured there and then, for each number: by how much the definition differs from itself, computed in float64. Where
that says nothing, because the numbers are float64 already or the definition holds on to another precision, the
definition is asked again for arguments moved by a few units in the last place; and so it is before anything is called
wrong, since a number next to a kink, as that of a ReLU, may fall on either side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from trajstore._common.pytree import tree_leaves, tree_map

__all__ = ["Definition", "FastWay", "Refusal", "disproof"]

Definition = Callable[..., Any]
"""A pure function from trees of tensors to a tree of tensors, lanes first."""

FastWay = Literal["compiled tick", "vectorised tick", "functional tick", "vectorised evaluation of metrics"]


@dataclass(frozen=True)
class Refusal:
    """Something that is not used because it gave something else than its definition. As text it is a sentence."""

    of: FastWay
    why: str

    def __str__(self) -> str:
        return f"the {self.of} gives something else than its definition: {self.why}"


_TIMES = 16.0
"""So many times what the definition differs from itself is still rounding."""
_UNITS = 4.0
"""So many units in the last place always are; arguments are moved by as many at most."""
_AT_FIRST, _AT_LAST = 2, 8
"""How often the definition is asked for moved arguments: where float64 says nothing, and before a refusal."""


def disproof(found: Any, definition: Definition, *arguments: Any, lanes: Sequence[int] | None = None) -> str:  # noqa: ANN401
    """Say where `found` differs from what a definition gives for arguments by more than rounding; nothing: ''.

    Integers have to be equal, NaN is equal to NaN, and infinity to infinity. `lanes` are the numbers of the lanes, if
    not 0, 1, 2, …
    """
    with torch.no_grad():
        defined = tree_leaves(definition(*arguments))
        leaves = list(_places(found))
        if len(leaves) != len(defined) or any(f.shape != d.shape for (_, f), d in zip(leaves, defined, strict=True)):
            return "it has another form"
        noises = [torch.zeros((), dtype=torch.float64, device=d.device).expand(d.shape) for d in defined]
        told = _first_beyond(leaves, defined, noises, lanes)
        for others in (_in_float64(definition, arguments, len(defined)), _moved(definition, arguments, _AT_LAST)):
            if told:
                for other in others:
                    noises = [torch.maximum(n, _off(o, d)) for n, o, d in zip(noises, other, defined, strict=True)]
                told = _first_beyond(leaves, defined, noises, lanes)
        return told


def _first_beyond(
    found: Sequence[tuple[str, Tensor]],
    defined: Sequence[Tensor],
    noises: Sequence[Tensor],
    lanes: Sequence[int] | None,
) -> str:
    for (place, f), d, noise in zip(found, defined, noises, strict=True):
        off = _off(f, d)
        explained = _explained(f, d, noise)
        beyond = off > explained if d.is_floating_point() or d.is_complex() else off > 0
        if bool(beyond.any()):
            worst = (off - explained).where(beyond, -1.0).flatten().argmax()
            one, other, most = (t.flatten()[worst].item() for t in (f, d, explained))
            row = int(worst) // max(1, f[0].numel())
            lane = row if lanes is None else lanes[row]
            here = f"{place} of lane {lane}"
            return f"{here} is {one:.9g} and should be {other:.9g}, and rounding explains {most:.1e}"
    return ""


def _explained(found: Tensor, defined: Tensor, noise: Tensor) -> Tensor:
    """Return by how much each number may be off, given what its definition differs from itself."""
    return _TIMES * (noise + _usual(noise)) + _floor(found, defined)


def _off(one: Tensor, other: Tensor) -> Tensor:
    """Return how far numbers are from each other, in float64: infinitely, if only one of them is a number."""
    if not (one.is_floating_point() or one.is_complex()):
        return (one != other).double()
    wide = torch.complex128 if one.is_complex() or other.is_complex() else torch.float64
    a, b = one.to(wide), other.to(wide)
    off = (a - b).abs().nan_to_num(nan=torch.inf)
    return off.masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0)


def _floor(found: Tensor, defined: Tensor) -> Tensor:
    """Return what is rounding in any case."""
    if not (found.is_floating_point() or found.is_complex()):
        return torch.zeros(defined.shape, dtype=torch.float64, device=defined.device)
    limits = torch.finfo(found.dtype)
    return _UNITS * limits.eps * defined.abs().double().nan_to_num(posinf=0.0) + limits.tiny


def _usual(noise: Tensor) -> Tensor:
    """Return the median over each lane: a number may come out exactly once, by chance.

    Not a mean, since one number that is all noise, as Adam makes of a gradient of zero, would then excuse all others.
    """
    if noise.ndim < 2 or not noise.numel():
        return noise
    usual = noise.nan_to_num(posinf=0.0).flatten(1).median(1).values
    return usual.view(-1, *[1] * (noise.ndim - 1))


def _in_float64(definition: Definition, arguments: Any, leaves: int) -> Iterator[list[Tensor]]:  # noqa: ANN401
    """Yield what a definition gives in float64, or where that tells nothing for arguments that are moved a little."""
    given = [t for t in tree_leaves(arguments) if t.is_floating_point()]
    if any(t.dtype != torch.float64 for t in given):
        widened = tree_map(_wide, arguments)
        try:
            with _Wide():
                wide = tree_leaves(definition(*widened))
        except Exception:  # it holds on to a precision, in a way that `_Wide` does not see
            wide = []
        if len(wide) == leaves:
            yield wide
            return
    yield from _moved(definition, arguments, _AT_FIRST)


class _Wide(TorchFunctionMode):
    """Everything in float64, also what a problem holds itself, and what it would make smaller."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        function = _WIDER.get(function, function)
        args, kwargs = _wide((tuple(args), dict(kwargs or {})))
        return _wide(function(*args, **kwargs))


_WIDER: Mapping[Callable[..., Any], Callable[..., Any]] = dict.fromkeys(
    (Tensor.float, Tensor.half, Tensor.bfloat16), Tensor.double
)


def _wide(value: Any) -> Any:  # noqa: ANN401
    """Return tensors and precisions, also in what holds them, as wide as there is."""
    match value:
        case Tensor():
            wide = _wide(value.dtype)
            return value if value.dtype == wide else value.to(wide)
        case torch.dtype():
            return torch.float64 if value.is_floating_point else torch.complex128 if value.is_complex else value
        case tuple() | list():
            parts = [_wide(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        case dict():
            return {name: _wide(part) for name, part in value.items()}
    return value


def _moved(definition: Definition, arguments: Any, times: int) -> Iterator[list[Tensor]]:  # noqa: ANN401
    """Yield what a definition gives for arguments each number of which is moved by a few units in the last place."""
    for k in range(times):
        random = torch.Generator().manual_seed(k)

        def move(t: Tensor, random: torch.Generator = random) -> Tensor:
            if not (t.is_floating_point() or t.is_complex()):
                return t
            drawn = torch.rand(t.shape, generator=random, dtype=torch.float64)
            by = _UNITS * torch.finfo(t.dtype).eps * (2 * drawn - 1)
            return (t.to(_wide(t.dtype)) * (1 + by).to(t.device)).to(t.dtype)

        yield tree_leaves(definition(*tree_map(move, arguments)))


def _places(tree: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:  # noqa: ANN401
    """Yield each tensor, in the order of `tree_leaves`, with its place: ``params/0.weight``."""
    if isinstance(tree, Tensor):
        yield place, tree
    elif isinstance(tree, dict):
        for name in sorted(tree):
            yield from _places(tree[name], f"{place}/{name}" if place else name)
    else:
        for k, part in enumerate(tree):
            name = tree._fields[k] if hasattr(tree, "_fields") else str(k)
            yield from _places(part, f"{place}/{name}" if place else name)
