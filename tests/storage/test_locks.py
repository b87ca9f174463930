"""Locks: one holder, named to the others, freed when its process dies."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

import trajstore as ts
from trajstore.errors import BusyError, WriteError
from trajstore.storage.places.locks import lock


def test_a_second_holder_is_refused_and_told_who_has_it(tmp_path):
    with lock(tmp_path / "a.lock", "slab x"), pytest.raises(BusyError) as caught, lock(tmp_path / "a.lock", "slab x"):
        pass
    assert f"slab x is being written by process {os.getpid()} on" in str(caught.value)
    with lock(tmp_path / "a.lock", "slab x"):
        pass


def test_a_killed_holder_frees_it(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from trajstore.storage.places.locks import lock\n"
        "with lock(Path(sys.argv[1]), 'x'): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", program, tmp_path / "a.lock"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(BusyError, match=f"process {holder.pid}"), lock(tmp_path / "a.lock", "x"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with lock(tmp_path / "a.lock", "x"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_told_in_one_line(tmp_path, monkeypatch, number):
    def fails(descriptor: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fails)
    with (
        pytest.raises(WriteError, match="lends no lock"),
        ts.Store(tmp_path / "s.zarr").declaring(),
    ):
        pass
