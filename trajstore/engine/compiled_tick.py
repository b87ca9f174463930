"""Compiling a tick. Importing this loads torch's compiler, which takes seconds.

A wave lies in tensors that never move. So the compiled code is called once through torch.compile, and from then
on directly with the arguments that it was given then: no guards, no wrappers, and no way to fall back to eager
silently. On a CPU the call is one C++ function; on a GPU it is captured as a CUDA graph. Whether all that gives what
the tick gives is for `Proven` to say.
"""

from __future__ import annotations

import logging
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from trajstore._common import pytree
from trajstore._common.unpromised import (
    BackendCompilerFailed,
    CppCompileError,
    CustomGraphPass,
    InductorError,
    boxed,
    compile_fx,
    functorch_config,
)
from trajstore.engine.proving import Refusal
from trajstore.engine.ticks import Step, Tick, tick_of
from trajstore.operators import Batch
from trajstore.operators.state import State

__all__ = ["Compiled"]


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


class Compiled:
    """Runs the ticks of a block by a tick that is compiled when it first runs."""

    refusals: Sequence[Refusal] = ()

    def __init__(self, step: Step) -> None:
        self._tick = tick_of(step)
        self._known: tuple[State, Callable[[], None], Tensor] | None = None

    def __call__(self, states: State, batches: Batch, indices: Tensor, ticks: range, busy: Sequence[int]) -> None:
        """Advance a stack of states in place; it compiles for these tensors the first time."""
        if self._known is None or self._known[0] is not states:
            cursor = torch.zeros(1, dtype=torch.int64, device=indices.device)
            keyed = any(t.ndim == indices.ndim for t in batches)  # a number for each lane: the key of random draws
            step = _of_block(self._tick)
            self._known = states, _replayed(step, states, batches, indices, cursor, keyed=keyed), cursor
        _, again, cursor = self._known
        cursor.fill_(ticks.start)
        for _ in ticks:
            again()


def _of_block(tick: Tick) -> Callable[[State, Batch, Tensor, Tensor], None]:
    """Return a tick that finds its batches in a block, where a cursor stands, and moves the cursor on."""

    def step(states: State, batches: Batch, indices: Tensor, cursor: Tensor) -> None:
        *batch, index = (t.index_select(0, cursor)[0] for t in (*batches, indices))
        tick(states, tuple(batch), index)
        cursor.add_(1)

    return step


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
    warnings.filterwarnings("ignore", message="Guards may run slower")  # on Python 3.13.0; none runs here
    try:
        # A small program to try each of the processor's instruction sets would take eight seconds.
        compile_step(patches | {"cpp.vec_isa_ok": True})
    except (BackendCompilerFailed, InductorError) as error:
        if not isinstance(error.inner_exception, CppCompileError):
            raise
        compile_step(patches | {"cpp.vec_isa_ok": True, "cpp.simdlen": 256})  # a compiler older than the processor
    ((code_of_step, arguments),) = calls

    def again() -> None:
        code_of_step(list(arguments))

    if not on_cpu:
        again()  # what happens once only must not be part of the graph
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            again()
        again = recorded.replay
    restore()
    return again
