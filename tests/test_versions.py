"""Which releases are supported: said once, in pyproject.toml, and everything else agrees with it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.tools.lowest import PROJECT, lowest
from trajstore._common.unpromised import USES

TABLE = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]


def test_every_requirement_names_its_oldest_release():
    extras = [name for name in TABLE["optional-dependencies"] if name != "bench"]
    pinned = [Requirement(line) for line in lowest(extras)]
    named = [Requirement(line) for line in TABLE["dependencies"]]
    assert [p.name for p in pinned[: len(named)]] == [n.name for n in named]
    for one, bound in zip(pinned, named, strict=False):
        (pin,) = one.specifier
        assert pin.operator == "=="
        assert bound.specifier.contains(pin.version)
        assert not bound.specifier.contains(f"{Version(pin.version).major - 1}.9999")


def test_whatever_the_format_needs_has_a_bound_of_its_own():
    """What comes with another library has only the bounds that this one happens to have."""
    imported = set()
    for file in (Path(PROJECT).parent / "trajstore" / "storage").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    theirs = imported - set(sys.stdlib_module_names) - {"trajstore"}
    assert {"zarr", "numcodecs", "pcodec"} <= theirs
    bounded = {re.split(r"[\[>]", line)[0].replace("-", "_") for line in TABLE["dependencies"]}
    assert theirs <= bounded, theirs - bounded
    assert {line.partition("==")[0].replace("-", "_") for line in lowest([])} >= theirs


def test_a_requirement_without_one_is_refused(monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["torch"]\noptional-dependencies = {}\n')
    monkeypatch.setattr("tests.tools.lowest.PROJECT", tmp_path / "pyproject.toml")
    with pytest.raises(ValueError, match="'torch' names no oldest release"):
        lowest([])


def test_what_is_installed_is_not_older():
    for line in TABLE["dependencies"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(version(requirement.name), prereleases=True), line


def test_the_makefile_takes_no_torch_that_is_older():
    makefile = (Path(PROJECT).parent / "Makefile").read_text(encoding="utf-8")
    taken = dict(re.findall(r'fits\("(\w+)", ([\d, ]+)\)', makefile))
    assert set(taken) == {"torch", "torchvision"}
    for package, release in taken.items():
        assert f"{package}>={release.replace(', ', '.')}" in TABLE["dependencies"]


def test_interfaces_that_are_not_promised_are_known_from_the_oldest_release_on():
    for use in USES:
        (bound,) = (Requirement(line) for line in TABLE["dependencies"] if Requirement(line).name == use.library)
        assert str(bound.specifier) == f">={use.since}"
