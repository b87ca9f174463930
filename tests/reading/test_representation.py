"""Stores and experiments show what is in them and how far it is, as text and as HTML."""

from __future__ import annotations

import errno
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from trajstore.cli.inspection import ls

import trajstore as ts
from tests.conftest import SMALL_NET, record_half
from trajstore.errors import DamageError


class Cells(HTMLParser):
    """The cells of tables, and every tag and attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.cells.append(data)


@pytest.fixture
def half(tmp_path):
    """A whole experiment, and one of which a slab is missing."""
    path = tmp_path / "a <b> & c.zarr"
    ts.run(ts.Experiment.of(SMALL_NET), path, engine="reference", durability="none")
    record_half(ts.Experiment.of({**SMALL_NET, "name": "half"}), path)
    return ts.open(path)


def test_an_experiment_shows_how_far_each_slab_is_and_what_it_takes(half):
    told = repr(half["net"])
    assert "parameters   97, states of 97 float32" in told
    assert "4 of 4 slabs complete" in told
    held, taken = half["net"].bytes_on_disk(), half["net"].bytes_taken()
    assert f"{held / 1000:.3g} kB ({taken / 1000:.3g} kB on disk), of which states" in told
    raw = 4 * 13 * 97 * 4 / 1000
    states = sum(size for key, size in half.place.files("net") if "/params/c/" in key) / 1000
    assert f"for {raw:.3g} kB raw (ratio {raw / states:.1f})" in told
    assert re.search(r"steps committed +seed 0 +seed 1\n +forward +13 of 13 +13 of 13\n +backward +13 of 13", told)
    missing = repr(half["half"])
    counts = half["half"].commits().steps.sum(-1)
    assert counts.min() < 13
    for count in counts.ravel().tolist():
        assert f"{count} of 13" + ("" if count == 13 else ", not complete") in missing


def test_html_says_the_same_escapes_and_needs_nothing_from_elsewhere(half):
    for shown in (half, half["net"]):
        html = Cells(shown._repr_html_())
        assert html.tags <= {"div", "strong", "table", "thead", "tbody", "tr", "th", "td"}
        assert html.attributes == []
        assert any("a <b> & c.zarr" in cell for cell in html.cells)
        text = repr(shown)
        assert all(cell in text for cell in html.cells if re.match(r"\d+ of", cell))
    assert "13 of 13" in Cells(half["net"]._repr_html_()).cells


def test_an_experiment_that_the_disk_does_not_read_hides_no_other(half, monkeypatch, capsys):
    read_bytes = Path.read_bytes

    def failing(path: Path) -> bytes:
        if {"half", "committed"} <= {*path.parts}:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    told = repr(ts.open(str(half)))
    assert re.search(r"\n  half +damaged", told)
    assert re.search(r"\n  net +forward, backward +2 +12 +4 of 4 slabs complete", told)
    with pytest.raises(DamageError, match="experiment 'half' cannot be read: Input/output error"):
        ls(str(half), json=True)
    assert [row["experiment"] for row in json.loads(capsys.readouterr().out)] == ["net"]


def test_a_store_shows_its_experiments_damaged_ones_too(half, tmp_path):
    (tmp_path / "a <b> & c.zarr" / "half" / "zarr.json").write_text("{")
    told = repr(ts.open(str(half)))
    assert re.search(r"\n  half +damaged", told)
    assert re.search(r"\n  net +forward, backward +2 +12 +4 of 4 slabs complete", told)
    assert "damaged" in Cells(ts.open(str(half))._repr_html_()).cells


def test_many_seeds_are_cut_short(tmp_path):
    table = {**SMALL_NET, "seeds": list(range(20)), "steps": 1, "orders": ["forward"]}
    stored = ts.run(ts.Experiment.of(table), tmp_path / "s.zarr", engine="reference", durability="none")
    told = repr(stored)
    assert "20 of 20 slabs complete" in told
    assert "seed 4" in told
    assert "seed 5" not in told
    assert told.splitlines()[-2].split()[-5:] == ["…", "seed", "18", "seed", "19"]
