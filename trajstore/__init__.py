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

from typing import TYPE_CHECKING

from trajstore._lazily import lazily

if TYPE_CHECKING:
    from trajstore.costing import cost
    from trajstore.errors import TrajstoreError
    from trajstore.experiment import Experiment, Record
    from trajstore.importing import import_checkpoints
    from trajstore.orders import Order
    from trajstore.policies import every, log_then_every, window
    from trajstore.problems._module import ModuleProblem
    from trajstore.recorder import Recorder, record
    from trajstore.recording import run
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
    "Experiment": "experiment",
    "ModuleProblem": "problems._module",
    "Order": "orders",
    "Record": "experiment",
    "Recorder": "recorder",
    "Store": "store",
    "StoredExperiment": "store",
    "TrajstoreError": "errors",
    "cost": "costing",
    "every": "policies",
    "import_checkpoints": "importing",
    "log_then_every": "policies",
    "open": "store",
    "record": "recorder",
    "run": "recording",
    "window": "policies",
}


__getattr__ = lazily(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
