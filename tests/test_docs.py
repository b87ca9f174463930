"""The snippets of docs/dataset.md run as they stand, in order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "dataset.md"


def test_the_page_on_datasets(trajstore):
    text = PAGE.read_text()
    (command,) = re.findall(r"`trajstore (record .*)`", text)
    code, _, told = trajstore(*shlex.split(command))
    assert code == 0, told
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert set(names["found"].data_vars) >= {"distance_to_last", "norm_per_layer", "parameter_tail_variance"}
