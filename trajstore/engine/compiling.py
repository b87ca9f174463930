"""Compiling a tick. Importing this loads torch's compiler, which takes seconds.

A wave lies in tensors that never move. So the compiled code is called once through torch.compile, and from then
on directly with the arguments that it was given then: no guards, no wrappers, and no way to fall back to eager
silently. On a CPU the call is one C++ function; on a GPU it is captured as a CUDA graph.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from trajstore import pytree
from trajstore.engine.wavefront import Advance, Tick
from trajstore.operators import Batch
from trajstore.state import State
from trajstore.unpromised import (
    BackendCompilerFailed,
    CppCompileError,
    CustomGraphPass,
    InductorError,
    boxed,
    compile_fx,
    functorch_config,
)

__all__ = ["compiled"]


class _SmallProducts(CustomGraphPass):
    """Matrix products in which one side is a vector, on a CPU.

    With batch size 1 a wave is made of them. Inductor would write batched matrix-vector products as loops of its
    own, which compute the layer before anew for every output; it leaves `baddbmm` to BLAS. An outer product it
    would leave to BLAS, writing the whole gradient; as a product of numbers it melts into the update. A bias
    that BLAS adds costs it a quarter more; as a sum of its own it melts into what follows.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        aten = torch.ops.aten
        for target in (aten.bmm.default, aten.mm.default, aten.addmm.default):
            for node in graph.find_nodes(op="call_function", target=target):
                self._rewrite(graph, node)

    def _rewrite(self, graph: torch.fx.Graph, node: torch.fx.Node) -> None:
        aten = torch.ops.aten
        arguments: Any = node.args
        *bias, one, other = arguments
        left, right = one.meta["val"], other.meta["val"]
        if left.device.type != "cpu" or not left.is_floating_point():
            return
        with graph.inserting_before(node):
            if bias and left.shape[0] == 1 and not node.kwargs:
                multiply = aten.mul.Tensor if left.shape[1] == 1 else aten.mm.default
                product = graph.call_function(multiply, (one, other))
                product.meta["val"] = node.meta["val"]
                instead = graph.call_function(aten.add.Tensor, (product, *bias))
            elif not bias and left.ndim == 2 and left.shape[1] == 1:
                instead = graph.call_function(aten.mul.Tensor, (one, other))
            elif left.ndim == 3 and 1 in (left.shape[1], right.shape[2]):
                zero = graph.call_function(aten.full.default, ([1, 1, 1], 0.0), {"dtype": left.dtype})
                zero.meta["val"] = left.new_zeros((1, 1, 1))
                instead = graph.call_function(aten.baddbmm.default, (zero, one, other), {"beta": 0})
            else:
                return
        instead.meta.update(node.meta)
        node.replace_all_uses_with(instead)
        graph.erase_node(node)

    def uuid(self) -> str:
        return "trajstore: small products, 4"


def compiled(tick: Tick) -> Advance:
    """Return what runs the ticks of a block by a tick that is compiled when it first runs."""
    known: tuple[State, Callable[[], None], Tensor] | None = None

    def step(states: State, batches: Batch, indices: Tensor, cursor: Tensor) -> None:
        *batch, index = (t.index_select(0, cursor)[0] for t in (*batches, indices))
        tick(states, tuple(batch), index)
        cursor.add_(1)

    def advance(states: State, batches: Batch, indices: Tensor, ticks: int) -> None:
        nonlocal known
        if known is None or known[0] is not states:
            cursor = torch.zeros(1, dtype=torch.int64, device=indices.device)
            keyed = any(t.ndim == indices.ndim for t in batches)  # a number for each lane: the key of random draws
            known = states, _replayed(step, states, batches, indices, cursor, keyed=keyed), cursor
        _, again, cursor = known
        cursor.zero_()
        for _ in range(ticks):
            again()

    return advance


def _replayed(step: Callable[..., None], *tensors: Any, keyed: bool) -> Callable[[], None]:  # noqa: ANN401
    """Compile a step on tensors that stay where they are, and return what takes it again and again."""
    calls: list[tuple[Callable[[list[Any]], Any], list[Any]]] = []

    def inner(graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:  # noqa: ANN401
        code: Callable[[list[Any]], Any] = compile_fx.compile_fx_inner(graph, inputs, **options)

        def noting(arguments: list[Any]) -> Any:  # noqa: ANN401
            calls.append((code, list(arguments)))
            return code(arguments)

        return boxed(noting)

    leaves = pytree.tree_leaves(tensors)
    on_cpu = leaves[0].device.type == "cpu"
    patches = {"post_grad_custom_post_pass": _SmallProducts(), "cpp_wrapper": on_cpu}
    if keyed:
        # The hash of a mask uses each of its values twice, and they are written out again for every use until they
        # have as many operations as this: with torch's 30, dropout in several lanes takes minutes to compile. Without
        # dropout it is left as it is: less is fused, and a network with batch normalisation is a fifth slower.
        patches["realize_opcount_threshold"] = 8

    def compile_step(patches: dict[str, Any]) -> None:
        def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:  # noqa: ANN401
            return compile_fx.compile_fx(graph, inputs, inner_compile=inner, config_patches=patches)

        function = cast(types.FunctionType, step)
        # torch keeps compilations by code object, and stops at eight; a copy gives every wave its own.
        name, code = function.__name__, function.__code__.replace()
        own = types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
        with functorch_config.patch(enable_autograd_cache=False):  # it would keep `inner` from being asked
            torch.compile(own, fullgraph=True, dynamic=False, backend=backend)(*tensors)

    before = [t.clone() for t in leaves]

    def restore() -> None:
        for tensor, value in zip(leaves, before, strict=True):
            tensor.copy_(value)

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where there is no GPU
    try:
        # A small program to try each of the processor's instruction sets would take eight seconds.
        compile_step(patches | {"cpp.vec_isa_ok": True})
    except (BackendCompilerFailed, InductorError) as error:
        if not isinstance(error.inner_exception, CppCompileError):
            raise
        compile_step(patches | {"cpp.vec_isa_ok": True, "cpp.simdlen": 256})  # a compiler older than the processor
    ((code_of_step, arguments),) = calls
    once = [t.clone() for t in leaves]

    def again() -> None:
        code_of_step(list(arguments))

    restore()
    again()
    if not all(map(_same, leaves, once)):
        raise RuntimeError("the compiled step works on copies of the wave, so it cannot be replayed")
    if not on_cpu:
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            again()
        again = recorded.replay
    restore()
    return again


def _same(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are equal, a NaN to a NaN too."""
    return torch.allclose(one, other, equal_nan=True)
