"""A sample of what `python -m tests.tools.ruins` tries: a store is damaged, and everything else is as it was."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.storage.test_strange_stores import JSON, places
from tests.tools.damages import DAMAGES, DOCUMENTS, Damage, Site, sealed
from tests.tools.hostile import put
from tests.tools.ruins import DOINGS, Outcome, all_of, drawn, examine, part

NET = "runs.zarr/net"
SAMPLE = {
    "runs.zarr/zarr.json: a device": ["ls"],
    f"{NET}/zarr.json: a pipe": ["ls", "info sound"],
    f"{NET}/leg/zarr.json: attributes of a list": ["slabs net"],
    f"{NET}/params/c/0/0/0/0: a link to a device": ["states net", "states sound"],
    f"{NET}/params/c/0/0/0/0: two terabytes": ["states net"],
    f"{NET}/gradient_norm_committed: nothing": ["late net"],
    "runs.zarr/loop/noted-fills/0/zarr.json: a socket": ["info loop", "ls"],
    "runs.zarr/loop/noted-fills/1/zarr.json: a device": ["slabs loop"],
    "runs.zarr/loop/noted-fills/1/zarr.json: a folder": ["slabs loop"],
    "runs.zarr/loop/noted-fills/1: a pipe": ["slabs loop"],
    "runs.zarr.traj/locks: a few bytes": ["states net", "ts.record another seed"],
    "net: 1000000000 steps": ["info net"],
    "net/params: chunks of 1000000000": ["states net"],
    "loop block fills.0.slabs = 'x'": ["attributes loop"],
}
"""Damage → what is tried then."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = Site(tmp_path_factory.mktemp("ruins") / "site")
    site.build()
    return site


def test_whatever_lies_where_a_file_of_a_store_was_it_is_told_in_one_line(site: Site) -> None:
    sound = all_of(site, {name for doings in SAMPLE.values() for name in doings})
    assert all(outcome.code == 0 for outcome in sound.values()), sound
    wrong, refused = [], 0
    for damage, doings in SAMPLE.items():
        site.restore()
        DAMAGES[damage].do(site)
        for doing in doings:
            found = examine(DAMAGES[damage], DOINGS[doing], site, sound[doing])
            wrong += [f"{damage} | {doing} | {problem}" for problem in found.problems]
            refused += found.outcome.code != 0
    assert not wrong, "\n".join(wrong)
    assert refused >= len(SAMPLE), "the damages are none any more"


def test_what_is_wrong_is_found(site: Site) -> None:
    """A control: an answer that changes, a traceback, and a file that is touched outside."""
    sound = all_of(site, ["info sound", "names"])
    harmless = Damage("nothing", "net", lambda site: None)

    def touches(site: Site) -> str:
        (site.victim / "important").write_text("gone")
        raise KeyError("key")

    site.restore()
    assert not examine(harmless, DOINGS["info sound"], site, sound["info sound"]).problems
    one = examine(harmless, replace(DOINGS["info sound"], do=DOINGS["info net"].do), site, sound["info sound"])
    assert "says something else of what is sound" in one.problems[0]
    (first, second) = examine(harmless, replace(DOINGS["names"], do=touches), site, sound["names"]).problems
    assert "a traceback" in first
    assert "touched something outside" in second


LIGHT = ("slabs", "attributes", "states", "dataset", "late", "export metrics")


def fuzzed(site: Site, data: st.DataObject) -> None:
    """Have one place of one document say anything else, or nothing, and read what it belongs to, and what not."""
    file, victim = data.draw(st.sampled_from(sorted(DOCUMENTS.items())))
    whole = json.loads((site.pristine / file).read_text())
    place = data.draw(st.sampled_from(places(whole)))
    value = data.draw(JSON)
    of = victim or "net"
    doings = data.draw(st.lists(st.sampled_from([*(f"{one} {of}" for one in LIGHT), "ls", "names", "states sound"]),
                                min_size=1, max_size=3, unique=True))  # fmt: skip
    known = _sound.setdefault(site, {})
    for name in [name for name in doings if name not in known]:
        known |= all_of(site, [name])

    def damage(site: Site) -> None:
        put(whole, place, value)
        content = json.dumps(sealed(whole) if data.draw(st.booleans()) else whole)
        (site.folder / file).write_text(content)

    one = Damage(f"{file} {place} {value!r}", victim, damage, says=True)
    site.restore()
    try:
        one.do(site)
    except (UnicodeEncodeError, TypeError, ValueError):
        return  # no digest can be made of it
    for name in doings:
        assert not examine(one, DOINGS[name], site, known[name]).problems, (one.name, name)


_sound: dict[Site, dict[str, Outcome]] = {}


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whatever_a_document_says_it_ends_in_one_line_or_an_answer(site: Site, data: st.DataObject) -> None:
    fuzzed(site, data)


@pytest.mark.slow
@settings(max_examples=1_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whatever_thousands_of_documents_say(site: Site, data: st.DataObject) -> None:
    fuzzed(site, data)


@pytest.mark.slow
def test_many_more_of_them(tmp_path: Path) -> None:
    chosen = random.Random(0).sample([*DAMAGES.values()], 300)
    report = part(tmp_path, drawn(chosen, 3, 0))
    assert report.tried > 800
    assert not report.problems, "\n".join(" | ".join(problem) for problem in report.problems)
