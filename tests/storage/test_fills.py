"""Who recorded what is told however often something was recorded, and whatever dies or is lost meanwhile."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trajstore.cli.inspection import info

import trajstore as ts
from tests.tools.hostile import attributes_of
from trajstore.errors import DamageError, FormatError
from trajstore.exchange.merge import merge
from trajstore.reading.handles import open_root
from trajstore.reading.verify import verify
from trajstore.recording.fills import noted
from trajstore.storage.format.checking import is_metric
from trajstore.storage.format.digest import config_digest
from trajstore.storage.format.schema import check_format
from trajstore.storage.places import requests
from trajstore.storage.places.durable import DurableStore
from trajstore.storage.writing.fills import FOLDER
from trajstore.store import StoredExperiment

WHERE = {"versions": {"torch": "2.9.0"}, "device": "cpu", "threads": 1}
IN_A_DOCUMENT = 32
NOTED = 70
"""Of them, so that they fill two blocks and a part of a third."""


class DiedError(Exception):
    """What a test has happen."""


def record(place: Path | str) -> None:
    """Record a loop of one step, which is the first to be noted."""
    with ts.record(place, "loop", nn.Linear(2, 2), sketch=4, durability="none") as rec:
        rec.step(loss=1.0)


def writable(place: Path | str) -> StoredExperiment:
    group = open_root(place, "none")["loop"]
    return StoredExperiment(ts.Store(place), group)  # type: ignore[arg-type]


def note(place: Path | str, numbers: range, *, stops: tuple[int, ...] = ()) -> None:
    """Note some more recordings of the slab, of which some stop before they end."""
    stored = writable(place)
    for number in numbers:
        with suppress(InterruptedError), noted(stored, [("forward", 0)], WHERE | {"engine": f"number {number}"}):
            if number in stops:
                raise InterruptedError


def told(place: Path | str) -> list[tuple[str | None, bool]]:
    """What is told of the recordings: which, and whether each came to its end."""
    return [(fill.get("engine"), fill["ended"] is not None) for fill in ts.open(place)["loop"].fills]


def expected(numbers: range, *stops: int) -> list[tuple[str | None, bool]]:
    return [(None, True), *((f"number {number}", number not in stops) for number in numbers)]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fills") / "s.zarr"
    record(place)
    note(place, range(1, NOTED))
    return place


@pytest.fixture
def many(sample: Path, tmp_path: Path) -> Path:
    """A store with an experiment that was recorded many times."""
    return Path(shutil.copytree(sample, tmp_path / "s.zarr"))


def test_all_are_told_in_order_wherever_they_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "s.zarr"
    record(place)
    before = 1
    for until, stops in ((IN_A_DOCUMENT, (5, 31)), (IN_A_DOCUMENT + 1, (5, 31)), (NOTED, (5, 31, 40, 69))):
        note(place, range(before, until), stops=stops)
        before = until
        assert told(place) == expected(range(1, until), *(stop for stop in stops if stop < until))
        assert attributes_of(place, "loop")["format"] == (1 if until <= IN_A_DOCUMENT else 2)
        assert list(verify(ts.Store(place))) == []
    assert [fill["id"] for fill in ts.open(place)["loop"].attributes["fills"]] == [
        fill["id"] for fill in ts.open(place)["loop"].fills
    ]
    info(place, "loop", json=True)
    shown = json.loads(capsys.readouterr().out)
    assert len(shown["fills"]) == NOTED
    assert not shown["slabs"][0]["complete"], "its last recording did not end"


def test_a_note_writes_one_file_of_the_same_size_however_many_there_were(monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"memory://{uuid.uuid4().hex}.zarr"
    record(place)
    note(place, range(1, IN_A_DOCUMENT + 1))
    stored, sizes = writable(place), []
    put = requests.put

    def seen(there: Any, key: str, content: Any, version: Any) -> Any:
        if not key.startswith("locks/"):
            sizes.append(len(bytes(content)))
        return put(there, key, content, version)

    monkeypatch.setattr(requests, "put", seen)
    for _ in range(2 * IN_A_DOCUMENT):
        with noted(stored, [("forward", 0)], WHERE):
            pass
    assert len([size for size in sizes if size]) <= 2 * 2 * IN_A_DOCUMENT + 2, "one as it begins and one as it ends"
    later = sizes[2 * IN_A_DOCUMENT :]
    assert max(later) < 1.1 * max(sizes[: 2 * IN_A_DOCUMENT])


def test_an_experiment_is_described_by_as_much_as_before(many: Path) -> None:
    """And whoever knows only the old place is refused, and takes nothing for unrecorded."""
    attributes = attributes_of(many, "loop")
    assert "fills" not in attributes
    with pytest.raises(FormatError, match="store format 2, this trajstore reads format 1; install a newer"):
        check_format(attributes, "experiment 'loop'")
    assert attributes_of(many, "loop")["config"] == ts.open(many)["loop"].config


@pytest.mark.parametrize("name", ["set_sync", "remove"])
def test_whatever_dies_while_they_move_none_is_lost(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "s.zarr"
    record(place)
    note(place, range(1, IN_A_DOCUMENT))
    before = expected(range(1, IN_A_DOCUMENT))
    moving = [*before, (f"number {IN_A_DOCUMENT}", False)]
    original: Callable[..., Any] = getattr(DurableStore, name)
    survived = False
    for calls in range(12):
        left = [calls]

        def dying(store: DurableStore, *arguments: Any, left: list[int] = left) -> None:
            if not left[0]:
                raise DiedError
            left[0] -= 1
            original(store, *arguments)

        with monkeypatch.context() as patch, suppress(DiedError):
            patch.setattr(DurableStore, name, dying)
            note(place, range(IN_A_DOCUMENT, IN_A_DOCUMENT + 1))
            survived = True
        found = told(place)
        assert found[: len(before)] == before
        assert survived or found in (before, moving), found
        assert [finding for finding in verify(ts.Store(place)) if not finding.harmless] == []
        if survived:
            break
    assert survived
    assert found[-1] == (f"number {IN_A_DOCUMENT}", True)


def gone(block: Path) -> None:
    block.unlink()


def junk(block: Path) -> None:
    block.write_bytes(b"{ junk")


def another(block: Path) -> None:
    block.write_text(block.read_text().replace("number", "numbre"))


def a_link(block: Path) -> None:
    block.rename(block.with_name("elsewhere"))
    block.symlink_to("elsewhere")


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("how", [gone, junk, another])
def test_a_block_that_is_lost_is_told_and_repaired(how: Callable[[Path], None], number: int, many: Path) -> None:
    block = many / "loop" / FOLDER / str(number) / "zarr.json"
    how(block)
    stored = ts.open(many)["loop"]
    for read in (lambda: stored.fills, stored.commits, stored.dataset):
        with pytest.raises(DamageError, match=f"{FOLDER}/{number}/zarr.json"):
            read()
    state = stored.state_dict(order="forward", seed=0, step=1)
    assert state["weight"].shape == (2, 2), "states can be read all the same"
    (found,) = verify(ts.Store(many))
    assert f"{FOLDER}/{number}/zarr.json" in str(found)
    assert not found.harmless
    (repaired,) = verify(ts.Store(many), repair=True)
    assert repaired.repaired
    assert [finding for finding in verify(ts.Store(many)) if not finding.harmless] == []
    kept = expected(range(1, NOTED))
    del kept[number * IN_A_DOCUMENT : (number + 1) * IN_A_DOCUMENT]
    assert told(many) == kept
    note(many, range(NOTED, NOTED + 1))
    assert told(many)[-1] == (f"number {NOTED}", True)


def test_a_block_is_not_read_through_a_link(many: Path) -> None:
    a_link(many / "loop" / FOLDER / "1" / "zarr.json")
    with pytest.raises(FormatError, match="symbolic link"):
        _ = ts.open(many)["loop"].fills


@pytest.mark.parametrize("wrong", [{"id": 1}, [{"slabs": []}], [7], None])
def test_what_no_recording_notes_is_refused(wrong: object, many: Path) -> None:
    block = many / "loop" / FOLDER / "1" / "zarr.json"
    rest = {"fills": wrong}
    document = json.loads(block.read_text())
    document["attributes"]["trajstore"] = rest | {"digest": config_digest(rest)}
    block.write_text(json.dumps(document))
    with pytest.raises(DamageError, match=f"{FOLDER}/1"):
        _ = ts.open(many)["loop"].fills


def test_a_merge_takes_them_over_once(many: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.zarr"
    merge(ts.open(many), ts.Store(few))
    assert told(few) == told(many)
    note(few, range(NOTED, NOTED + 2))
    merge(ts.open(few), ts.open(many))
    merge(ts.open(few), ts.open(many))
    assert told(many) == told(few) == expected(range(1, NOTED + 2))
    assert list(verify(ts.Store(many))) == list(verify(ts.Store(few))) == []


def test_a_slab_of_which_nothing_says_who_recorded_it_is_named(many: Path) -> None:
    place = many
    with ts.record(place, "loop", nn.Linear(2, 2), seed=1, sketch=4) as rec:
        rec.step(loss=1.0)
    blocks = sorted((place / "loop" / FOLDER).glob("*/zarr.json"))
    blocks[-1].unlink()
    (found,) = verify(ts.Store(place))
    assert (found.order, found.seed, found.harmless) == ("forward", 1, True)
    assert "nothing says who recorded it" in str(found)
    assert torch.isfinite(ts.open(place)["loop"].state_dict(order="forward", seed=1, step=1)["weight"]).all()


def test_a_metric_cannot_be_called_as_they_are() -> None:
    assert not is_metric(FOLDER)
