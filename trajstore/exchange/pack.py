"""Pack: what an experiment takes of the disk beyond what it holds, given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from trajstore._common.system import system_told
from trajstore.errors import ConfigurationError, DamageError, TrajstoreError, WriteError
from trajstore.exchange.merge import lock_slabs
from trajstore.storage.packing import lay_out, pack_files
from trajstore.storage.places.durable import DurableStore
from trajstore.store import Store, StoredExperiment

__all__ = ["Room", "pack", "unpack"]


@dataclass(frozen=True)
class Room:
    """What an experiment takes of the disk."""

    content: int
    """Bytes that its files hold."""
    before: int
    """Bytes of the disk that they took."""
    after: int
    """Bytes of the disk that they take now."""


def pack(store: Store, name: str) -> Room:
    """Put the small files of an experiment together into a few.

    It reads as before, with Zarr and xarray too. Whoever writes to it again lays it out as files first.

    Args:
        store: Where it is: a folder. In an object store nothing is packed, since objects take no whole blocks.
        name: The experiment. Nobody may be writing to it.
    """
    experiment = store[name]
    before = experiment.bytes_taken()
    with _nobody_writing(experiment, "packed") as keeper:
        pack_files(keeper, experiment.schema, name)
    return Room(experiment.bytes_on_disk(), before, experiment.bytes_taken())


def unpack(store: Store, name: str) -> Room:
    """Lay an experiment out as files again; what is not packed stays as it is. `store` and `name` as of `pack`."""
    experiment = store[name]
    before = experiment.bytes_taken()
    with _nobody_writing(experiment, "unpacked") as keeper:
        lay_out(keeper, name)
    return Room(experiment.bytes_on_disk(), before, experiment.bytes_taken())


@contextmanager
def _nobody_writing(experiment: StoredExperiment, done: str) -> Iterator[DurableStore]:
    store = experiment.store
    if store.place.beside is None:
        raise ConfigurationError(f"{store} is an object store, where small objects take no more room")
    store.place.make()
    with ExitStack() as held:
        held.enter_context(store.declaring())
        lock_slabs(held, experiment)
        keeper = store.place.keeper(read_only=False)
        assert isinstance(keeper, DurableStore)
        try:
            yield keeper
        except TrajstoreError:
            raise
        except OSError as error:
            told = f"experiment {experiment.name!r} in {store} is not {done} to the end ({system_told(error)})"
            raise WriteError(f"{told}; it reads as before, and the same again goes on") from None
        except ValueError as error:
            raise DamageError(f"experiment {experiment.name!r} in {store} cannot be {done}: {error}") from None
