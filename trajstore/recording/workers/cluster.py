"""Dask's workers: started here, or those of a scheduler that is running already."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from trajstore.errors import ConfigurationError, WorkerError

if TYPE_CHECKING:
    from distributed import Client
    from distributed.deploy.cluster import Cluster

__all__ = ["Scheduler", "connected", "connected_to", "one_scheduler"]

Scheduler: TypeAlias = "str | Client | Cluster"
"""Whose workers compute: the address of a scheduler, a client of one, or a cluster such as a `LocalCluster`."""

_PATIENCE = 20
"""Seconds to wait for a scheduler to answer."""
_STARTING = 120
"""Seconds to wait for workers that are started here."""


@contextmanager
def connected(workers: int) -> Iterator[Client]:
    """Start worker processes here. They end with the context, or when this process is no more."""
    from distributed import Client, Scheduler, SpecCluster

    options: dict[str, Any] = {"nthreads": 1, "memory_limit": 0, "silence_logs": logging.CRITICAL}
    # Importing torch takes seconds: all do it at once, before the first needs it.
    options |= {
        "preload_nanny": ["trajstore.recording.workers._ends_with_parent"],
        "preload": ["trajstore.recording.workers.worker"],
    }
    worker = {"cls": _worker(), "options": options}
    own = {"cls": Scheduler, "options": {"host": "127.0.0.1", "port": 0, "dashboard_address": "127.0.0.1:0"}}
    with (
        _quiet(),
        _set(),
        SpecCluster(dict.fromkeys(range(workers), worker), scheduler=own, silence_logs=False) as cluster,  # type: ignore[no-untyped-call]
        Client(cluster, set_as_default=False) as client,  # type: ignore[no-untyped-call]
    ):
        try:
            client.wait_for_workers(workers, timeout=_STARTING)
        except TimeoutError:
            raise WorkerError(
                f"{workers} workers did not start within {_STARTING} s; use fewer, or none (--workers 0)"
            ) from None
        yield client


def _worker() -> type[Any]:
    """Return what starts a worker: a process of its own, which does not run the caller's main module again."""
    from distributed.deploy.spec import ProcessInterface

    class Worker(ProcessInterface):
        """A worker, and the nanny that starts it, in a session of their own.

        A terminal sends Ctrl-C to all processes of a session's foreground, and one that is just starting would answer
        with a traceback. It is for the client to hear.
        """

        def __init__(self, scheduler: str, name: str | int | None = None, **options: Any) -> None:  # noqa: ANN401
            super().__init__(scheduler=scheduler, name=name)  # type: ignore[no-untyped-call]
            spec = json.dumps({"cls": "distributed.Nanny", "opts": options})
            self.command = [sys.executable, "-m", "dask", "spec", scheduler, "--spec", spec]
            self.process: asyncio.subprocess.Process | None = None

        async def start(self) -> None:
            """Start both."""
            self.process = await asyncio.create_subprocess_exec(*self.command, start_new_session=True)
            await super().start()  # type: ignore[no-untyped-call]

        async def close(self) -> None:
            """End the processes of its session: the nanny, and the worker that it started."""
            if self.process is not None and self.process.returncode is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                await self.process.wait()
            self.process = None
            await super().close()  # type: ignore[no-untyped-call]

    return Worker


@contextmanager
def connected_to(scheduler: Scheduler) -> Iterator[Client]:
    """Connect to a scheduler that is there already; a client is used as it is, and left open."""
    from distributed import Client

    with _quiet():
        if isinstance(scheduler, Client):
            if scheduler.asynchronous:
                raise ConfigurationError("the client is asynchronous, and nobody here awaits; make a plain Client")
            if scheduler.status != "running":
                raise ConfigurationError(f"the client is {scheduler.status}; connect it, or make another")
            yield scheduler
            return
        address = scheduler if isinstance(scheduler, str) else getattr(scheduler, "scheduler_address", None)
        if not isinstance(address, str) or not address:
            raise ConfigurationError(
                f"scheduler is {scheduler!r}; give the address of a Dask scheduler, such as 'tcp://10.0.0.1:8786', "
                "a distributed.Client, or a cluster that is running, such as a distributed.LocalCluster"
            )
        try:
            client = Client(address, timeout=_PATIENCE, set_as_default=False)  # type: ignore[no-untyped-call]
        except (OSError, ValueError) as error:
            told = " ".join(str(error).split())
            raise ConfigurationError(f"no Dask scheduler answers at {address!r}: {told}") from None
        with client:
            yield client


def one_scheduler(scheduler: Scheduler | None, cluster: Scheduler | None) -> Scheduler:
    """Return the scheduler that was given, also where it was called `cluster`, as it was before."""
    if cluster is None:
        assert scheduler is not None
        return scheduler
    if scheduler is not None:
        raise ConfigurationError("scheduler and cluster are two names of one thing; give scheduler alone")
    warnings.warn("cluster= is now scheduler=, with the same values", DeprecationWarning, stacklevel=3)
    return cluster


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Dask from telling of every connection; what concerns a recording comes as an error."""
    logger = logging.getLogger("distributed")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


_SETTINGS = {
    # Dask's profiler would stop the computing thread a hundred times a second.
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
    # A worker's own process says what it loads before it has read that it is to be quiet.
    "DASK_LOGGING__DISTRIBUTED": "critical",
}


@contextmanager
def _set() -> Iterator[None]:
    """Start workers with settings of Dask that can only be given in their environment."""
    before = {name: os.environ.get(name) for name in _SETTINGS}
    os.environ.update(_SETTINGS)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
