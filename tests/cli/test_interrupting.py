"""Ctrl-C ends what goes on, wherever it arrives."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from trajstore.cli.console import progress_bar
from trajstore.cli.interrupting import heed, stop_if_asked


class Doomed:
    """Something that is interrupted while it is destroyed, where nothing that is raised gets out."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # Python looks for signals between instructions
            pass


@pytest.fixture
def heeded() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    heed()
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_that_python_loses_ends_the_work_where_it_next_tells_of_progress(heeded: None) -> None:
    with progress_bar(3, "work", "steps") as progress:
        progress(1, "")
        doomed = Doomed()
        del doomed  # and nothing is raised
        with pytest.raises(KeyboardInterrupt):
            progress(1, "")
        progress(1, "")  # what cleans up after it may tell of progress too


def test_one_that_is_heard_is_raised_at_once(heeded: None) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        stop_if_asked()
    stop_if_asked()


def test_what_a_shell_put_into_the_background_goes_on_ignoring_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        heed()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)
        stop_if_asked()
    finally:
        signal.signal(signal.SIGINT, before)
