"""The write pipeline: states are encoded by a few threads, and committed by one, in the order they came in.

What goes in is bounded. The first thing that goes wrong is raised at the next call and at the end; nothing is
committed after it. A forked child has none of the threads, and is refused.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from trajstore.errors import ConflictError
from trajstore.storage.writing.segment import Spare

__all__ = ["Pipeline"]


class Pipeline:
    """Takes jobs: blocks to write in any order, and what makes them count."""

    def __init__(self, threads: int = 2, depth: int = 4) -> None:
        self.spare = Spare()
        self._encoders = ThreadPoolExecutor(threads, thread_name_prefix="trajstore-encode")
        # One thread commits: a job waits for its own blocks only, which were handed out before it.
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="trajstore-commit")
        self._room = threading.BoundedSemaphore(depth)
        self._error: BaseException | None = None
        self._process = os.getpid()

    def check(self) -> None:
        """Raise what went wrong so far."""
        if os.getpid() != self._process:
            raise ConflictError(
                f"process {os.getpid()} is a fork of process {self._process}, which records; only that one can write"
            )
        if self._error is not None:
            raise self._error

    def submit(
        self, blocks: Iterable[Callable[[], None]], finish: Callable[[], None], after: Sequence[Future[None]] = ()
    ) -> list[Future[None]]:
        """Have blocks written, when others are, and then `finish` called; wait while too much is under way."""
        self.check()
        self._room.acquire()
        if self._error is not None:
            self._room.release()
            raise self._error
        encoding = [self._encoders.submit(self._encode, block, after) for block in blocks]
        self._committer.submit(self._finish, encoding, finish)
        return encoding

    def drain(self) -> None:
        """Wait until everything so far is committed."""
        self.check()
        self._committer.submit(lambda: None).result()
        self.check()

    def close(self) -> None:
        """Wait for everything, end the threads, and raise the first error."""
        if os.getpid() == self._process:
            self._encoders.shutdown()
            self._committer.shutdown()
        self.check()

    def _encode(self, block: Callable[[], None], after: Sequence[Future[None]]) -> None:
        wait(after)  # they were handed out earlier, so they are running or done
        if self._error is None:
            block()

    def _finish(self, encoding: Sequence[Future[None]], finish: Callable[[], None]) -> None:
        try:
            wait(encoding)
            for done in encoding:
                done.result()
            if self._error is None:
                finish()
        except BaseException as error:
            self._error = self._error or error
        finally:
            self._room.release()
