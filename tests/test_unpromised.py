"""Nothing is used of other libraries that they do not promise, but what one file lists; and that may go away."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import zarr

import trajstore as ts
from trajstore._common.unpromised import COMPILING, USES
from trajstore.engine import toolchain
from trajstore.engine.plan import Plan, choose, ready
from trajstore.operators.sgd import SGD
from trajstore.problems.quadratic import Quadratic

ROOT = Path(__file__).parent.parent
LIST = ROOT / "trajstore" / "_common" / "unpromised.py"
SOURCES = [file for folder in ("trajstore", "analysis", "cli") for file in sorted((ROOT / folder).rglob("*.py"))]
INTERNAL = (
    "dask.base", "dask.core", "dask.highlevelgraph", "dask.local", "distributed.deploy.subprocess", "distributed.utils",
    "pandas.core", "torch.fx.experimental", "xarray.core", "xarray.backends.common", "zarr.core",
)  # fmt: skip
"""Modules without an underscore that their libraries' documentation calls internal, or does not mention."""
CPU = torch.device("cpu")


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_of(tree: ast.AST) -> Iterator[str]:
    """Yield what a source defines: functions, classes, fields, attributes and variables."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.Attribute(attr=name, ctx=ast.Store(), value=ast.Name(id="self")):
                yield name


def borrowed(source: str, own: set[str]) -> list[str]:
    """Return the private interfaces of others that a source uses."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.ImportFrom(module=str(module), names=names):
                modules = [module, *(f"{module}.{alias.name}" for alias in names)]
                found += [m for m in modules if not m.startswith("trajstore") and internal(m)]
            case ast.Import(names=names):
                found += [alias.name for alias in names if internal(alias.name)]
            case ast.Attribute(attr=name) if private(name) and name not in own:
                found.append(ast.unparse(node))
            case ast.Attribute() if ast.unparse(node).startswith(INTERNAL):
                found.append(ast.unparse(node))
            case ast.Constant(value=str(text)) if text.startswith(("torch._", *(f"{name}." for name in INTERNAL))):
                found.append(text)
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(text)), *_]) if (
                private(text) and text not in own
            ):
                found.append(text)
    return found


def internal(module: str) -> bool:
    return any(map(private, module.split("."))) or any(f"{module}.".startswith(f"{name}.") for name in INTERNAL)


def test_no_source_uses_what_others_do_not_promise_but_the_list():
    own = {name for file in SOURCES for name in names_of(ast.parse(file.read_text(encoding="utf-8")))}
    own |= {"_fields", "_replace", "_asdict", "_exit"}  # documented, of named tuples and of `os`
    own.add("_register_atexit")  # of Python itself, and looked for before it is used
    for file in SOURCES:
        if file != LIST:
            assert borrowed(file.read_text(encoding="utf-8"), own) == [], file


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("from torch.utils import _pytree", "torch.utils._pytree"),
        ("import torch._inductor", "torch._inductor"),
        ("torch.utils._triton.has_triton()", "torch.utils._triton"),
        ("from zarr.core.buffer import Buffer", "zarr.core.buffer"),
        ("store._check_writable()", "store._check_writable"),
        ("xr.Variable(x)\nxarray.core.indexing.f()", "xarray.core.indexing"),
        ("getattr(array, '_async_array')", "_async_array"),
    ],
)
def test_that_is_seen_in_all_its_forms(source, what):
    assert what in borrowed(source, set())


def test_no_class_of_ours_replaces_a_private_part_of_another_librarys():
    import trajstore.analysis
    import trajstore.cli

    found = []
    for package in (ts, trajstore.analysis, trajstore.cli):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if ".adapters" in module.name or module.name.endswith("_ends_with_parent"):
                continue  # the former need what may be missing, the latter waits for a process to end
            for name, kind in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
                if kind.__module__ == module.name and kind.__module__ != "trajstore._common.unpromised":
                    others = [base for base in kind.__mro__[1:] if base.__module__.split(".")[0] in LIBRARIES]
                    mine = {attribute for attribute in vars(kind) if private(attribute)} - OF_EVERY_CLASS
                    found += [f"{name}.{each}" for base in others for each in mine & set(vars(base))]
    assert found == []


LIBRARIES = {"torch", "zarr", "xarray", "dask", "distributed"}
OF_EVERY_CLASS = {"_abc_impl", "_is_protocol"}


def test_all_that_is_listed_is_there():
    for use in USES:
        assert use.gone() == ""
    import trajstore._common.unpromised as listed

    for name in listed.__all__:
        assert getattr(listed, name) is not None


@pytest.mark.parametrize("interface", [i for i in COMPILING.interfaces if ":" in i and "config:" not in i])
def test_without_an_interface_of_the_compiler_a_wave_runs_eagerly_and_says_so(interface, monkeypatch):
    module, name = interface.split(":")
    importlib.import_module(module)
    monkeypatch.delattr(f"{module}.{name}")
    toolchain.missing_for_compiling.cache_clear()
    monkeypatch.setattr("trajstore.engine.plan._seconds_an_application", lambda *_: 1e-4)
    try:
        chosen = choose(Quadratic().build(CPU), SGD(0.1), [(0, 0)], 10**9, 10**6, 8, 1000)
    finally:
        toolchain.missing_for_compiling.cache_clear()
    assert (chosen.compiled, chosen.slowed) == (False, True)
    assert f"{module}.{name} (torch {torch.__version__.split('+')[0]}" in chosen.reason
    assert "\n" not in chosen.reason


@pytest.mark.parametrize("gone", ["torch._inductor.compile_fx.compile_fx_inner", "torch._inductor.exc.InductorError"])
def test_a_compiled_plan_made_elsewhere_is_computed_eagerly_without_them(gone, monkeypatch):
    monkeypatch.delattr(gone)
    monkeypatch.delitem(sys.modules, "trajstore.engine.compiled_tick", raising=False)
    plan, engine = ready(Plan("wavefront", 2, compiled=True), Quadratic().build(CPU), SGD(0.1), [(0, 0)])
    assert (plan.compiled, plan.slowed) == (False, True)
    assert gone.rpartition(".")[2] in plan.reason
    assert engine.start(0).step == 0


def test_an_option_of_the_compiler_that_is_gone_is_missed_before_anything_is_compiled(monkeypatch):
    monkeypatch.setattr("trajstore._common.unpromised._found", lambda interface: getattr(torch, interface))
    assert COMPILING.gone().startswith("torch._dynamo.exc.BackendCompilerFailed (torch ")


def test_without_lazy_arrays_dask_reads_the_same_numbers(record, monkeypatch):
    stored = record()
    before = {name: array.values for name, array in stored.dataset().data_vars.items()}
    path = str(stored.store.place.address)
    monkeypatch.delattr("xarray.core.indexing.explicit_indexing_adapter")
    monkeypatch.delattr("xarray.core.indexing.LazilyIndexedArray")
    with pytest.warns(UserWarning, match=r"xarray .* has no xarray.core.indexing.LazilyIndexedArray .* through dask"):
        without = stored.dataset()
    for name, values in before.items():
        np.testing.assert_array_equal(without[name].values, values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = xr.open_dataset(path, engine="trajstore")
        np.testing.assert_array_equal(opened["params"][:, 1, ::3, -5:].values, before["params"][:, 1, ::3, -5:])


def test_without_either_everything_else_can_still_be_imported():
    names = (
        "recording.running", "recording.loop.recorder", "store", "reading.dataset", "reading.sql", "exchange.merge",
        "reading.verify", "engine.plan",
    )  # fmt: skip
    program = "import trajstore._common.unpromised as u; u._found = lambda interface: getattr(object, interface)\n"
    program += "import " + ", ".join(f"trajstore.{name}" for name in names)
    # In a process of its own: modules that are imported twice are not those that other tests patch.
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_store_that_is_open_to_be_read_is_not_written(tmp_path):
    from zarr.buffer.cpu import Buffer

    from trajstore.storage.places.folder import FolderStore

    zarr.open_group(tmp_path / "s.zarr", mode="w")
    with pytest.raises(ValueError, match=r"s\.zarr was opened to be read"):
        FolderStore(tmp_path / "s.zarr", read_only=True).set_sync("x", Buffer.from_bytes(b"1"))
