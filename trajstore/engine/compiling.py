"""Compiling a tick, or saying what is missing.

One wave has one shape, so one compilation serves it. Guards are not evaluated again once the first tick has
run (the shapes cannot change), which also means that torch cannot fall back to eager silently later on.
"""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass

from trajstore.engine.wavefront import Tick
from trajstore.operators import Batch
from trajstore.state import State

__all__ = ["compiled", "missing_for_compiling"]


@cache
def missing_for_compiling(device: str = "cpu") -> tuple[str, ...]:
    """Return what torch.compile would need and this machine lacks, as a person would install it."""
    missing = []
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    if not any(map(shutil.which, compilers)):
        missing.append("a C++ compiler (on Debian: apt install g++)")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append("Python's headers (on Debian: apt install python3-dev)")
    if device == "cuda" and torch.utils._triton.has_triton() is False:
        missing.append("Triton (pip install triton)")
    return tuple(missing)


class _MatvecsByBlas(CustomGraphPass):
    """Leave batched matrix-vector products on a CPU to BLAS.

    With batch size 1 a wave is made of them. Inductor would write them as loops of its own, which compute the
    layer before anew for every output: a tenth to a fifth slower. It leaves `baddbmm` alone.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default):
            one, other = (argument.meta["val"] for argument in node.args[:2])
            if one.device.type == "cpu" and one.is_floating_point() and 1 in (one.shape[1], other.shape[2]):
                with graph.inserting_before(node):
                    zero = graph.call_function(torch.ops.aten.full.default, ([1, 1, 1], 0.0), {"dtype": one.dtype})
                    zero.meta["val"] = one.new_zeros((1, 1, 1))
                    blas = graph.call_function(torch.ops.aten.baddbmm.default, (zero, *node.args[:2]), {"beta": 0})
                blas.meta.update(node.meta)
                node.replace_all_uses_with(blas)
                graph.erase_node(node)

    def uuid(self) -> str:
        return "trajstore: matrix-vector products by BLAS, 1"


def compiled(tick: Tick) -> Tick:
    """Return a tick that is compiled when it first runs."""
    function = cast(types.FunctionType, tick)
    # torch keeps compilations by code object, and stops at eight; a copy gives every wave its own.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where there is no GPU
    name, code = function.__name__, function.__code__.replace()
    own = types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    run: Callable[[State, Batch, Tensor], None] = torch.compile(
        own, fullgraph=True, dynamic=False, options={"post_grad_custom_post_pass": _MatvecsByBlas()}
    )
    warm = False

    def checked(states: State, batches: Batch, indices: Tensor) -> None:
        nonlocal warm
        if warm:
            with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
                run(states, batches, indices)
        else:
            run(states, batches, indices)
            warm = True

    return checked
