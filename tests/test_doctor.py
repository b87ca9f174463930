"""`trajstore doctor`: each check passes here, and each sees the fault that it is there for."""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from trajstore.engine.ticks import Eager
from trajstore.engine.toolchain import missing_for_compiling
from trajstore.errors import ConfigurationError
from trajstore.machine import checks, examine

QUICK = [
    "versions", "checksums", "threads", "gpu", "terminal", "arithmetic", "recording", "locks", "fsync", "renaming",
    "disk", "codecs", "sql",
]  # fmt: skip


def found(name, path):
    """What one check finds, as (state, line)."""
    return [(finding.state, finding.told) for finding in examine(path, [name])]


def states(name, path):
    return {state for state, _ in found(name, path)}


def test_every_check_is_tried_here():
    assert {check.name for check in checks()} == {*QUICK, "compiling", "dask"}


def test_nothing_is_wrong_here_and_nothing_is_left_behind(tmp_path):
    findings = list(examine(tmp_path, QUICK))
    assert [str(finding) for finding in findings if finding.state == "wrong"] == []
    assert [*dict.fromkeys(finding.check for finding in findings)] == QUICK
    assert list(tmp_path.iterdir()) == []


def test_a_compiled_tick_agrees_with_its_definition(tmp_path, monkeypatch):
    if missing := missing_for_compiling():
        pytest.skip(f"this machine lacks {missing}")
    monkeypatch.setattr("trajstore.machine.computing._DTYPES", ("float32",))
    assert states("compiling", tmp_path) == {"good"}


def broken(how):
    """A compiler whose ticks are eager, and then changed."""

    class Broken(Eager):
        def __call__(self, states, batches, indices, ticks, busy):
            for j in ticks:
                before = [
                    {name: t.clone() for name, t in part.items()} for part in (states.params, *states.memory.values())
                ]
                super().__call__(states, batches, indices, range(j, j + 1), busy)
                how(states, before)

    return Broken


def shift_one_lane(states, before):
    next(iter(states.params.values()))[1] += 1e-3


def leave_a_buffer(states, before):
    for part, old in zip(states.memory.values(), before[1:], strict=True):
        for name, tensor in part.items():
            tensor.copy_(old[name])


def lose_precision(states, before):
    for tensor in states.params.values():
        tensor.copy_(tensor.bfloat16())


def make_nan(states, before):
    next(iter(states.params.values())).view(-1)[0] = torch.nan


def whole_machine(monkeypatch):
    monkeypatch.setattr("trajstore.machine.computing.missing_for_compiling", lambda: ())


def test_eager_ticks_in_the_compilers_place_are_no_fault(tmp_path, monkeypatch):
    whole_machine(monkeypatch)
    monkeypatch.setattr("trajstore.engine.compiled_tick.Compiled", Eager)
    assert [state for state, _ in found("compiling", tmp_path)] == ["good"] * 4


@pytest.mark.parametrize("how", [shift_one_lane, leave_a_buffer, lose_precision, make_nan])
def test_a_compiled_tick_that_is_broken_is_wrong(how, tmp_path, monkeypatch):
    whole_machine(monkeypatch)
    monkeypatch.setattr("trajstore.engine.compiled_tick.Compiled", broken(how))
    findings = found("compiling", tmp_path)
    assert [state for state, _ in findings] == ["wrong"] * 4
    assert "computes something else than its definition" in findings[0][1]


def test_a_compiler_that_is_missing_is_named_and_not_wrong(tmp_path, monkeypatch):
    gone = "a C++ compiler (on Debian: apt install g++)"
    monkeypatch.setattr("trajstore.machine.computing.missing_for_compiling", lambda: (gone,))
    ((state, told),) = found("compiling", tmp_path)
    assert state == "missing"
    assert gone in told


def test_a_library_that_multiplies_wrongly_is_wrong(tmp_path, monkeypatch):
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: product(a, b) + (a.ndim == 1))
    assert states("arithmetic", tmp_path) == {"wrong"}


def test_a_gpu_that_multiplies_wrongly_is_wrong(tmp_path, monkeypatch):
    class Properties:
        name, total_memory = "a GPU", 2**30

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda k: Properties)
    monkeypatch.setattr("trajstore.machine.computing.exact_product", lambda device: device.type != "cuda")
    assert states("gpu", tmp_path) == {"wrong"}
    monkeypatch.setattr("trajstore.machine.computing.exact_product", lambda device: True)
    assert found("gpu", tmp_path) == [("good", "a GPU, 1 GiB")]


def test_what_comes_back_otherwise_is_wrong(tmp_path, monkeypatch):
    from trajstore.store import StoredExperiment

    read = StoredExperiment.state_dict

    def off(self, **where):
        return {name: tensor + 1e-6 for name, tensor in read(self, **where).items()}

    monkeypatch.setattr(StoredExperiment, "state_dict", off)
    assert states("recording", tmp_path) == {"wrong"}


def test_checksums_of_another_kind_are_wrong_and_those_of_python_slow(tmp_path, monkeypatch):
    import google_crc32c

    monkeypatch.setattr(google_crc32c, "implementation", "python")
    assert states("checksums", tmp_path) == {"slow"}
    monkeypatch.setattr(google_crc32c, "value", lambda content: 0)
    assert states("checksums", tmp_path) == {"wrong"}


def test_a_lock_that_excludes_nobody_is_wrong(tmp_path, monkeypatch):
    from trajstore.storage.places.folder import Folder

    monkeypatch.setattr(Folder, "lock", lambda *_, **__: nullcontext(lambda folder: None))
    assert found("locks", tmp_path) == [("wrong", "a lock was taken twice by one process")]


def test_a_lock_that_other_processes_do_not_see_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr("trajstore.machine.storing._TAKE", "print('taken')")
    ((state, told),) = found("locks", tmp_path)
    assert state == "wrong"
    assert told.startswith("another process, while the lock was held: taken by the same path; taken through a symbolic")


def test_a_file_system_on_which_folders_lend_no_lock_is_wrong(tmp_path, monkeypatch):
    """The lock beside a store is gone with the folder that it lies in; then only the one within is left."""
    from trajstore.machine import storing

    monkeypatch.setattr(storing, "_TAKE", storing._TAKE.replace(
        "locked_as_for_recording(Path(sys.argv[1]))", "place_of(sys.argv[1]).lock(slab_lock(*_SLAB), 'it')"
    ).replace("import locked_as_for_recording", "import place_of, slab_lock, _SLAB"))  # fmt: skip
    when = "taken when the folder beside the store was deleted"
    assert found("locks", tmp_path) == [("wrong", f"another process, while the lock was held: {when}")]

    def lends_none(descriptor, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", lends_none)
    ((state, told),) = found("locks", tmp_path)
    assert (state, "lends no lock (No locks available)" in told) == ("wrong", True)


def test_a_link_to_a_store_is_tried_out_where_the_store_lies(tmp_path):
    from trajstore.machine import _room

    (tmp_path / "far" / "runs.zarr").mkdir(parents=True)
    (tmp_path / "far" / "runs.zarr" / "zarr.json").touch()
    (tmp_path / "link.zarr").symlink_to(tmp_path / "far" / "runs.zarr")
    with _room(tmp_path / "link.zarr") as room:
        assert Path(room).parent == tmp_path / "far"


def test_a_slow_disk_is_slow_and_one_that_fails_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr("trajstore.machine.storing._SLOW_FSYNC", 0.0)
    assert states("fsync", tmp_path) == {"slow"}

    def fail(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    ((state, told),) = found("fsync", tmp_path)
    assert state == "wrong"
    assert "Input/output error" in told


def test_a_rename_that_shows_something_in_between_is_wrong(tmp_path, monkeypatch):
    def copied(self, target):
        target.write_bytes(b"")
        content, half = self.read_bytes(), len(self.read_bytes()) // 2
        for _ in range(20):
            target.write_bytes(content[:half])
        target.write_bytes(content)

    monkeypatch.setattr(Path, "replace", copied)
    assert states("renaming", tmp_path) == {"wrong"}


@pytest.mark.parametrize(
    ("kind", "state", "why"),
    [("nfs4", "doubtful", "on a network"), ("tmpfs", "doubtful", "in memory"), ("ext4", "good", "ext4")],
)
def test_a_file_system_is_judged_by_its_kind(kind, state, why, tmp_path, monkeypatch):
    monkeypatch.setattr("trajstore.machine.storing._kind_of", lambda folder: kind)
    monkeypatch.setattr("trajstore.machine.storing._LITTLE_ROOM", 0)
    ((judged, told),) = found("disk", tmp_path)
    assert judged == state
    assert why in told


def test_little_room_is_doubtful(tmp_path, monkeypatch):
    monkeypatch.setattr("trajstore.machine.storing._kind_of", lambda folder: "ext4")
    monkeypatch.setattr("trajstore.machine.storing._LITTLE_ROOM", 2**80)
    assert states("disk", tmp_path) == {"doubtful"}


def test_a_codec_that_corrupts_is_wrong_whichever_order_it_corrupts(tmp_path, monkeypatch):
    from trajstore.machine import storing

    write = storing.write_block

    def contiguous_only(array, start, block):  # as numcodecs' PCodec does with what is not contiguous
        write(array, start, block if block.flags.c_contiguous else block.T.copy().reshape(block.shape))

    monkeypatch.setattr(storing, "write_block", contiguous_only)
    findings = found("codecs", tmp_path)
    assert {state for state, _ in findings} == {"wrong"}
    assert {told.split(" order")[0].rsplit(" ", 1)[1] for _, told in findings} == {"Fortran", "strided", "reversed"}


def test_a_reader_that_loses_the_sign_of_a_zero_is_wrong(tmp_path, monkeypatch):
    from trajstore.storage.states import States

    read = States.__getitem__
    monkeypatch.setattr(States, "__getitem__", lambda self, where: read(self, where) + np.float32(0))
    assert states("codecs", tmp_path) == {"wrong"}


def test_sql_that_reads_files_is_wrong(tmp_path, monkeypatch):
    import duckdb

    import trajstore.reading.sql

    monkeypatch.setattr(
        trajstore.reading.sql, "query_store", lambda store, query: duckdb.sql(query.replace("metrics", "range(4)"))
    )
    ((state, told),) = found("sql", tmp_path)
    assert state == "wrong"
    assert "a file outside the store was read" in told


def test_what_is_too_old_is_named_with_the_command_that_mends_it(tmp_path, monkeypatch):
    from trajstore.machine import software

    def version(package):
        return "2.8.0+cpu" if package == "torch" else "9999.1"

    monkeypatch.setattr(software, "version", version)
    doubtful, rest = examine(tmp_path, ["versions"])
    assert (doubtful.state, rest.state) == ("doubtful", "doubtful")
    assert doubtful.told.startswith("torch 2.8.0+cpu is older than 2.9")
    assert doubtful.remedy == "pip install --upgrade 'torch>=2.9'"


def test_what_is_not_installed_is_missing(tmp_path, monkeypatch):
    from importlib.metadata import PackageNotFoundError

    from trajstore.machine import software

    def version(package):
        if package == "duckdb":
            raise PackageNotFoundError(package)
        return "9999.1"

    monkeypatch.setattr(software, "version", version)
    missing, _ = examine(tmp_path, ["versions"])
    assert (missing.state, missing.told) == ("missing", "duckdb is not installed")


def test_threads_that_are_left_unused_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert found("threads", tmp_path) == [("slow", "torch computes with 1 of 2 cores, as OMP_NUM_THREADS says")]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert states("threads", tmp_path) == {"good"}
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 9.0, 9.0))
    assert states("threads", tmp_path) == {"slow"}


def test_a_terminal_without_greek_is_told(tmp_path, monkeypatch):
    class Latin:
        encoding = "latin-1"

        def isatty(self):
            return False

    monkeypatch.setattr(sys, "stdout", Latin())
    assert states("terminal", tmp_path) == {"doubtful"}


def test_workers_that_do_not_start_are_slow_and_sums_that_are_wrong_wrong(tmp_path, monkeypatch):
    def refuse(workers):
        raise OSError("no process")

    monkeypatch.setattr("trajstore.recording.workers.cluster.connected", refuse)
    assert states("dask", tmp_path) == {"slow"}
    monkeypatch.setattr("dask.array.core.Array.sum", lambda array: array[0])
    assert states("dask", tmp_path) == {"wrong"}


def test_a_worker_process_answers(tmp_path):
    assert states("dask", tmp_path) == {"good"}


def test_folders_are_examined_where_stores_lie(tmp_path, record):
    record()
    (tmp_path / "runs.zarr" / "zarr.json").stat()
    before = sorted((tmp_path / "runs.zarr").rglob("*"))
    assert states("fsync", tmp_path / "runs.zarr") <= {"good", "slow"}
    assert sorted((tmp_path / "runs.zarr").rglob("*")) == before
    with pytest.raises(ConfigurationError, match="there is no folder"):
        next(examine(tmp_path / "nowhere"))
    with pytest.raises(ConfigurationError, match="buckets are tried out by recording"):
        next(examine("s3://bucket/runs.zarr"))
    with pytest.raises(ConfigurationError, match="no check 'lock'; did you mean 'locks'"):
        next(examine(tmp_path, ["lock"]))


def test_the_program_tells_and_ends_with_1_where_something_is_wrong(trajstore, tmp_path, monkeypatch):
    code, out, err = trajstore("doctor", "--only", "checksums", "--only", "locks")
    assert (code, err) == (0, "")
    assert [line.split()[:2] for line in out.splitlines()[:2]] == [["checksums", "good"], ["locks", "good"]]
    code, out, _ = trajstore("doctor", ".", "--only", "fsync", "--json")
    told = json.loads(out)
    assert (code, told["right"], told["findings"][0]["check"]) == (0, True, "fsync")
    assert told["findings"][0]["figures"]["seconds"] > 0
    monkeypatch.setattr("trajstore.machine.storing._TAKE", "print('taken')")
    code, out, _ = trajstore("doctor", "--only", "locks")
    assert code == 1
    assert "locks        WRONG" in out
    assert "1 thing wrong" in out
    assert trajstore("doctor", "nowhere")[0] == 2
