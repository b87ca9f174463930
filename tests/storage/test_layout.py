"""Layouts: named tensors ⇄ flat vectors."""

from __future__ import annotations

import json

import numpy as np
import pytest

from trajstore.errors import ConfigurationError
from trajstore.storage.format.layout import Entry, Layout

LAYOUT = Layout.of(
    [
        Entry("w", "parameter", (2, 3), "bfloat16"),
        Entry("empty", "parameter", (0, 4), "float32"),
        Entry("scale", "buffer", (), "float32"),
        Entry("seen", "buffer", (), "int64"),
        Entry("mask", "buffer", (2,), "bool"),
        Entry("scratch", "buffer", (1,), "float32", in_state_dict=False),
        Entry("exp_avg/w", "memory", (2, 3), "float32"),
        Entry("position", "position", (), "int64"),
    ],
    {"v": "w"},
)


def test_offsets_follow_the_order():
    offsets = [(e.name, e.array, e.offset) for e in LAYOUT.entries]
    assert offsets == [
        ("w", "params", 0), ("empty", "params", 6), ("scale", "params", 6), ("seen", "counters", 0),
        ("mask", "counters", 1), ("scratch", "params", 7), ("exp_avg/w", "params", 8), ("position", "counters", 3),
    ]  # fmt: skip
    assert (LAYOUT.size("params"), LAYOUT.size("counters"), LAYOUT.parameters) == (14, 4, 6)


def test_it_survives_json():
    assert Layout.from_json(json.loads(json.dumps(LAYOUT.to_json()))) == LAYOUT


def test_unflattening_gives_the_state_dict():
    named = LAYOUT.unflatten(np.arange(14, dtype=np.float32), np.array([7, 1, 0, 3]))
    assert list(named) == ["w", "empty", "scale", "seen", "mask", "v"]
    assert named["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert named["v"] is named["w"]
    assert named["empty"].shape == (0, 4)
    assert named["scale"] == 6
    assert named["seen"] == 7
    assert named["mask"].dtype == bool
    assert named["mask"].tolist() == [True, False]


def test_params_are_as_wide_as_the_widest_float():
    assert LAYOUT.dtype == np.float32
    assert (
        Layout.of([Entry("a", "parameter", (1,), "float16"), Entry("b", "buffer", (1,), "float64")], {}).dtype
        == np.float64
    )


def test_a_dtype_that_cannot_be_stored_is_refused():
    with pytest.raises(ConfigurationError, match=r"parameter 'z' has dtype complex64"):
        Layout.of([Entry("z", "parameter", (1,), "complex64")], {})
