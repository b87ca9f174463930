"""What is used of other libraries though they do not promise it: all of it, and what happens where it is gone.

Any release may take such a thing away, or move it. So it is imported from here alone, and only when it is used:
what does not need it works without, and what does says in one line what it does instead.

>>> from trajstore._common.unpromised import LazilyIndexedArray
>>> LAZY.gone()
''
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._functorch import config as functorch_config
    from torch._inductor import compile_fx
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch._inductor.exc import CppCompileError, InductorError
    from xarray.core.indexing import (
        ExplicitIndexer,
        IndexingSupport,
        LazilyIndexedArray,
        explicit_indexing_adapter,
    )

__all__ = [
    "COMPILING",
    "LAZY",
    "USES",
    "BackendCompilerFailed",
    "CppCompileError",
    "CustomGraphPass",
    "ExplicitIndexer",
    "GoneError",
    "IndexingSupport",
    "InductorError",
    "LazilyIndexedArray",
    "Use",
    "boxed",
    "compile_fx",
    "explicit_indexing_adapter",
    "functorch_config",
]

Boxed = TypeVar("Boxed", bound=Callable[[list[Any]], Any])


class GoneError(ImportError):
    """An interface is not there in the release that is installed. The message is one line: what happens instead."""


@dataclass(frozen=True)
class Use:
    """Interfaces of a library that are needed together."""

    library: str
    since: str
    """The oldest release that trajstore takes, which has them."""
    interfaces: tuple[str, ...]
    """As `module` or `module:name`."""
    instead: str
    """What happens where one of them is gone."""

    def gone(self) -> str:
        """Return which of them is not there, in words; empty where all are."""
        for interface in self.interfaces:
            try:
                _found(interface)
            except (ImportError, AttributeError):
                has = f"{self.library} {version(self.library)} has it no more, {self.since} has"
                return f"{interface.replace(':', '.')} ({has})"
        return ""


COMPILING = Use(
    "torch",
    "2.9",
    (
        "torch._dynamo.exc:BackendCompilerFailed",
        "torch._functorch.config",
        "torch._functorch.config:enable_autograd_cache",
        "torch._inductor.compile_fx",
        "torch._inductor.compile_fx:compile_fx",
        "torch._inductor.compile_fx:compile_fx_inner",
        "torch._inductor.custom_graph_pass:CustomGraphPass",
        "torch._inductor.exc:CppCompileError",
        "torch._inductor.exc:InductorError",
        "torch._inductor.config:post_grad_custom_post_pass",
        "torch._inductor.config:cpp_wrapper",
        "torch._inductor.config:realize_opcount_threshold",
        "torch._inductor.config:cpp.vec_isa_ok",
        "torch._inductor.config:cpp.simdlen",
    ),
    "waves run eagerly, which takes several times as long",
)
"""To compile a tick. What it computes is compared with the definition before it is used, whatever became of these."""

LAZY = Use(
    "xarray",
    "2025.6.1",
    (
        "xarray.core.indexing:ExplicitIndexer",
        "xarray.core.indexing:IndexingSupport",
        "xarray.core.indexing:LazilyIndexedArray",
        "xarray.core.indexing:explicit_indexing_adapter",
    ),
    "arrays are read through dask, also where none was asked for",
)
"""To read arrays when they are asked for."""

USES = (COMPILING, LAZY)

_HOMES = {
    **{name: interface for use in USES for interface in use.interfaces if (name := interface.partition(":")[2])},
    "compile_fx": "torch._inductor.compile_fx",
    "functorch_config": "torch._functorch.config",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return _found(_HOMES[name])
    except (ImportError, AttributeError):
        use = next(use for use in USES if _HOMES[name] in use.interfaces)
        where = _HOMES[name].replace(":", ".")
        raise GoneError(f"{use.library} {version(use.library)} has no {where} any more: {use.instead}") from None


def boxed(function: Boxed) -> Boxed:
    """Mark compiled code as one that takes its arguments in a list. Where the mark is not known, compiling fails."""
    function._boxed_call = True  # type: ignore[attr-defined]
    return function


def _found(interface: str) -> Any:  # noqa: ANN401
    module, _, name = interface.partition(":")
    found: Any = import_module(module)
    for part in filter(None, name.split(".")):
        found = getattr(found, part)
    return found
