"""Packed, an experiment reads as before, whatever stops or damages it, and is written to as before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import google_crc32c
import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from trajstore.cli.inspection import ls

import trajstore as ts
from tests.storage import test_missing_files
from trajstore import analysis
from trajstore.errors import BusyError, ConfigurationError, DamageError, TrajstoreError
from trajstore.exchange.merge import merge, remove
from trajstore.exchange.pack import pack, unpack
from trajstore.reading.handles import open_root
from trajstore.reading.verify import verify
from trajstore.storage import packing
from trajstore.storage.places import packed, removing
from trajstore.storage.places.durable import DurableStore
from trajstore.storage.writing.resume_slots import ResumeSlots
from trajstore.storage.writing.slab_writer import guarded

TINY: dict[str, Any] = {**test_missing_files.TINY, "seeds": [0, 3]}
HOW: dict[str, Any] = test_missing_files.HOW


class DiedError(Exception):
    """What a test has happen."""


pytestmark = pytest.mark.usefixtures("several_segments")


@pytest.fixture(scope="module")
def whole(several_segments: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a late metric, several segments, and a loop that takes its optimizer's memory along."""
    store = tmp_path_factory.mktemp("whole") / "s.zarr"
    ts.run(ts.Experiment.of(TINY), store, **HOW)
    analysis.compute(ts.open(store)["net"], "gradient_norm")
    for seed in (0, 1):
        loop(store, seed, 5)
    shutil.rmtree(f"{store}.traj")
    return store


def loop(store: Path, seed: int, steps: int, **how: Any) -> None:
    torch.manual_seed(seed)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with ts.record(store, "loop", model, optimizer=optimizer, seed=seed, sketch=4, durability="none", **how) as rec:
        for _ in range(rec.last + 1, steps):
            loss = model(torch.ones(2)).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rec.step(loss=loss)


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    """The same, in files."""
    return Path(shutil.copytree(whole, tmp_path / "s.zarr"))


@pytest.fixture
def small(store: Path) -> Path:
    """The same, packed."""
    for name in ("net", "loop"):
        pack(ts.Store(store), name)
    return store


def on_disk(store: Path) -> dict[str, bytes]:
    return {file.relative_to(store).as_posix(): file.read_bytes() for file in store.rglob("*") if file.is_file()}


def seen(store: Path, *names: str) -> dict[str, bytes | None]:
    """What trajstore sees, by key."""
    place = ts.Store(store).place
    return {key: place.read(key) for name in names or ("net", "loop") for key, _ in place.files(name)}


def chunks(store: Path) -> dict[str, bytes | None]:
    """What it sees of arrays."""
    return {key: content for key, content in seen(store).items() if key.count("/") > 1 and "/resume/" not in key}


def answers(store: Path, *names: str) -> dict[str, Any]:
    """What readers make of it."""
    opened = ts.open(store)
    rows = 'SELECT * FROM metrics ORDER BY experiment, "order", seed, step'
    found: dict[str, Any] = {"sql": repr(opened.sql(rows).fetchall())}
    for name, experiment in ((name, opened[name]) for name in names or ("net", "loop")):
        found[name] = experiment.dataset().load().to_dict()
        found[f"{name} slabs"] = experiment.slabs()
        found[f"{name} status"] = repr(experiment.progress())
        found[f"{name} state"] = {
            part: array.tobytes() for part, array in experiment.arrays(order="forward", seed=0, step=3).items()
        }
    told: dict[str, Any] = json.loads(json.dumps(found, default=repr))  # so that a NaN is one
    return told


def findings(store: Path) -> list[str]:
    return [str(found) for found in verify(ts.Store(store))]


def test_a_packed_store_reads_as_before_in_every_way_and_comes_out_bit_for_bit(store: Path) -> None:
    files, asked, plain = on_disk(store), answers(store), plainly(store)
    for name in ("net", "loop"):
        room = pack(ts.Store(store), name)
        assert room.after < room.before * 0.6
    shards = [key for key in on_disk(store) if packed._is_container(key)]
    assert len(shards) == 2 + sum("c.0" in key for key in shards) > 20
    assert not [key for key in on_disk(store) if "/c/0/0/" in key and "batch_index" not in key]
    assert answers(store) == asked
    for before, after in zip(plain, plainly(store), strict=True):
        xr.testing.assert_identical(before, after)
    assert set(seen(store)) == set(files) - {"zarr.json"}
    assert findings(store) == []
    for name in ("net", "loop"):
        unpack(ts.Store(store), name)
    assert {key: content for key, content in on_disk(store).items() if not key.startswith("..")} == files


def plainly(store: Path) -> list[xr.Dataset]:
    """What xarray and Zarr make of it without trajstore."""
    return [xr.open_zarr(store / name, consolidated=False).load() for name in ("net", "loop")]


def test_many_small_slabs_take_at_most_five_times_what_they_hold(tmp_path: Path) -> None:
    runs = ts.Experiment.of(TINY | {"seeds": list(range(24)), "steps": 2, "problem": {"family": "quadratic"}})
    stored = ts.run(runs, tmp_path / "s.zarr", **HOW)
    before = stored.bytes_taken()
    room = pack(ts.Store(tmp_path / "s.zarr"), "net")
    assert before == room.before > 20 * room.content
    assert stored.bytes_taken() == room.after < 5 * room.content


def test_packing_twice_and_laying_out_twice_change_nothing_more(store: Path) -> None:
    files, opened = on_disk(store), ts.Store(store)
    pack(opened, "net")
    once = on_disk(store)
    assert pack(opened, "net").before == opened["net"].bytes_taken()
    assert on_disk(store) == once
    unpack(opened, "net")
    unpack(opened, "net")
    assert on_disk(store) == files


@pytest.mark.filterwarnings("ignore::trajstore.errors.ResumedWarning")
def test_whoever_writes_lays_it_out_as_files_and_writes_what_it_would_have(
    whole: Path, small: Path, tmp_path: Path
) -> None:
    never = Path(shutil.copytree(whole, tmp_path / "never.zarr"))
    longer = ts.Experiment.of(TINY | {"steps": 12})
    for one in (never, small):
        ts.run(longer, one, resume=True, extend=True, **HOW)
        loop(one, 0, 8, resume=True)
        loop(one, 2, 3)
        analysis.compute(ts.open(one)["net"], "gradient_norm")
    same = [key for key in on_disk(never) if not key.endswith("zarr.json") or key.count("/") > 1]
    assert {key: on_disk(small)[key] for key in same} == {key: on_disk(never)[key] for key in same}
    assert findings(small) == []


def test_what_is_complete_is_not_laid_out_because_somebody_asks_for_it_again(small: Path) -> None:
    before = on_disk(small)
    ts.run(ts.Experiment.of(TINY), small, resume=True, **HOW)
    assert on_disk(small) == before


def test_packed_experiments_are_merged_from_and_into(whole: Path, small: Path, tmp_path: Path) -> None:
    merge(ts.open(small), ts.Store(tmp_path / "new.zarr"))
    assert chunks(tmp_path / "new.zarr") == chunks(whole)
    more = tmp_path / "more.zarr"
    ts.run(ts.Experiment.of(TINY | {"seeds": [7]}), more, **HOW)
    merge(ts.open(more), ts.Store(small), ["net"])
    assert ts.open(small)["net"].schema.seeds == (0, 3, 7)
    assert ts.open(small)["net"].progress().complete.all()
    assert findings(small) == []


def test_a_reader_notices_nothing_when_it_is_packed_and_laid_out_meanwhile(store: Path) -> None:
    experiment = ts.open(store)["net"]
    dataset, states = experiment.dataset(), []
    before = ts.open(store)["net"].dataset().load()
    for change in (pack, unpack, pack):
        states.append(experiment.arrays(order="backward", seed=3, step=9))
        change(ts.Store(store), "net")
        xr.testing.assert_identical(experiment.dataset().load(), before)
    assert all((one[part] == states[0][part]).all() for one in states for part in one)
    xr.testing.assert_identical(dataset.load(), before)


def _stopping(at: int, patch: pytest.MonkeyPatch) -> None:
    """Have the process die before the change of the disk with a number."""
    count = iter(range(10**6))

    def dying(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **named: Any) -> Any:
            if next(count) == at:
                raise DiedError
            return change(*args, **named)

        return changed

    patch.setattr(DurableStore, "set_sync", dying(DurableStore.set_sync))
    patch.setattr(packing, "take_away", dying(removing.take_away))
    patch.setattr(packing, "delete", dying(removing.delete))
    patch.setattr(Path, "unlink", dying(Path.unlink))


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("change", [pack, unpack])
def test_stopped_at_any_moment_it_reads_as_before_and_goes_on(
    change: Callable[..., Any], every: int, whole: Path, tmp_path: Path
) -> None:
    """Before each change of the disk; what is seen is compared byte by byte, and verified at some."""
    begun = tmp_path / "begun.zarr"
    shutil.copytree(whole / "loop", begun / "loop")
    shutil.copy(whole / "zarr.json", begun)
    content = seen(begun, "loop")
    if change is unpack:
        pack(ts.Store(begun), "loop")
    stopped = 0
    for at in range(0, 500, every):
        store = Path(shutil.copytree(begun, tmp_path / f"{at}.zarr"))
        with pytest.MonkeyPatch.context() as patch:
            _stopping(at, patch)
            try:
                change(ts.Store(store), "loop")
            except DiedError:
                stopped += 1
            else:
                break
        assert seen(store, "loop") == content, at
        if at % 16 == 4:
            assert all(found.harmless for found in verify(ts.Store(store), repair=at % 32 == 4))
        (pack, unpack)[at // every % 2](ts.Store(store), "loop")
        assert seen(store, "loop") == content, at
        if at % 16 == 4:
            assert findings(store) == []
        shutil.rmtree(store)
    assert stopped * every > 40, "nothing was stopped any more: where is the disk changed now?"


def test_who_holds_a_slab_keeps_it_from_being_packed_and_who_comes_after_is_told(store: Path) -> None:
    opened = ts.Store(store)
    with opened["net"].locked("forward", 0), pytest.raises(BusyError, match="seed 0"):
        pack(opened, "net")
    group: Any = open_root(store, "none")["net"]
    pack(opened, "net")  # between opening to write and the lock of a slab
    with pytest.raises(BusyError, match=r"'net' in .* was packed just now"):
        guarded(group, opened["net"].schema, (0, 0))


def test_there_is_nothing_to_pack_in_an_object_store() -> None:
    ts.run(ts.Experiment.of(TINY | {"seeds": [0], "steps": 2}), "memory://packing", **HOW)
    with pytest.raises(ConfigurationError, match="is an object store, where small objects take no more room"):
        pack(ts.Store("memory://packing"), "net")


def test_what_is_packed_is_listed_with_the_whole_store_and_removed_with_its_experiment(
    whole: Path, small: Path
) -> None:
    place = ts.Store(small).place
    assert {key for key, _ in place.files("")} == set(on_disk(whole))
    assert {key for key, _ in place.files("net/leg/c/1")} == {f"net/leg/c/1/{seed}/0" for seed in (0, 1)}
    remove(ts.Store(small), "net")
    assert list(ts.open(small)) == ["loop"]
    assert all(key.startswith("loop/") or key == "zarr.json" for key in on_disk(small))
    assert findings(small) == []


def test_large_chunks_stay_in_files_of_their_own(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states, legs = (
        max(f.stat().st_size for f in store.glob(f"net/{at}/c/**/0") if f.is_file()) for at in ("params", "leg")
    )
    assert states > legs + 9
    monkeypatch.setattr(packing, "_SMALL", legs + 9)
    before = seen(store)
    pack(ts.Store(store), "net")
    assert (store / "net/params/c/0/0").is_dir()
    assert not (store / "net/leg/c").exists()
    assert seen(store) == before


def flips(file: Path, count: int) -> Iterator[int]:
    """Change a byte at a time, all over a file, and put it back."""
    content = file.read_bytes()
    for at in {*np.linspace(0, len(content) - 1, count).astype(int).tolist()}:
        file.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        yield at
    file.write_bytes(content)


def test_a_byte_that_changes_in_what_is_packed_is_never_another_number(small: Path) -> None:
    before, changed = answers(small, "loop"), 0
    for file in sorted(small.glob("loop/*/c.0.*")):
        for at in flips(file, 2):
            found = None
            with suppress(DamageError):
                found = answers(small, "loop")
            changed += found is None
            assert found in (None, before), (file, at)
    assert changed > 10
    assert answers(small, "loop") == before


def test_a_byte_that_changes_in_the_archive_is_a_resume_state_that_was_or_none(small: Path) -> None:
    """Of three hundred places; what is not told by the archive is by the chunk's own checksum."""
    slots = {seed: ResumeSlots(ts.open(small)["loop"].group, "forward", seed) for seed in (0, 1)}
    before, less = {seed: slots[seed].contents() for seed in slots}, 0
    for at in flips(small / "loop" / packed.ARCHIVE, 300):
        for seed in slots:
            found: list[tuple[int, bytes]] = []
            with suppress(DamageError):
                found = ResumeSlots(ts.open(small)["loop"].group, "forward", seed).contents()
            less += found != before[seed]
            assert all(state in before[seed] for state in found), at
    assert less > 100


@pytest.mark.parametrize("array", ["params", "committed"])
def test_a_list_of_chunks_that_is_damaged_is_named_and_a_repair_takes_it_out_and_keeps_it(
    array: str, small: Path
) -> None:
    shard = next((small / "net" / array).glob("c.*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-2] + b"??")
    told = findings(small)
    assert len(told) == 1
    assert f"net/{array}/{shard.name}" in told[0]
    assert "does not match its checksum" in told[0]
    with pytest.raises(DamageError, match="experiment 'net'"):
        answers(small, "net")
    with pytest.raises(DamageError, match=r"does not match its checksum.*verify --repair"):
        ts.run(ts.Experiment.of(TINY | {"steps": 12}), small, resume=True, extend=True, **HOW)
    loop_before = {key: seen(small)[key] for key in seen(small) if key.startswith("loop/")}
    repaired = [*verify(ts.Store(small), repair=True)]
    assert any(found.repaired for found in repaired)
    kept = [file for file in (small / "net" / array / "taken-out").rglob("*") if file.name == shard.name]
    assert [file.read_bytes() for file in kept] == [content[:-2] + b"??"]
    assert {key: seen(small)[key] for key in loop_before} == loop_before
    ts.run(ts.Experiment.of(TINY), small, resume=True, **HOW)
    assert all(found.harmless for found in verify(ts.Store(small)))


def test_a_document_that_is_damaged_takes_nothing_of_what_is_packed_with_it(whole: Path, small: Path) -> None:
    (small / "net/params/zarr.json").write_text("{")
    assert any("net/params/zarr.json" in told for told in findings(small))
    assert any(found.repaired for found in verify(ts.Store(small), repair=True))
    assert {key: value for key, value in seen(small).items() if "taken-out" not in key} == seen(whole)


def test_a_shard_that_is_gone_is_damage_and_no_nan(small: Path) -> None:
    (small / "net/params/c.0.0.0.0").unlink()
    with pytest.raises(
        DamageError, match="order 'forward', seed 0: steps 0 to 3 were committed, and net/params/c/0/0/0/0"
    ):
        ts.open(small)["net"].arrays(order="forward", seed=0, step=3)
    assert any("net/params/c/0/0/0/0" in told for told in findings(small))


def lying(small: Path, how: str) -> None:
    shard, archive = small / "net/leg/c.0.0.0", small / "net" / packed.ARCHIVE
    content = shard.read_bytes()
    match how:
        case "link":
            shard.rename(small.parent / "elsewhere")
            shard.symlink_to(small.parent / "elsewhere")
        case "folder":
            shard.unlink()
            shard.mkdir()
        case "empty":
            shard.write_bytes(b"")
        case "beyond":
            spans = np.frombuffer(content[-(16 * 4 + 4) : -4], "<u8").copy()
            spans[0] = 2**63
            index = spans.tobytes()
            shard.write_bytes(content[: -(16 * 4 + 4)] + index + google_crc32c.value(index).to_bytes(4, "little"))
        case "huge":
            document = json.loads((small / "net/leg/zarr.json").read_text())
            document["shape"] = [2**40, 2**40, 4096]
            (small / "net/leg/zarr.json").write_text(json.dumps(document))
        case "elsewhere":
            with ZipFile(archive, "w") as written:
                written.writestr("../../../victim", b"overwritten")
        case "no archive":
            archive.write_bytes(b"PK no archive")
        case "compressed":
            with ZipFile(archive, "w", compression=8) as written:
                written.writestr("forward.0.0/c/0", bytes(2**20))


@pytest.mark.parametrize("how", ["link", "folder", "empty", "beyond", "huge", "elsewhere", "no archive", "compressed"])
def test_what_a_strangers_store_says_of_its_packing_is_not_believed(how: str, small: Path) -> None:
    victim = small.parent / "victim"
    victim.write_text("mine")
    lying(small, how)
    told = [str(found) for found in verify(ts.Store(small), "net")]
    assert any("net/" in line for line in told)
    for act in (lambda: answers(small, "net"), lambda: unpack(ts.Store(small), "net")):
        with suppress(TrajstoreError):
            act()
    [*verify(ts.Store(small), "net", repair=True)]
    assert victim.read_text() == "mine"


def test_ls_says_when_packing_is_worth_it(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ls(str(store))
    assert "pack" not in capsys.readouterr().err
    monkeypatch.setattr("trajstore.cli.inspection._WORTH", 0)
    ls(str(store))
    assert f"`trajstore pack {store}` saves" in capsys.readouterr().err
