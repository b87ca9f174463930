"""What a store says is data: no path, no code, no command of a terminal, and never more than the machine can hold."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numcodecs import Zstd  # type: ignore[import-untyped]
from trajstore.cli.console import print_csv, print_json, print_table, say

import trajstore as ts
from tests.conftest import SMALL_NET, sampled
from tests.tools.hostile import Document, attributes_of, put, rewrite, state_chunk, with_checksum
from trajstore.errors import ConfigurationError, DamageError, FormatError, NotFoundError, TrajstoreError, printable
from trajstore.exchange.merge import merge, remove
from trajstore.reading.verify import verify
from trajstore.storage.format.checking import checked
from trajstore.storage.format.codecs import refuse_bomb, zstd_size
from trajstore.storage.format.schema import Schema

Program = Callable[..., tuple[Any, str, str]]
ESCAPES = "\x1b]0;owned\x07\x1b[31m\x9b2J\u202egnp\x00"


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small store, recorded once, to be copied."""
    store = tmp_path_factory.mktemp("sample") / "runs.zarr"
    ts.run(ts.Experiment.of({**SMALL_NET, "seeds": [0]}), store)
    return store


@pytest.fixture
def store(sample: Path, tmp_path: Path) -> Path:
    shutil.copytree(sample, tmp_path / "runs.zarr")
    return tmp_path / "runs.zarr"


def outside(folder: Path, store: Path) -> dict[str, bytes]:
    """Every file of a folder that is neither the store's nor beside it."""
    own = (store.name, f"{store.name}.traj", "other.zarr", "other.zarr.traj")
    files = (f for f in folder.rglob("*") if f.is_file() and f.relative_to(folder).parts[0] not in own)
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def tried(store: Path, target: Path) -> Iterator[TrajstoreError | None]:
    """Everything that reads a store or repairs it; what is raised must be one of trajstore's own errors."""
    doings: list[Callable[[], object]] = [
        lambda: repr(ts.open(store)),
        lambda: ts.open(store)._repr_html_(),
        lambda: [one.slabs() for one in map(ts.open(store).__getitem__, ts.open(store))],
        lambda: ts.open(store)["net"].dataset().load(),
        lambda: ts.open(store)["net"].state_dict(order="forward", seed=0, step=3),
        lambda: ts.open(store).sql("SELECT * FROM runs, experiments").fetchall(),
        lambda: list(verify(ts.Store(store))),
        lambda: merge(ts.open(store), ts.Store(target)),
        lambda: list(verify(ts.Store(store), repair=True)),
        lambda: remove(ts.open(store), "net"),
    ]
    for do in doings:
        try:
            do()
        except (TrajstoreError, MemoryError) as error:
            yield error if isinstance(error, TrajstoreError) else None
        else:
            yield None


WRONG: dict[str, tuple[tuple[Any, ...], object]] = {
    "a seed that is a path": (("schema", "seeds"), ["x/../../../victim/important"]),
    "a seed below 0": (("schema", "seeds"), [-1]),
    "a seed that is true": (("schema", "seeds"), [True]),
    "seeds twice": (("schema", "seeds"), [0, 0]),
    "more init seeds than seeds": (("schema", "init_seeds"), [0, 1]),
    "an order that is a path": (("schema", "orders"), ["../../victim", "backward", 3]),
    "an order with commands": (("schema", "orders"), [ESCAPES, "backward"]),
    "an order with a space": (("schema", "orders"), ["for ward", "backward"]),
    "a metric with a NUL": (("schema", "metrics"), {"test\x00loss": None}),
    "a metric with a quote": (("schema", "metrics"), {'x"; DROP TABLE runs; --': None}),
    "a metric of text": (("schema", "metrics"), {"test_loss": "many"}),
    "metrics that are a list": (("schema", "metrics"), ["test_loss"]),
    "too many metrics": (("schema", "metrics"), {f"m{k}": None for k in range(64)}),
    "more steps than there is memory": (("schema", "steps"), 2**40),
    "a billion steps": (("schema", "snapshots"), [[0, 2**39, 1]]),
    "snapshots that go back": (("schema", "snapshots"), [[0, 5, 1], [3, 8, 1]]),
    "snapshots beyond the end": (("schema", "snapshots"), [[0, 100, 1]]),
    "snapshots at no distance": (("schema", "snapshots"), [[0, 12, 0]]),
    "no snapshots": (("schema", "snapshots"), []),
    "segments of nothing": (("schema", "snapshots_per_segment"), 0),
    "segments beyond memory": (("schema", "snapshots_per_segment"), 2**30),
    "sketches beyond memory": (("schema", "components"), 2**30),
    "batches beyond memory": (("schema", "batch_size"), 2**39),
    "another codec": (("schema", "codec"), "pickle"),
    "a dtype that is a function": (("schema", "layout", "entries", 0, "dtype"), "load"),
    "a tensor at a negative place": (("schema", "layout", "entries", 0, "offset"), -4),
    "a tensor over another": (("schema", "layout", "entries", 1, "offset"), 0),
    "a tensor of negative size": (("schema", "layout", "entries", 0, "shape"), [-1, 2]),
    "a tensor beyond memory": (("schema", "layout", "entries", 0, "shape"), [2**40, 2**40]),
    "a tensor with commands": (("schema", "layout", "entries", 0, "name"), ESCAPES),
    "a tensor tied to nothing": (("schema", "layout", "tied"), {"a": "nothing"}),
    "no layout": (("schema", "layout"), None),
    "no schema": (("schema",), []),
    "a table in 400 others": (("config", "problem"), functools.reduce(lambda inner, _: {"x": inner}, range(400), {})),
    "a list in 400 others": (("config", "problem", "x"), functools.reduce(lambda inner, _: [inner], range(400), [])),
    "a configuration of other orders": (("config", "orders"), ["forward"]),
    "a configuration of other seeds": (("config", "seeds"), [1]),
    "a configuration of other steps": (("config", "steps"), 7),
    "a name that is a path": (("config", "name"), "../victim"),
    "a problem that is a list": (("config", "problem"), ["factory"]),
    "an operator of text": (("config", "operator"), "sgd"),
    "a record of numbers": (("config", "record"), 3),
    "fills that are a table": (("fills",), {"id": 1}),
    "a fill without an id": (("fills", 0), {"slabs": []}),
    "a fill of a path": (("fills", 0, "slabs"), [["forward", "../../victim"]]),
    "a plan of another kind": (("fills", 0, "plan"), {"engine": "os:system"}),
    "seconds of text": (("fills", 0, "seconds"), {"applications": "many"}),
    "another format": (("format",), "1"),
}


@pytest.mark.parametrize("name", sampled(WRONG, every=2))
def test_what_is_of_the_wrong_type_form_or_range_is_refused_when_it_is_opened(name: str, store: Path) -> None:
    (store.parent / "victim").mkdir()
    (store.parent / "victim" / "important.lock").write_text("important")
    before = outside(store.parent, store)
    path, value = WRONG[name]
    rewrite(store, "net", lambda attributes: put(attributes, path, value))
    with pytest.raises(FormatError) as refused:
        ts.open(store)["net"]
    assert "\n" not in str(refused.value)
    assert "net" in str(refused.value)
    told = list(tried(store, store.parent / "other.zarr"))
    assert told[-1] is not None, "nothing is removed that cannot be read"
    assert outside(store.parent, store) == before
    assert (store / "net").is_dir()


def test_a_sound_document_is_as_it_was(sample: Path) -> None:
    attributes = ts.open(sample)["net"].attributes
    assert checked(copy.deepcopy(attributes)) == attributes


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["../../x", ESCAPES, "os:system", "factory", "NaN", "\ud800", "/etc/passwd"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


def places(document: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document, as a path of keys."""
    inner = (
        document.items() if isinstance(document, Mapping) else enumerate(document) if isinstance(document, list) else ()
    )
    return [place for key, item in inner for place in ((*above, key), *places(item, (*above, key)))]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whatever_a_document_says_it_is_checked_or_refused_with_one_line(sample: Path, data: st.DataObject) -> None:
    attributes = attributes_of(sample, "net")
    place = data.draw(st.sampled_from(places(attributes)))
    put(attributes, place, data.draw(JSON))
    try:
        checked(attributes)
        schema = Schema.from_json(attributes["schema"])
    except ValueError:
        return
    assert all(np.dtype(spec.dtype).itemsize * math.prod(spec.chunks) < 2**31 for spec in schema.arrays())
    assert len(schema.snapshots) <= schema.steps + 1


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_document_ends_in_a_traceback_or_touches_anything_outside(sample: Path, data: st.DataObject) -> None:
    """One value anywhere in an experiment's document, or in an array's, is replaced by any other."""
    folder = sample.parent / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    store = folder / "runs.zarr"
    shutil.copytree(sample, store)
    (folder / "victim").write_text("important")
    before = outside(folder, store)
    which = data.draw(
        st.sampled_from(["net", "net", "net", "net/params", "net/leg", "net/committed", "net/order", "."])
    )
    file = store / which / "zarr.json"
    document = json.loads(file.read_text())
    place = data.draw(st.sampled_from(places(document)))
    value = data.draw(JSON)
    if which == "net" and place[:2] == ("attributes", "trajstore") and len(place) > 2:
        rewrite(store, "net", lambda attributes: put(attributes, place[2:], value))
    else:
        put(document, place, value)
        file.write_text(json.dumps(document))
    for error in tried(store, folder / "other.zarr"):
        assert error is None or str(error) == printable(str(error))
    assert outside(folder, store) == before


@pytest.mark.parametrize("what", ["net/params/c/0/0/0/0", "net/leg/c/0/0/0", "net/zarr.json", "net/params", "net"])
def test_what_a_store_links_to_is_not_read_copied_or_written(what: str, store: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    shutil.move(store / what, victim)
    (store / what).symlink_to(victim)
    before = outside(tmp_path, store)
    with pytest.raises(FormatError, match="is a symbolic link; nothing is read or written through links"):
        ts.open(store)["net"].state_dict(order="forward", seed=0, step=3)
    with pytest.raises(FormatError, match="is a symbolic link"):
        merge(ts.open(store), ts.Store(tmp_path / "other.zarr"))
    copied = (f for f in (tmp_path / "other.zarr").rglob("*") if f.is_file())
    assert not [f for f in copied if f.name not in ("zarr.json",) and what in str(f)]
    assert list(verify(ts.Store(store)))
    list(tried(store, tmp_path / "other.zarr"))
    assert outside(tmp_path, store) == before


def test_a_key_beside_a_slab_is_not_copied_either(store: Path, tmp_path: Path) -> None:
    """A private key, say, that a chunk of a resume state links to."""
    (tmp_path / "id_ed25519").write_text("PRIVATE")
    (slot,) = (store / "net" / "resume").glob("forward.0.*/c/0")
    slot.unlink()
    slot.symlink_to(tmp_path / "id_ed25519")
    with pytest.raises(FormatError, match="is a symbolic link"):
        merge(ts.open(store), ts.Store(tmp_path / "other.zarr"))
    assert not [f for f in (tmp_path / "other.zarr").rglob("*") if f.is_file() and f.read_bytes() == b"PRIVATE"]


@pytest.mark.parametrize("link", ["locks", "index", "removed", "index/metrics", "locks/net"])
def test_what_lies_beside_a_store_links_nowhere_either(link: str, store: Path, tmp_path: Path) -> None:
    """Locks, the index and what is removed are kept in a folder that may have come with the store."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "old.parquet").write_text("important")
    os.utime(victim / "old.parquet", (0, 0))
    (victim / "declare.lock").write_text("important")
    there = tmp_path / "runs.zarr.traj" / link
    there.parent.mkdir(parents=True)
    there.symlink_to(victim)
    before = outside(tmp_path, store)
    list(tried(store, tmp_path / "other.zarr"))
    assert outside(tmp_path, store) == before
    assert (store / "net").is_dir() is link.startswith("locks"), "what was asked for needs the locks only"


def test_a_pipe_or_a_device_is_no_chunk(store: Path) -> None:
    file = store / "net" / "leg" / "c" / "0" / "0" / "0"
    file.unlink()
    os.mkfifo(file)  # reading it would wait for ever
    with pytest.raises(FormatError, match="neither a file nor a folder"):
        ts.open(store)["net"].slabs()
    assert list(verify(ts.Store(store)))


def test_an_experiment_that_is_a_link_is_not_removed_half(store: Path, tmp_path: Path, trajstore: Program) -> None:
    shutil.move(store / "net", tmp_path / "far")
    (store / "net").symlink_to(tmp_path / "far")
    before = outside(tmp_path, store)
    code, _, err = trajstore("rm", str(store), "net", "--yes")
    assert (code, err.count("\n")) == (2, 1)
    assert "symbolic link" in err
    assert outside(tmp_path, store) == before
    assert (store / "net").is_symlink()


@pytest.mark.parametrize("alias", ["link", "link above", "relative"])
def test_nothing_is_exported_into_the_store_by_another_name(
    alias: str, store: Path, tmp_path: Path, trajstore: Program
) -> None:
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(store)
    (tmp_path / "real").mkdir()
    into = {"link": "link/net", "link above": "again/runs.zarr/net", "relative": "real/../runs.zarr"}[alias]
    for name in ("m.parquet", "s.safetensors"):
        state = ["--order", "forward", "--seed", "0", "--step", "3"] if name.startswith("s") else []
        code, _, err = trajstore("export", str(store), "net", "-o", f"{tmp_path}/{into}/{name}", *state)
        assert code == 2
        assert "lies in the store" in err
    code, _, err = trajstore("export", str(store), "net", "-o", f"{tmp_path}/{into}/arrays", "--numpy")
    assert (code, "lies in the store" in err) == (2, True)
    assert {f.name for f in store.iterdir()} == {"net", "zarr.json"}


def bomb(size: int) -> bytes:
    """A frame of zstd that says that it decodes to so many bytes."""
    return b"\x28\xb5\x2f\xfd" + bytes([0xE0]) + size.to_bytes(8, "little") + b"\x01\x00\x00"


@pytest.mark.parametrize("size", [1, 255, 256, 65_791, 65_792, 10**6])
def test_what_a_frame_decodes_to_is_known_before_it_is(size: int) -> None:
    frame = Zstd(3).encode(np.zeros(size, np.uint8))
    assert zstd_size(frame) == size
    refuse_bomb(frame, size)
    with pytest.raises(ValueError, match=f"decodes to {size:,} bytes"):
        refuse_bomb(frame, size - 1)


def test_a_chunk_that_decodes_to_more_than_it_declares_takes_no_memory(store: Path) -> None:
    (store / "net" / "leg" / "c" / "0" / "0" / "0").write_bytes(with_checksum(bomb(2**40)))
    with pytest.raises(DamageError, match=f"decodes to {2**40:,} bytes"):
        ts.open(store)["net"].slabs()
    assert [found for found in verify(ts.Store(store)) if "leg" in (found.file or "")]


@pytest.mark.parametrize("numbers", [97 * 64 - 1, 97 * 64 + 1])
def test_a_state_of_another_length_is_refused_and_not_filled_up(numbers: int, store: Path) -> None:
    chunk = store / "net" / "params" / "c" / "0" / "0" / "0" / "0"
    array = json.loads((store / "net" / "params" / "zarr.json").read_text())["chunk_grid"]["configuration"][
        "chunk_shape"
    ]
    whole = int(np.prod(array))
    chunk.write_bytes(state_chunk(whole + numbers - 97 * 64))
    with pytest.raises(DamageError, match="another number of values"):
        ts.open(store)["net"].state_dict(order="forward", seed=0, step=3)


def test_an_array_that_declares_chunks_beyond_memory_is_refused(store: Path) -> None:
    file = store / "net" / "leg" / "zarr.json"
    document = json.loads(file.read_text())
    document["chunk_grid"]["configuration"]["chunk_shape"] = [1, 1, 2**40]
    file.write_text(json.dumps(document))
    with pytest.raises(DamageError, match="chunks of shape"):
        ts.open(store)["net"].slabs()


def test_no_codec_is_run_that_no_recording_uses(store: Path) -> None:
    file = store / "net" / "leg" / "zarr.json"
    document = json.loads(file.read_text())
    document["codecs"][1] = {"name": "gzip", "configuration": {"level": 1}}
    file.write_text(json.dumps(document))
    with pytest.raises(DamageError, match="codecs 'bytes, gzip"):
        ts.open(store)["net"].slabs()


@pytest.mark.parametrize(
    ("array", "codecs"),
    [
        ("train_loss", ["numcodecs.pcodec", "crc32c"]),  # whose decoder is bounded for states only
        ("train_loss", ["bytes", "zstd", "zstd", "crc32c"]),  # whose inner frame says nothing before it is decoded
        ("params", ["bytes", "zstd", "crc32c"]),
    ],
)
def test_an_array_has_the_codecs_that_are_declared_for_it(array: str, codecs: list[str], store: Path) -> None:
    file = store / "net" / array / "zarr.json"
    document = json.loads(file.read_text())
    known = {"numcodecs.pcodec": {"level": 7}, "bytes": {"endian": "little"}, "zstd": {"level": 1, "checksum": False}}
    document["codecs"] = [{"name": name, "configuration": known.get(name, {})} for name in codecs]
    file.write_text(json.dumps(document))
    with pytest.raises(DamageError, match="with which no store writes such an array"):
        ts.open(store)["net"].dataset().load()


def test_a_document_of_another_form_is_damage_wherever_it_is_met(store: Path) -> None:
    file = store / "net" / "params" / "zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shape": None}))
    assert any(tried(store, store.parent / "other.zarr"))


def test_a_file_larger_than_it_can_be_is_not_read(store: Path) -> None:
    with (store / "net" / "leg" / "c" / "0" / "0" / "0").open("r+b") as file:
        file.truncate(2**41)  # takes no room on the disk, and all memory
    with pytest.raises(DamageError, match="bytes, and what it is to hold has at most"):
        ts.open(store)["net"].slabs()


@pytest.mark.parametrize("which", ["zarr.json", "net/zarr.json", "net/params/zarr.json"])
def test_a_document_larger_than_any_is_not_read(which: str, store: Path) -> None:
    """A list of a hundred million numbers would take a gigabyte."""
    with (store / which).open("r+b") as file:
        file.truncate(2**27)
    with pytest.raises(DamageError, match="134,217,728 bytes, and what it is to hold has at most 67,108,864"):
        ts.open(store)["net"].dataset().load()
    assert [found for found in verify(ts.Store(store)) if found.file == which]


def test_a_repair_keeps_what_is_larger_than_the_disk_without_copying_it(store: Path) -> None:
    file = store / "net" / "leg" / "zarr.json"
    whole = file.read_bytes()
    with file.open("r+b") as opened:
        opened.truncate(2**41)
    assert [found.file for found in verify(ts.Store(store), repair=True) if found.repaired] == ["net/leg/zarr.json"]
    assert json.loads(file.read_bytes()) == json.loads(whole)
    (kept,) = (store / "net" / "leg" / "taken-out").rglob("zarr.json")
    assert kept.stat().st_size == 2**41
    assert not [found for found in verify(ts.Store(store)) if not found.harmless]


def test_a_document_that_nobody_could_read_is_not_written(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file: file.read_bytes() for file in store.rglob("zarr.json")}
    monkeypatch.setattr("trajstore.storage.places.durable.DOCUMENT_BYTES", 5_000)
    monkeypatch.setattr("trajstore.storage.places.durable.refuse_large", lambda path, most: None)
    with pytest.raises(ConfigurationError, match="bytes, and a document has at most 5,000: record fewer seeds"):
        ts.run(ts.Experiment.of({**SMALL_NET, "seeds": list(range(100))}), store, extend=True)
    assert (store / "net" / "zarr.json").read_bytes() == before[store / "net" / "zarr.json"]


def test_a_record_larger_than_it_can_be_takes_no_memory_of_those_who_only_copy_it(store: Path) -> None:
    for chunk in ("committed/c/0/0/0/0", "params/c/0/0/0/0"):
        whole = (store / "net" / chunk).read_bytes()
        with (store / "net" / chunk).open("r+b") as file:
            file.truncate(2**41)
        if chunk.startswith("committed"):
            with pytest.raises(DamageError, match="at most"):
                ts.open(store).sql("SELECT * FROM runs").fetchall()
        with pytest.raises(DamageError, match="at most"):
            merge(ts.open(store), ts.Store(store.parent / "other.zarr"))
        (store / "net" / chunk).write_bytes(whole)


def commands_shown(text: str) -> list[str]:
    return [c for c in text if c != "\n" and printable(c) != c]


def test_what_a_store_says_commands_no_terminal(store: Path, trajstore: Program) -> None:
    def commanding(attributes: Document) -> None:
        attributes["config"]["problem"] = {"family": ESCAPES, "field": ESCAPES, ESCAPES: [ESCAPES]}
        attributes["config"]["operator"] = {"object": ESCAPES}
        attributes["fills"][0] |= {"device": ESCAPES, "began": ESCAPES, "versions": {"torch": ESCAPES}}

    rewrite(store, "net", commanding)
    (store / f"x{ESCAPES[:-1]}").mkdir()
    (store / f"x{ESCAPES[:-1]}" / "zarr.json").write_text('{"attributes": {"trajstore": {}}}')
    at = str(store)
    for command in (
        ["ls", at], ["ls", at, "--json"], ["info", at, "net"], ["info", at, "net", "--json"], ["verify", at],
        ["sql", at, "SELECT * FROM runs"], ["sql", at, "SELECT * FROM experiments", "--json"],
        ["sql", at, "SELECT * FROM experiments", "--csv"], ["sql", at, "SELECT nothing FROM experiments"],
        ["verify", at, "net", "--replay"], ["analyze", at, "net", "contraction"], ["claims", at], ["info", at, "nix"],
    ):  # fmt: skip
        code, out, err = trajstore(*command)
        assert code in (0, 1, 2)
        assert not commands_shown(out), (command, out)
        assert not commands_shown(err), (command, err)
    assert not commands_shown(repr(ts.open(store)) + repr(ts.open(store)["net"]))


def test_console_and_errors_escape_once_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    say(ESCAPES)
    print_table([ESCAPES], [[ESCAPES]])
    print_csv([ESCAPES], [[ESCAPES, 1]])
    print_json({ESCAPES: [ESCAPES, "\x7f\U000e0001"]})
    out = capsys.readouterr().out
    assert not commands_shown(out)
    assert json.loads(out[out.index("{") :]) == {ESCAPES: [ESCAPES, "\x7f\U000e0001"]}
    assert not commands_shown(str(ConfigurationError(f"experiment {ESCAPES} is not there")))
    assert printable("θ₀, ─, é, 日本") == "θ₀, ─, é, 日本"


def test_html_shows_what_a_store_says_and_runs_nothing(store: Path) -> None:
    def scripted(attributes: Document) -> None:
        attributes["config"]["problem"] = {"family": "<script>alert(1)</script>"}
        attributes["config"]["operator"] = {"object": "<img src=x onerror=alert(1)>"}

    rewrite(store, "net", scripted)
    shown = ts.open(store)._repr_html_() + ts.open(store)["net"]._repr_html_()
    assert "<script" not in shown
    assert "<img" not in shown
    assert "&lt;script&gt;" in shown


def test_html_commands_nothing_either(store: Path) -> None:
    rewrite(store, "net", lambda attributes: attributes["config"].update(problem={"family": ESCAPES}))
    shown = ts.open(store)._repr_html_() + ts.open(store)["net"]._repr_html_()
    assert shown.isprintable()
    assert printable(ESCAPES) in shown


def test_verify_names_whatever_lies_beside_experiments(store: Path, tmp_path: Path) -> None:
    """Links and pipes are read by nobody; one that leads nowhere may have led to an experiment."""
    (tmp_path / "there").write_text("something")
    (store / "README").symlink_to(tmp_path / "there")
    (store / "old").symlink_to(tmp_path / "gone")
    (store / "notes.txt").write_text("mine")
    (store / "zarr.json.1.partial").touch()
    os.mkfifo(store / "pipe")
    told = {found.file: found for found in verify(ts.Store(store))}
    assert {file: found.harmless for file, found in told.items()} == {
        "README": True, "old": False, "notes.txt": True, "pipe": True, "zarr.json.1.partial": True,
    }  # fmt: skip
    assert "leads nowhere; if it led to an experiment, put that here, or remove it" in told["old"].what
    assert "nothing is read through it; remove it" in told["README"].what
    assert all(found.experiment is None for found in told.values())
    assert [found.file for found in verify(ts.Store(store), repair=True) if found.repaired] == ["zarr.json.1.partial"]
    assert {file.name for file in store.iterdir()} == {"net", "zarr.json", "README", "old", "notes.txt", "pipe"}
    (store / "far").symlink_to(store / "net")
    assert {found.file: found.harmless for found in verify(ts.Store(store))}["far"] is False


@pytest.mark.parametrize("text", ["../../victim", "a b", "\x1b[1m", "C" * 200, "con\x00", "-x"])
def test_a_folder_with_another_name_than_an_experiment_can_have_is_none(text: str, store: Path) -> None:
    if "/" in text or "\0" in text:
        with pytest.raises(TrajstoreError):
            ts.open(store)[text]
        return
    shutil.copytree(store / "net", store / text)
    assert list(ts.open(store)) == ["net"]
    with pytest.raises(NotFoundError):
        ts.open(store)[text]
    assert [found for found in verify(ts.Store(store)) if found.experiment is None]
