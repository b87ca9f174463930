"""What a shell offers when one presses Tab."""

from __future__ import annotations

from typing import get_args

import pytest
from trajstore.cli import analyze, options


@pytest.mark.parametrize(
    ("argument", "begun", "offered"),
    [
        (options.WhatToRecord, "fig1", [f"fig{n}" for n in range(10, 20)]),
        (options.FigureName, "dist", ["distance-matrix", "distances"]),
        (options.StateMetricName, "sharp", ["sharpness"]),
        (analyze.AnalysisName, "con", ["convergence", "contraction"]),
    ],
)
def test_names_that_begin_so_are_offered(argument, begun, offered):
    (_, told) = get_args(argument)
    assert told.autocompletion(begun) == offered
