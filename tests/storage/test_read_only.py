"""What cannot be written to is refused in one line, before anything else; and a full disk is told with the file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import trajstore as ts
from tests.conftest import SMALL_NET
from trajstore.errors import ConfigurationError, WriteError
from trajstore.reading.verify import verify
from trajstore.store import Store


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store that may not be written to; root may write everywhere, so the system is asked in its stead."""
    ts.run(ts.Experiment.of(SMALL_NET), tmp_path / "s.zarr", engine="reference")
    folders = [folder for folder, _, _ in os.walk(tmp_path)]
    for folder in folders:
        Path(folder).chmod(0o555)
    if os.geteuid() == 0:
        allowed = os.access
        monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK and allowed(path, mode))
    yield tmp_path / "s.zarr"
    for folder in folders:
        Path(folder).chmod(0o755)


@pytest.mark.parametrize(
    "command",
    [
        ("verify", "{}", "--repair"),
        ("compute", "gradient_norm", "{}", "net"),
        ("rm", "{}", "net", "--yes"),
        ("merge", "{}", "{}2"),
    ],
)
def test_a_store_that_may_not_be_written_to_is_told_in_one_line(trajstore, read_only, command):
    before = sorted(read_only.rglob("*"))
    code, out, err = trajstore(*(part.format(read_only) for part in command))
    assert (code, out) == (2, "")
    assert err.startswith("trajstore: cannot write to ")
    assert err.count("\n") == 1
    assert sorted(read_only.rglob("*")) == before
    assert trajstore("verify", str(read_only))[:2] == (0, f"{read_only}: sound\n")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_what_cannot_be_repaired_is_no_finding(tmp_path, monkeypatch, code):
    stored = ts.run(ts.Experiment.of(SMALL_NET), tmp_path / "s.zarr", engine="reference")
    file = next((tmp_path / "s.zarr" / "net" / "train_loss" / "c").rglob("0"))
    chunk = next(f for f in (tmp_path / "s.zarr" / "net" / "params" / "c").rglob("*") if f.is_file())
    chunk.write_bytes(b"damaged")
    assert file.exists()

    def refused(self: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code), str(self))

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", refused)
        with pytest.raises(ConfigurationError, match=f"cannot repair .*s.zarr: {os.strerror(code)}: {chunk}"):
            list(verify(Store(tmp_path / "s.zarr"), repair=True))
    assert any(finding.file for finding in verify(stored.store))


def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch):
    synced = os.fsync

    def full(descriptor: int) -> None:
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if ".partial/" in name:  # states come first
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(WriteError, match=r"could not be written \(No space left on device: .*/params/c/"):
            ts.run(ts.Experiment.of(SMALL_NET), tmp_path / "s.zarr", engine="reference")
    assert not list(tmp_path.rglob("*.partial"))
    resumed = ts.run(ts.Experiment.of(SMALL_NET), tmp_path / "s.zarr", engine="reference", resume=True)
    assert resumed.commits().complete.all()
    assert list(verify(resumed.store)) == []


def test_a_figure_that_does_not_fit_is_told_with_its_file(trajstore, tmp_path, monkeypatch):
    ts.run(ts.Experiment.of(SMALL_NET), tmp_path / "s.zarr", engine="reference")

    def full(self: object, file: Path, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    code, _, err = trajstore("plot", "s.zarr", "net", "learning-curves", "-o", "f.png")
    assert (code, err) == (
        1,
        "trajstore: f.png could not be written (No space left on device); nothing of it was kept\n",
    )
