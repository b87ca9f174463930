"""trajstore: a trajectory store for training dynamics.

::

    import trajstore as ts

    store = ts.open("runs.zarr")
    ds = store["fig4"].dataset()
    store.sql('SELECT "order", seed, min(test_loss) FROM metrics GROUP BY ALL')
    ts.run(ts.Experiment.preset("quadratic"), "runs.zarr")

Names are imported when they are first used, so that `import trajstore` loads neither torch nor zarr.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from trajstore._common.lazily import lazily
from trajstore._common.offers import offer

if TYPE_CHECKING:
    from trajstore.engine.orders import Order
    from trajstore.errors import TrajstoreError
    from trajstore.exchange.importing import import_checkpoints
    from trajstore.experiment.experiment import Experiment, Record
    from trajstore.experiment.steps import every, log_then_every, window
    from trajstore.problems._module import ModuleProblem
    from trajstore.recording.cost import cost
    from trajstore.recording.loop.recorder import Recorder, record
    from trajstore.recording.running import run
    from trajstore.store import Store, StoredExperiment, open

__all__ = [
    "Experiment",
    "ModuleProblem",
    "Order",
    "Record",
    "Recorder",
    "Store",
    "StoredExperiment",
    "TrajstoreError",
    "cost",
    "every",
    "import_checkpoints",
    "log_then_every",
    "open",
    "record",
    "run",
    "window",
]

__version__ = "0.1.0"

_HOME = {
    "Experiment": "experiment.experiment",
    "ModuleProblem": "problems._module",
    "Order": "engine.orders",
    "Record": "experiment.experiment",
    "Recorder": "recording.loop.recorder",
    "Store": "store",
    "StoredExperiment": "store",
    "TrajstoreError": "errors",
    "cost": "recording.cost",
    "every": "experiment.steps",
    "import_checkpoints": "exchange.importing",
    "log_then_every": "experiment.steps",
    "open": "store",
    "record": "recording.loop.recorder",
    "run": "recording.running",
    "window": "experiment.steps",
}


__getattr__ = lazily(__name__, _HOME)


def _merge() -> Callable[..., object]:
    from trajstore.exchange.merge import merge

    return merge


offer("merge", _merge)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
