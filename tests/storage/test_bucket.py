"""Object stores: one writer at a time; whoever lost its lock, however late it wakes up, changes nothing that counts."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import obstore
import pytest
import zarr
from zarr.abc.buffer import Buffer
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.buffer import default_buffer_prototype
from zarr.storage import ObjectStore

from tests.tools.hostile import config_of
from tests.tools.torture import Report
from tests.tools.waiting import HANGS
from trajstore.errors import BusyError, ConfigurationError, TrajstoreError, UnreachableError
from trajstore.reading.handles import open_root
from trajstore.reading.verify import verify
from trajstore.storage.format.layout import Entry, Layout
from trajstore.storage.format.schema import Schema
from trajstore.storage.places import bucket as bucket_module
from trajstore.storage.places import requests
from trajstore.storage.places.bucket import Bucket
from trajstore.storage.places.opening import place_of
from trajstore.storage.places.place import DECLARING, Place, slab_lock
from trajstore.storage.writing.declaring import declare
from trajstore.storage.writing.late_metrics import LateSeries
from trajstore.storage.writing.pipeline import Pipeline
from trajstore.storage.writing.segment import Observation
from trajstore.storage.writing.slab_writer import Ledger, SlabWriter
from trajstore.store import Store

LAYOUT = Layout.of([Entry("w", "parameter", (3,), "float32")], {})
SCHEMA = Schema(
    orders=("forward",), seeds=(0,), init_seeds=(0,), data_seeds=(0,), steps=11, snapshots=tuple(range(12)),
    layout=LAYOUT, metrics={"a": None}, components=2, parameters=3, batch_size=0, codec="pcodec",
    snapshots_per_segment=8, late=("b",),
)  # fmt: skip
SLAB = slab_lock("e", "forward", 0)


@pytest.fixture
def bucket(tmp_path) -> Bucket:
    made = place_of(f"memory://{tmp_path.name}/s.zarr")
    assert isinstance(made, Bucket)
    return made


def another(bucket: Bucket) -> Bucket:
    """The same place, as another process sees it."""
    other = Bucket(bucket.address)
    other.objects, other._locks = bucket.objects, bucket._locks
    return other


def declared(place: Place) -> None:
    with place.lock(DECLARING, "it"):
        declare(open_root(place), "e", SCHEMA, config_of(SCHEMA), [])


def content(who: float, step: int):
    return {"a": step + who}, np.array([step, who]), (np.float32([step, who, 0]), np.zeros(0, dtype=np.int64))


def record(place: Place, who: float, acknowledged: list[int] | None = None) -> list[int]:
    """Record what is not recorded yet; return these steps, and tell as soon as they are committed."""
    with place.lock(SLAB, "it"):
        group = zarr.open_group(place.keeper(read_only=False), path="e", mode="r+", zarr_format=3)
        ledger, pipeline = Ledger(group, SCHEMA, 0, 0), Pipeline(threads=1)
        writer, steps = SlabWriter(ledger, pipeline), list(range(ledger.last_step + 1, SCHEMA.steps + 1))
        try:
            for n in steps:
                writer.append(Observation(n, 0, *content(who, n)), resume=lambda n=n: bytes([1, n, int(10 * who)]))
                if n % 3 == 2:
                    writer.commit()
                    pipeline.drain()
                    if acknowledged is not None:
                        acknowledged[:] = range(n + 1)
                    late = LateSeries(group, SCHEMA, (0, 0), "b")
                    known = late.read()[0]
                    late.put(new := np.array([k for k in (n - 1, n) if not known[k]], dtype=np.int64), new + who)
        finally:
            pipeline.close()
    return steps


@contextmanager
def before_each_put(told: Callable[[], None]) -> Iterator[None]:
    """Call a function before every object that this thread's recording puts."""
    originals = requests.create, requests.replace

    def hooked(original):
        def put(*args):
            told()
            return original(*args)

        return put

    requests.create, requests.replace = map(hooked, originals)
    try:
        yield
    finally:
        requests.create, requests.replace = originals


def duel(first: int, second: int) -> list[str]:
    """Let one writer stop before its put number `first`, and another take over, which stops in turn; both go on.

    Return what is wrong in the end: nothing that the second committed may be touched.
    """
    bucket = Bucket("memory://duel/s.zarr")
    declared(bucket)
    stopped, over = threading.Event(), threading.Event()
    counts, told = {"first": 0, "second": 0}, threading.local()
    begun: list[threading.Thread] = []
    outcome: dict[str, object] = {}
    acknowledged: list[int] = []

    def takes_over() -> None:
        told.me = "second"
        rival = another(bucket)
        rival._proven = True
        rival.unlock()
        try:
            outcome["steps"] = record(rival, 0.5)
        except BaseException as error:
            outcome["error"] = error
        finally:
            stopped.set()

    def before() -> None:
        # Puts are made by threads of zarr's; there are only two writers, and they take turns.
        who = "second" if (begun and not stopped.is_set()) or over.is_set() else "first"
        counts[who] += 1
        if who == "first" and counts[who] == first and not begun:
            begun.append(threading.Thread(target=takes_over, daemon=True))
            begun[0].start()
            stopped.wait(20)
        elif who == "second" and counts[who] == second:
            stopped.set()
            over.wait(20)

    bucket._proven = True
    with before_each_put(before):
        try:
            record(bucket, 0.0, acknowledged)
        except BusyError:
            outcome["busy"] = True
        except TrajstoreError as error:
            outcome["first"] = error
        # Were the second to die now, this is what would be left.
        problems = [f"after the first: {finding}" for finding in verify(Store(bucket)) if not finding.harmless]
        over.set()
        for thread in begun:
            thread.join(20)
    problems += [f"{name}: {outcome[name]!r}" for name in ("error", "first") if name in outcome]
    problems += [str(finding) for finding in verify(Store(bucket))]
    if begun and "steps" not in outcome and "error" not in outcome:
        problems.append("the second hangs")
    group = Store(bucket)["e"].group
    commits = Store(bucket)["e"].commits()
    if begun and not problems:
        if not commits.complete.all():
            problems.append("something is missing")
        problems += [
            f"step {n} is not what its second writer committed: {group['a'][0, 0, n]}"
            for n in outcome["steps"]
            if group["a"][0, 0, n] != n + 0.5 or group["params"][0, 0, 1, n] != np.float32(0.5)
        ]
        problems += [
            f"step {n}, which its first writer committed, is another now: {group['a'][0, 0, n]}"
            for n in acknowledged
            if group["a"][0, 0, n] != n or n in outcome["steps"]
        ]
        known, values = LateSeries(group, SCHEMA, (0, 0), "b").read()
        problems += [f"late value of step {n}" for n in np.flatnonzero(known) if values[n] - n not in (0.0, 0.5)]
    return problems


def duels(most: int, seed: int) -> Report:
    """Stop two writers at every moment, and let both go on."""
    pairs = [(first, second) for first in range(1, 48) for second in (*range(1, 2 * first + 6), 1_000)]
    report = Report("writers that lost their lock", Counter(duels=0))
    for first, second in random.Random(seed).sample(pairs, min(most, len(pairs))):
        report.add(f"stopped before put {first}, the other before put {second}", duel(first, second), duels=1)
    return report


def test_a_writer_that_lost_its_lock_changes_nothing_that_counts():
    """A sample; `make torture` takes every pair of moments."""
    report = duels(8, 0)
    assert not report.problems, "\n".join(report.problems)


def test_the_second_writer_is_told_who_holds_the_lock(bucket):
    other = another(bucket)
    with bucket.lock(SLAB, "slab x"):
        with pytest.raises(BusyError) as caught, other.lock(SLAB, "slab x"):
            pass
        assert f"slab x is being written by process {os.getpid()} on" in str(caught.value)
        assert f"trajstore unlock {bucket.address}" in str(caught.value)
    with other.lock(SLAB, "slab x"):
        pass


def test_a_lock_of_a_process_that_died_here_is_taken_over_with_a_fence(bucket):
    declared(bucket)
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    with bucket.lock(SLAB, "it"):
        key = f"locks/{SLAB}"
        held = json.loads(bytes(obstore.get(bucket._locks, key).bytes()))
        assert bucket.lease(SLAB).fence == 0
    died = {**held, "holder": {**held["holder"], "process": int(gone.stdout)}}
    obstore.put(bucket._locks, key, json.dumps(died).encode())
    with bucket.lock(SLAB, "it"):
        assert bucket.lease(SLAB).fence == held["generation"] + 1
    with bucket.lock(SLAB, "it"):  # released as it should be: nobody needs to be kept out any more
        assert bucket.lease(SLAB).fence == held["generation"] + 1
    record(bucket, 0.0)
    fences = Store(bucket)["e"].group["committed"][0, 0, :, -1]
    assert fences.tolist() == [held["generation"] + 1] * SCHEMA.segments
    assert list(verify(Store(bucket))) == []


def test_a_lock_held_elsewhere_is_freed_by_a_person_only(bucket):
    with bucket.lock(SLAB, "it"):
        key = f"locks/{SLAB}"
        held = json.loads(bytes(obstore.get(bucket._locks, key).bytes()))
    far = {**held, "holder": {**held["holder"], "host": "elsewhere", "process": 1}}
    obstore.put(bucket._locks, key, json.dumps(far).encode())
    with pytest.raises(BusyError, match="process 1 on elsewhere"), bucket.lock(SLAB, "it"):
        pass
    assert [one.split(" since")[0] for one in bucket.unlock()] == [f"{SLAB}: process 1 on elsewhere"]
    assert bucket.unlock() == []
    with bucket.lock(SLAB, "it"):
        assert bucket.lease(SLAB).fence > 0


def test_a_writer_waits_as_long_as_it_was_told(bucket):
    other, held, events = another(bucket), threading.Event(), []

    def hold() -> None:
        with other.lock(DECLARING, "it"):
            held.set()
            time.sleep(0.5)
            events.append("freed")

    holding = threading.Thread(target=hold)
    holding.start()
    held.wait()
    with bucket.lock(DECLARING, "it", patience=HANGS):
        events.append("taken")
    holding.join()
    assert events == ["freed", "taken"]


def test_a_server_that_does_not_look_at_conditions_is_refused(bucket, monkeypatch):
    put = obstore.put
    monkeypatch.setattr(obstore, "put", lambda requests, key, content, mode=None: put(requests, key, content))
    with pytest.raises(ConfigurationError, match="does not honour conditional puts"), bucket.lock(SLAB, "it"):
        pass
    assert not any(page for page in obstore.list(bucket._locks))


def test_nothing_is_replaced_without_a_lock(bucket):
    declared(bucket)
    group = zarr.open_group(bucket.keeper(read_only=False), path="e", mode="r+", zarr_format=3)
    with pytest.raises(BusyError, match="may be written only under a lock"):
        group.attrs["other"] = 1


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s4://bucket/runs.zarr", "s3://, gs://, memory:// or file://"),
        ("s3://bucket", "name the store in the bucket, as in s3://bucket/runs.zarr"),
        ("s3://bucket/", "name the store in the bucket"),
        ("memory://", "name the store"),
        ("file://elsewhere/runs.zarr", "write file:///path/on/this/machine"),
        ("s3://bucket/runs.zarr?versionId=1", r"has no '\?', '#'"),
        ("s3://bucket/a/../runs.zarr", r"no '\?', '#', '.', '..'"),
        (Path("s3://bucket/runs.zarr"), "give a URL as text"),
    ],
)
def test_urls_that_name_no_store(url, message):
    with pytest.raises(ConfigurationError, match=message):
        place_of(url)


def test_a_file_url_is_a_folder(tmp_path):
    assert str(place_of(f"file://{tmp_path}/a%20b.zarr")) == f"{tmp_path}/a b.zarr"


def test_a_lock_taken_away_stays_lost_in_a_process_that_took_it_again(bucket):
    """A notebook whose first recording hangs around, and writes when it is forgotten."""
    declared(bucket)
    first = bucket.lock(SLAB, "it")
    first.__enter__()
    group = zarr.open_group(bucket.keeper(read_only=False), path="e", mode="r+", zarr_format=3)
    ledger, pipeline = Ledger(group, SCHEMA, 0, 0), Pipeline(threads=1)
    writer = SlabWriter(ledger, pipeline)
    writer.append(Observation(0, 0, *content(0.0, 0)))
    bucket.unlock()
    assert record(bucket, 0.5) == list(range(12))
    writer.commit()
    with pytest.raises(BusyError, match=r"the lock 'e/forward\.0\.lock' was taken"):
        pipeline.drain()
    with pytest.raises(BusyError):
        pipeline.close()
    first.__exit__(None, None, None)
    assert list(verify(Store(bucket))) == []
    assert Store(bucket)["e"].group["a"][0, 0, 0] == 0.5


def test_who_did_not_end_well_is_fenced_out(bucket):
    with pytest.raises(KeyboardInterrupt), bucket.lock(SLAB, "it"):
        raise KeyboardInterrupt
    with bucket.lock(SLAB, "it"):
        assert bucket.lease(SLAB).fence > 0


def test_a_lock_that_was_put_though_the_answer_says_otherwise_is_held(bucket, monkeypatch):
    create = requests.create
    monkeypatch.setattr(requests, "create", lambda *args: create(*args) and None)
    with bucket.lock(SLAB, "it"):
        assert bucket.lease(SLAB) is not None
    assert bucket.unlock() == []


def test_a_lock_that_could_not_be_freed_is_taken_over_by_its_own_process(bucket, monkeypatch):
    def unreachable(*args: object) -> None:
        raise UnreachableError("the network is away")

    with monkeypatch.context() as away, pytest.raises(UnreachableError), bucket.lock(SLAB, "it"):
        away.setattr(requests, "replace", unreachable)
    with bucket.lock(SLAB, "it"):
        assert bucket.lease(SLAB).fence > 0


def test_a_lock_is_held_by_one_thread_only(bucket, monkeypatch):
    create, is_there, go_on = requests.create, threading.Event(), threading.Event()

    def slowly(*args):
        put = create(*args)
        is_there.set()
        assert go_on.wait(30)
        return put

    with bucket.lock("another", "it"):  # conditions have been tried then
        pass
    monkeypatch.setattr(requests, "create", slowly)
    inside: list[bool] = []

    def hold() -> None:
        with bucket.lock(SLAB, "it"):
            inside.append(True)

    first = threading.Thread(target=hold)
    first.start()
    assert is_there.wait(30)
    with pytest.raises(BusyError), bucket.lock(SLAB, "it"):
        pass
    go_on.set()
    first.join()
    assert inside == [True]


def test_a_lock_is_freed_whose_taking_was_interrupted(bucket, monkeypatch):
    with bucket.lock("another", "it"):
        pass
    create = requests.create

    def interrupted(*args):
        create(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(requests, "create", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bucket.lock(SLAB, "it").__enter__()
    monkeypatch.undo()
    assert bucket.unlock() == []
    with bucket.lock(SLAB, "it"):
        assert bucket.lease(SLAB) is not None


def test_a_failure_does_not_wait_long_for_a_server_that_is_silent(bucket, monkeypatch):
    answer, begun = threading.Event(), time.monotonic()

    def fail() -> None:
        with bucket.lock(SLAB, "it"):
            monkeypatch.setattr(bucket_module, "_PATIENCE", 0.2)
            monkeypatch.setattr(requests, "get", lambda *_: answer.wait(HANGS))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    answer.set()
    assert time.monotonic() - begun < HANGS  # it did not wait for the answer
    monkeypatch.undo()
    with bucket.lock(SLAB, "it"):
        assert bucket.lease(SLAB) is not None


def test_a_delete_is_waited_for(bucket, monkeypatch):
    """It knows no conditions: one that Ctrl-C left running would take out what the next writer puts."""
    delete, threads = obstore.delete, []

    def noticed(*args):
        threads.append(threading.current_thread())
        delete(*args)

    declared(bucket)
    monkeypatch.setattr(obstore, "delete", noticed)
    with bucket.lock(DECLARING, "it"):
        bucket.remove("e")
    assert len(threads) >= 2
    assert set(threads) == {threading.main_thread()}


def test_who_gives_up_waiting_stops_no_request():
    go_on, done = threading.Event(), threading.Event()
    answer = requests.in_a_thread(lambda: go_on.wait(30) and done.set())
    assert not answer.cancel()
    go_on.set()
    assert answer.result(30) is None
    assert done.is_set()


def test_what_an_interruption_left_running_does_not_write_under_the_next_lock(bucket):
    content = [default_buffer_prototype().buffer.from_bytes(bytes([n])) for n in range(4)]
    keeper = bucket.keeper(read_only=False)

    def interrupted() -> None:
        with bucket.lock(DECLARING, "it"):
            keeper.set_sync("a", content[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with bucket.lock(DECLARING, "it"):
        bucket.keeper(read_only=False).set_sync("b", content[1])
        with pytest.raises(BusyError, match="was taken over"):
            keeper.set_sync("b", content[2])
    assert bucket.read("b") == bytes([1])
    with bucket.lock(DECLARING, "it"):
        bucket.keeper(read_only=False).set_sync("b", content[3])
    assert bucket.read("b") == bytes([3])


def test_a_process_that_ends_under_a_lock_ends():
    held = (
        "from trajstore.storage.places.opening import place_of\n"
        "held = place_of('memory://a/s.zarr').lock('lock', 'it')\n"
        "held.__enter__()\n"
    )
    assert subprocess.run([sys.executable, "-c", held], timeout=HANGS).returncode == 0


def test_a_keeper_that_is_pickled_opens_its_bucket_again_to_read(bucket, monkeypatch):
    with pytest.raises(ConfigurationError, match="in the memory of this process; others cannot read it"):
        pickle.dumps(bucket.keeper(read_only=True))
    monkeypatch.setattr(bucket, "only_here", False)  # as if it were on a server
    keeper = pickle.loads(pickle.dumps(bucket.keeper(read_only=True)))
    assert keeper._bucket is bucket
    assert keeper == bucket.keeper(read_only=True)
    assert keeper.read_only
    with pytest.raises(
        ConfigurationError, match="open for writing in this process, and a copy of it would be a second"
    ):
        pickle.dumps(bucket.keeper(read_only=False))


def test_a_store_that_does_not_answer_is_not_taken_for_a_damaged_one(bucket, monkeypatch):
    declared(bucket)
    record(bucket, 0.0)
    get = requests.get

    def sometimes(requests, key, part=None):
        if "/leg/c/" in key:
            raise UnreachableError("the network is away")
        return get(requests, key, part)

    monkeypatch.setattr(requests, "get", sometimes)
    for repair in (False, True):
        with pytest.raises(UnreachableError):
            list(verify(Store(bucket), repair=repair))
    monkeypatch.undo()
    assert list(verify(Store(bucket))) == []
    assert Store(bucket)["e"].commits().complete.all()


def test_zarr_sees_what_its_own_view_of_a_bucket_shows(bucket):
    for key, content in {"a/b/c": b"12345", "a/b/d": b"678", "a/e": b"9", "f": b"0"}.items():
        obstore.put(bucket.objects, key, content)
    ours, plain = bucket.keeper(read_only=True), ObjectStore(bucket.objects, read_only=True)
    parts = [None, RangeByteRequest(1, 3), RangeByteRequest(2, 9), OffsetByteRequest(2), SuffixByteRequest(2)]

    async def shown(store) -> list[object]:
        found: list[object] = []
        for key in ("a/b/c", "a/b", "nothing"):
            found += [await store.exists(key), *[await store.get(key, default_buffer_prototype(), p) for p in parts]]
        found += await store.get_partial_values(default_buffer_prototype(), [("f", None), ("a/b/c", parts[1])])
        for prefix in ("", "a", "a/", "a/b", "nothing"):
            found.append(sorted([name async for name in store.list_dir(prefix)]))
            found.append(sorted([key async for key in store.list_prefix(prefix)]))
            found.append(await store.getsize_prefix(prefix))
        found.append(await store.getsize("a/b/c"))
        found.append(sorted([key async for key in store.list()]))
        return [bytes(one.to_bytes()) if isinstance(one, Buffer) else one for one in found]

    assert (found := asyncio.run(shown(ours))) == asyncio.run(shown(plain))
    assert b"345" in found


def test_no_thread_outlives_its_answer(bucket, monkeypatch):
    """obstore's own threads want the interpreter after they have answered: one that ends just then is aborted."""
    declared(bucket)

    def used(*_: object, **__: object) -> None:
        raise AssertionError("answers come in threads of obstore's")

    for name in dir(obstore):
        if name.endswith("_async"):
            monkeypatch.setattr(obstore, name, used)
    record(bucket, 0.0)
    assert list(verify(Store(bucket))) == []
    assert np.array_equal(Store(bucket)["e"].group["params"][0, 0, 0], np.arange(12))


def test_whoever_lost_the_lock_of_declarations_deletes_nothing(bucket):
    with bucket.lock(DECLARING, "it"):
        root = open_root(bucket)
        bucket.unlock()
        other = another(bucket)
        declared(other)
        record(other, 0.5)
        with pytest.raises(BusyError, match="was taken"):
            declare(root, "e", SCHEMA, config_of(SCHEMA), [])
        with pytest.raises(BusyError, match="was taken"):
            bucket.remove("e")
    assert list(verify(Store(bucket))) == []
    assert Store(bucket)["e"].commits().complete.all()


def test_a_damaged_late_metric_is_repaired_where_a_fence_is_due(bucket):
    declared(bucket)
    record(bucket, 0.0)
    broken = bytearray(bucket.read("e/b/c/0/0/0"))
    broken[-1] ^= 1
    obstore.put(bucket.objects, "e/b/c/0/0/0", bytes(broken))
    with pytest.raises(KeyboardInterrupt), bucket.lock(SLAB, "it"):
        raise KeyboardInterrupt
    assert all(finding.repaired for finding in verify(Store(bucket), repair=True))
    kept = {(found.file, found.harmless) for found in verify(Store(bucket))}
    assert kept == {("e/b/taken-out", True), ("e/b_committed/taken-out", True)}
    assert Store(bucket)["e"].group["committed"][0, 0, 0, -1] > 0
