"""The notebooks, executed afresh, say what they said when they were committed."""

from __future__ import annotations

import math
import re
import sys
import tempfile
from pathlib import Path

import pytest

from tests.tools.notebooks import METADATA, NOTEBOOKS, execute, read

LIMIT = 150_000
"""Bytes of a notebook."""
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
CLOSE = {"rel_tol": 0.1, "abs_tol": 1e-6}
"""Numbers may differ so much: machines round differently, and codecs come to other sizes."""

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def outputs(notebook):
    """Return (number of the cell, output) for each output."""
    return [(k, output) for k, cell in enumerate(notebook.cells) for output in cell.get("outputs", [])]


def texts(output):
    """Return the texts of an output by their kind, without its pictures."""
    if output.output_type == "stream":
        return {output.name: output.text}
    return {kind: text for kind, text in output.get("data", {}).items() if not kind.startswith("image/")}


def words(text):
    return re.findall(r"[^\W\d_]+", NUMBER.sub(" ", text))


def numbers(text):
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


def test_there_are_four():
    names = ["point_or_distribution", "resets", "tour", "your_own_loop"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.slow
@each
def test_a_notebook_says_what_it_said(path):
    was, now = outputs(read(path)), outputs(execute(path))
    assert [(k, o.output_type, sorted(o.get("data", {}))) for k, o in now] == [
        (k, o.output_type, sorted(o.get("data", {}))) for k, o in was
    ]
    for (k, before), (_, after) in zip(was, now, strict=True):
        assert after.output_type != "error"
        assert after.get("name") != "stderr", after.text
        assert texts(before).keys() == texts(after).keys()
        for kind, text in texts(after).items():
            old = texts(before)[kind]
            assert words(text) == words(old), f"cell {k}: {text}\nit was\n{old}"
            same = len(numbers(text)) == len(numbers(old)) and all(
                math.isclose(a, b, **CLOSE) for a, b in zip(numbers(text), numbers(old), strict=True)
            )
            assert same, f"cell {k}: {text}\nit was\n{old}"


@each
def test_a_notebook_is_small_executed_in_order_and_of_no_machine(path):
    notebook = read(path)
    assert path.stat().st_size <= LIMIT
    assert notebook.metadata == METADATA
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert any("image/png" in output.get("data", {}) for _, output in outputs(notebook))
    places = [str(Path.home()), tempfile.gettempdir(), sys.prefix, "/tmp", "/home", "/Users"]
    for _, output in outputs(notebook):
        assert output.output_type != "error"
        for kind, text in texts(output).items():
            assert kind != "stderr"
            assert not [place for place in places if place in text]
            assert not re.search(r"0x[0-9a-f]{6,}", text)
