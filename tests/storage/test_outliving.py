"""What works for the holder of a slab ends with the holder's lock, however late it wakes up."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.core.buffer.cpu import Buffer

from tests.storage.test_bucket import SCHEMA, SLAB, content, declared
from tests.tools.waiting import HANGS
from trajstore.engine.orders import Order
from trajstore.engine.walk import Slab
from trajstore.errors import BusyError, IrreproducibleError
from trajstore.reading.verify import verify
from trajstore.recording.workers.job import Shape
from trajstore.storage.format.commits import Commits
from trajstore.storage.places import holders, locks
from trajstore.storage.places.durable import DurableStore
from trajstore.storage.places.opening import place_of
from trajstore.storage.places.place import Place, keeper_of, slab_folder
from trajstore.storage.writing.late_metrics import LateSeries
from trajstore.storage.writing.pipeline import Pipeline
from trajstore.storage.writing.segment import Observation
from trajstore.storage.writing.slab_writer import Ledger, SlabWriter
from trajstore.store import Store

WHOSE = Slab(Order.parse("forward"), 0)
SEGMENTS = {0: range(8), 1: range(8, 12)}
CLIENT = f"""
import pickle, sys, time
from trajstore.storage.places.opening import place_of
from trajstore.storage.places.place import slab_folder
place = place_of(sys.argv[1])
with place.lock({SLAB!r}, "it") as also:
    also(slab_folder("e", (0, 0)))
    print(pickle.dumps(place.held([{SLAB!r}])).hex(), flush=True)
    time.sleep({HANGS})
"""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    declared(place_of(tmp_path / "s.zarr"))
    return tmp_path / "s.zarr"


@contextmanager
def held(place: Place) -> Iterator[None]:
    with place.lock(SLAB, "it") as also:
        also(slab_folder("e", (0, 0)))
        yield


def group_of(place: Place) -> zarr.Group:
    return zarr.open_group(place.keeper(read_only=False), path="e", mode="r+", zarr_format=3)


def shape_of(place: Place) -> Shape:
    """What a worker knows of an experiment."""
    group = group_of(place)
    recorded = {number: len(steps) for number, steps in SEGMENTS.items()}
    return Shape(group, SCHEMA, Commits.of(group, SCHEMA).records, recorded, adaptive=False)


def observations(who: float, number: int) -> list[Observation]:
    return [Observation(n, 0, *content(who, n)) for n in SEGMENTS[number]]


def complete(place: Place, who: float) -> None:
    """Record all that is missing, as another recording does."""
    with held(place):
        ledger, pipeline = Ledger(group_of(place), SCHEMA, 0, 0), Pipeline(threads=1)
        writer = SlabWriter(ledger, pipeline)
        for n in range(ledger.last_step + 1, SCHEMA.steps + 1):
            writer.append(Observation(n, 0, *content(who, n)))
        writer.commit()
        pipeline.close()


def files(store: Path) -> dict[str, bytes]:
    return {str(f.relative_to(store)): f.read_bytes() for f in store.rglob("*") if f.is_file()}


def wrong(store: Path) -> list[str]:
    return [str(found) for found in verify(Store(store)) if not found.harmless]


class Client:
    """A process that holds the lock, and lets this one write."""

    def __init__(self, store: Path) -> None:
        command = [sys.executable, "-c", CLIENT, str(store)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.lent: list[object] = pickle.loads(bytes.fromhex(self._process.stdout.readline().strip()))

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()


@contextmanager
def once(owner: object, name: str, do: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Do something just before the first call of a function."""
    original, waiting = getattr(owner, name), [do]

    def called(*arguments: object) -> object:
        if waiting:
            waiting.pop()()
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, called)
        yield
    assert not waiting, "nothing was done: the test tests nothing"


BEFORE = {"before its file is opened": (DurableStore, "set_sync"), "before it takes its name": (Path, "replace")}


@pytest.mark.parametrize("when", BEFORE)
def test_a_worker_that_outlives_its_client_changes_no_byte(
    store: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, client, after = place_of(store), Client(store), dict[str, bytes]()
    worker = shape_of(place)
    keeper_of(worker.group).lend(client.lent)
    worker.write(WHOSE, 0, observations(1, 0))
    assert (store / "e/params/c/0/0/0/0").exists(), "as long as the client lives, it writes"

    def another_completes_it() -> None:
        client.kill()
        complete(place, 2)
        after.update(files(store))

    owner, name = BEFORE[when]
    with (
        once(owner, name, another_completes_it, monkeypatch),
        pytest.raises(BusyError, match=r"the lock 'e/forward\.0\.lock' was freed, or taken over by another process"),
    ):
        worker.write(WHOSE, 1, observations(1, 1))
    assert files(store) == after, "not one byte is another, and nothing is left behind"
    with pytest.raises(IrreproducibleError):
        worker.write(WHOSE, 0, observations(1, 0))
    assert files(store) == after
    assert not wrong(store)


def test_without_the_folder_of_its_client_such_a_worker_does_damage(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above injects is what it is to be guarded against."""
    place, client = place_of(store), Client(store)
    worker = shape_of(place)
    monkeypatch.setattr(DurableStore, "lend", lambda self, held: None)
    keeper_of(worker.group).lend(client.lent)

    def another_completes_it() -> None:
        client.kill()
        complete(place, 2)

    with once(DurableStore, "set_sync", another_completes_it, monkeypatch):
        worker.write(WHOSE, 1, observations(1, 1))
    assert wrong(store)


def test_a_worker_ends_with_a_lock_that_was_freed_though_its_own_process_holds_it_again(store: Path) -> None:
    place = place_of(store)
    worker = shape_of(place)
    with held(place):
        keeper_of(worker.group).lend(place.held([SLAB]))
        worker.write(WHOSE, 0, observations(1, 0))
    with held(place):
        Ledger(group_of(place), SCHEMA, 0, 0)
        with pytest.raises(BusyError, match="was freed, or taken over"):
            worker.write(WHOSE, 1, observations(1, 1))


def test_a_worker_that_was_taken_for_dead_leaves_what_another_wrote_meanwhile(store: Path) -> None:
    place = place_of(store)
    with held(place):
        lent = place.held([SLAB])
        worker, other = shape_of(place), shape_of(place)
        keeper_of(worker.group).lend(lent)
        keeper_of(other.group).lend(lent)
        ledger = Ledger(group_of(place), SCHEMA, 0, 0)
        ledger.adopt(other.write(WHOSE, 0, observations(1, 0)))
        before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
        assert worker.write(WHOSE, 0, observations(1, 0)).record == ledger.records[0].tolist()
        with pytest.raises(IrreproducibleError, match="steps 0 to 7"):
            worker.write(WHOSE, 0, observations(1.5, 0))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_where_two_get_one_lock_the_later_keeps_the_earlier_out(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when two machines mount a file system that keeps no locks between them."""
    one, other = place_of(store), place_of(store)
    monkeypatch.setattr(locks, "_taken", lambda *_: True)
    with ExitStack() as both:
        both.enter_context(held(one))
        first = Ledger(group_of(one), SCHEMA, 0, 0)
        first.adopt(shape_of(one).write(WHOSE, 0, observations(1, 0)))
        both.enter_context(held(other))
        second = Ledger(group_of(other), SCHEMA, 0, 0)
        assert second.last_step == first.last_step == 7
        second.slots.put(7, b"another's", 7)
        after = files(store)
        for write in (
            lambda: first.discard([0]),
            lambda: first.slots.put(7, b"state", -1),
            lambda: LateSeries(first.group, SCHEMA, (0, 0), "b").put(np.array([1]), np.array([1.0])),
        ):
            with pytest.raises(BusyError, match="taken over"):
                write()
        assert files(store) == after
        second.discard([1])


def test_of_two_that_begin_to_write_at_once_one_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_taken", lambda *_: True)
    with held(place_of(store)):
        earlier = holders.held_here(store.resolve(), SLAB)
        assert earlier is not None
        with held(place_of(store)):
            Ledger(group_of(place_of(store)), SCHEMA, 0, 0).discard([0])
            with pytest.raises(BusyError, match="another process holds the lock"):
                earlier.within(store)


def test_what_killed_writers_left_is_gone_when_the_next_one_begins(store: Path) -> None:
    client = Client(store)
    client.kill()
    left = [f for f in (store / "e/committed/c/0/0").iterdir() if f.name.endswith(".partial")]
    assert left
    (left[0] / f"0.{os.getpid()}.partial").touch()
    complete(place_of(store), 1)
    assert not list(store.rglob("*.partial"))


def test_what_is_linked_where_holders_have_their_folders_stays(store: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    folder = store / "e/committed/c/0/0"
    folder.mkdir(parents=True)
    (folder / "x.partial").symlink_to(tmp_path / "mine")
    complete(place_of(store), 1)
    assert (tmp_path / "mine" / "file").exists()


def test_all_of_a_slab_is_written_through_the_folder_of_the_holder(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file of a slab, whatever it holds; and no other."""
    came: dict[str, set[str]] = {}
    original = Path.replace

    def seen(self: Path, target: Path) -> Path:
        came.setdefault(self.parent.name, set()).add(str(Path(target).relative_to(store)))
        return original(self, target)

    monkeypatch.setattr(Path, "replace", seen)
    place = place_of(store)
    with held(place):
        ledger = Ledger(group_of(place), SCHEMA, 0, 0)
        ledger.adopt(shape_of(place).write(WHOSE, 0, observations(1, 0)), resume=b"state")
        LateSeries(ledger.group, SCHEMA, (0, 0), "b").put(np.array([1]), np.array([1.0]))
        keeper_of(ledger.group).set_sync("e/else/c/0", Buffer.from_bytes(b"x"))
    ((name, through),) = [(name, keys) for name, keys in came.items() if name.endswith(".partial")]
    arrays = {key.split("/")[1] for key in through}
    assert arrays >= {"params", "sketch", "leg", "a", "measured", "committed", "b", "b_committed", "resume"}
    assert "e/else/c/0" not in through
    assert not (store / "e/committed/c/0/0" / name).exists()
