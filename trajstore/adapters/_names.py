"""Names of a trainer's metrics, as the store can hold them."""

from __future__ import annotations

import re
from dataclasses import replace

from trajstore.errors import ConfigurationError
from trajstore.storage.format.metrics import MEASURES
from trajstore.storage.format.schema import Schema, check_metric_names

__all__ = ["Names"]


class Names:
    """Gives each metric a name of letters, digits and '_' that no other metric or column has.

    A name that is taken gets a '_' at its end: training must not stop because somebody logged `step`.
    """

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._given = {"loss": "loss", "lr": "lr"}

    def __getitem__(self, name: str) -> str:
        if name not in self._given:
            self._given[name] = self._new(name)
        return self._given[name]

    def _new(self, name: str) -> str:
        new = re.sub(r"[^A-Za-z0-9_]", "_", name)[:80]
        new = new if re.match("[A-Za-z_]", new) else f"_{new}"
        while not self._fits(new):
            new += "_"
        return new

    def _fits(self, new: str) -> bool:
        taken = [*MEASURES, *self._given.values()]
        try:
            check_metric_names(replace(self._schema, metrics=dict.fromkeys([*taken, new])))
        except ConfigurationError:
            return False
        return new not in taken
