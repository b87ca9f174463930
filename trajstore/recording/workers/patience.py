"""Waiting for workers, which may hang: said when none brings anything for long, ended when there is none."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

from trajstore.errors import SilentWorkersWarning, WorkerError

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Patience"]

T = TypeVar("T")

_SILENT = 60.0
"""Seconds without a task that comes back until that is said; then again after twice as long, and so on."""
_ALONE = 300.0
"""Seconds without a worker until a recording ends: a cluster may take its time to bring them."""
_ANSWER = 10.0
"""Seconds in which a scheduler answers, if it does."""
_ELSE = "what others gave it"
_NAMED = 3
"""So many workers are named."""


class Patience:
    """What a client waits with; `named` says what a task is, by its key."""

    def __init__(self, client: Client, experiment: str, named: Callable[[str], str | None]) -> None:
        self._client, self._named = client, named
        self._what = f"experiment {experiment!r}"
        self._silent_since = self._seen = time.monotonic()
        self._said = _SILENT
        self._awaited: str | None = None
        """The task that is done, and whose result is on its way."""

    def result(self, future: Any) -> Any:  # noqa: ANN401
        """Return what a future comes to. When it is done, its result may still lie with a worker that hangs."""
        came: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

        def get() -> None:
            try:
                came.put((future.result(), None))
            except BaseException as error:
                came.put((None, error))

        Thread(target=get, name="result", daemon=True).start()  # the end of the process does not wait for it
        self._awaited = str(future.key)
        value, error = self.take(came)
        self._awaited = None
        if error is not None:
            raise error
        return value

    def take(self, arriving: SimpleQueue[T]) -> T:
        """Return what arrives next; look after the workers while nothing does."""
        self._silent_since, self._said = time.monotonic(), _SILENT
        self._seen = self._silent_since
        while True:
            try:
                return arriving.get(timeout=min(_SILENT, _ALONE) / 6)
            except Empty:
                self._look()

    def _look(self) -> None:
        workers, now = self._workers(), time.monotonic()
        if workers:
            self._seen = now
        if now - self._seen > _ALONE:
            where = getattr(self._client.scheduler, "address", "its address")
            none = "no worker is connected to it" if workers is not None else "it does not answer"
            raise WorkerError(
                f"{self._what}: nothing has come from the scheduler at {where} for {now - self._seen:,.0f} s, since "
                f"{none}; what was committed is kept; start workers, and --resume continues"
            )
        if now - self._silent_since > self._said:
            self._said *= 2
            told = f"no task has come back from the workers for {now - self._silent_since:,.0f} s"
            warnings.warn(f"{self._what}: {told}; {self._told(workers)}", SilentWorkersWarning, stacklevel=4)

    def _workers(self) -> Mapping[str, Sequence[str]] | None:
        """Return the workers that are connected, and the keys of the tasks that each has; None without an answer."""
        return self._asked("processing", workers=None)

    def _asked(self, what: str, **about: object) -> Mapping[str, Sequence[str]] | None:
        client: Any = self._client
        try:
            answer: Mapping[str, Sequence[str]] = client.sync(
                getattr(client.scheduler, what), callback_timeout=_ANSWER, **about
            )
        except (OSError, TimeoutError, AttributeError):  # no connection, no answer, no scheduler any more
            return None
        return answer

    def _told(self, workers: Mapping[str, Sequence[str]] | None) -> str:
        """Say who has what."""
        if workers is None:
            return "the scheduler does not answer"
        if not workers:
            return "no worker is connected"
        busy = {w: sorted(self._named(key) or _ELSE for key in keys) for w, keys in workers.items()}
        if self._awaited is not None:
            for worker in (self._asked("who_has", keys=[self._awaited]) or {}).get(self._awaited, ()):
                busy[worker] = [f"the result of {self._named(self._awaited)}", *busy.get(worker, ())]
        has = [f"{worker} has {what[0]}{_others(len(what) - 1)}" for worker, what in sorted(busy.items()) if what]
        more = [f"{len(has) - _NAMED} more have others"] if len(has) > _NAMED else []
        told = ", ".join([*has[:_NAMED], *more]) or "none of them has a task"
        return f"{told}; end a worker that hangs, and another takes its tasks"


def _others(count: int) -> str:
    return f" and {count} more" if count else ""
