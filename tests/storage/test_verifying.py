"""Verify finds every damage, says where it is, and repairs so that resume mends it."""

from __future__ import annotations

import json
import random
import shutil
from itertools import product
from pathlib import Path

import pytest

import trajstore as ts
from tests.conftest import SMALL_NET, sampled
from tests.recording.test_resume import contents
from trajstore.errors import FormatError
from trajstore.reading.handles import open_root
from trajstore.reading.verify import verify
from trajstore.storage.places.place import TAKEN_OUT
from trajstore.storage.writing.segment import array_of

HOW = {"engine": "reference", "durability": "none"}
TINY = {
    **SMALL_NET, "problem": {"family": "regression", "width": 3, "depth": 1, "points": 5}, "steps": 9, "seeds": [0],
    "record": {"sketch": 4},
}  # fmt: skip


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("trajstore.recording.schema.segment_length", lambda layout: 4)
    ts.run(ts.Experiment.of(TINY), tmp_path / "s.zarr", **HOW)
    return tmp_path / "s.zarr"


def found(store: Path, **how) -> list[str]:
    """What is found, but for what earlier repairs took out."""
    return [str(finding) for finding in verify(ts.Store(store), **how) if TAKEN_OUT not in (finding.file or "")]


def resume(store: Path) -> None:
    ts.run(ts.Experiment.of(TINY), store, resume=True, **HOW)


def test_a_sound_store_is_sound(store):
    assert found(store) == []
    resume(store)
    assert found(store) == []


def test_a_flipped_byte_anywhere_is_found(store):
    """A sample of bytes of every file; `make torture` takes each."""
    files = sorted(f for f in store.rglob("*") if f.is_file())
    rng = random.Random(0)
    for file in files:
        whole = file.read_bytes()
        for at in {rng.randrange(len(whole))}:
            broken = bytearray(whole)
            broken[at] ^= 1 << rng.randrange(8)
            file.write_bytes(broken)
            assert found(store) or harmless(whole, bytes(broken)), (file, at)
        file.write_bytes(whole)
    assert found(store) == []


def harmless(whole: bytes, broken: bytes) -> bool:
    """Whitespace between the words of a document."""
    try:
        return json.loads(whole) == json.loads(broken)
    except ValueError:
        return False


DAMAGED = {
    "net/params/c/1/0/0/1": r"order 'backward', seed 0, steps 4 to 7: not what was committed",
    "net/train_loss/c/0/0/0": r"order 'forward', seed 0, steps 0 to 3: not what was committed",
    "net/leg/c/1/0/0": r"order 'backward', seed 0: the commit records cannot be read",
    "net/committed/c/0/0/0/0": r"order 'forward', seed 0: the commit records cannot be read",
    "net/resume/forward.0.0/c/0": r"order 'forward', seed 0: a resume state is damaged",
    "net/sketch/zarr.json": r"a document is damaged or missing",
    "net/step/c/0": r"the coordinate 'step' is damaged",
    "zarr.json": "the root document is damaged",
}


@pytest.mark.parametrize(("damaged", "how"), sampled(product(DAMAGED, ["flipped", "missing", "truncated"]), every=2))
def test_repair_takes_out_what_is_damaged_and_resume_writes_it_again(store, damaged, how):
    import re

    store = store.rename(store.with_name("t.zarr"))
    whole = contents(store)
    file, told = store / damaged, DAMAGED[damaged]
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-7])
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 64
        file.write_bytes(content)
    if how == "missing":  # a missing chunk reads as nothing
        told = {
            "net/resume/forward.0.0/c/0": "a resume state was begun and not written",
            "net/leg/c/1/0/0": "order 'backward', seed 0, steps 0 to 3: not what was committed",
            "net/committed/c/0/0/0/0": "order 'forward', seed 0: it was recorded, and its commit records are missing",
        }.get(damaged, told)
    broken = file.read_bytes() if file.exists() else b""
    messages = found(store)
    assert any(re.search(told, message) for message in messages), messages
    assert str(file.relative_to(store)) in "".join(messages) or re.search("resume|step", damaged)
    repaired = found(store, repair=True)
    assert all(message.endswith("; taken out") for message in repaired), repaired
    assert found(store) == []
    resume(store)
    assert found(store) == []
    assert contents(store) == whole
    kept = [file.read_bytes() for file in store.rglob(f"{TAKEN_OUT}/*/**/*") if file.is_file()]
    assert how == "missing" or "resume" in damaged or damaged == "zarr.json" or broken in kept, (
        "what was taken out is kept"
    )


def test_what_cannot_be_repaired_is_told(store):
    document = store / "net" / "zarr.json"
    document.write_text(document.read_text().replace('"lr": 0.05', '"lr": 0.06'))
    message = "experiment 'net': its document is damaged; restore it from a copy (net/zarr.json)"
    assert found(store) == [message]
    assert found(store, repair=True) == [message]


def test_a_half_recorded_store_is_sound_and_leftovers_are_named(store):
    shutil.rmtree(store / "net" / "params" / "c" / "1")  # as if a slab had not been begun
    array_of(open_root(store)["net"], "committed")[1] = -1
    shutil.rmtree(store / "net" / "resume" / "backward.0.0")
    shutil.rmtree(store / "net" / "resume" / "backward.0.1")
    (store / "net" / "params" / "0.abc.partial").write_bytes(b"half")
    (finding,) = verify(ts.Store(store))
    assert str(finding) == "experiment 'net': left by a writer that was killed (net/params/0.abc.partial)"
    assert finding.harmless
    found(store, repair=True)
    assert found(store) == []


def test_damage_where_nothing_was_committed_yet_is_repaired(store):
    """A recording that died before its first commit leaves chunks that are read, and no record."""
    (store / "net" / "committed" / "c" / "1" / "0" / "0" / "0").unlink()
    leg = store / "net" / "leg" / "c" / "1" / "0" / "0"
    broken = bytearray(leg.read_bytes())
    broken[-1] ^= 1
    leg.write_bytes(broken)
    message = (
        "experiment 'net', order 'backward', seed 0: the commit records cannot be read; "
        "recording it again with --resume writes it anew (net/leg/c/1/0/0)"
    )
    assert found(store) == [message]
    assert found(store, repair=True) == [f"{message}; taken out"]
    resume(store)
    assert found(store) == []


@pytest.mark.parametrize(
    ("axis", "array"),
    sampled(
        product([0, 1, -1], ["measured", "counters", "sketch", "leg", "params", "committed", "train_loss"]),
        every=3,
    ),
)
def test_a_document_that_tells_of_a_shorter_array_is_found(store, array, axis):
    document = store / "net" / array / "zarr.json"
    told = json.loads(document.read_text())
    told["shape"][axis] = 0
    document.write_text(json.dumps(told))
    assert f"a document is damaged or missing (net/{array}/zarr.json)" in " ".join(found(store))
    with pytest.raises(FormatError, match=r"shorter array|out of bounds"):
        ts.open(store)["net"].dataset()
    found(store, repair=True)
    assert found(store) == []
