"""Origin: what a dataset says of where it comes from, in one line, and what is stored there.

As an attribute of a dataset it is text, so files of any format can hold it and representations stay short. In memory it
carries what is stored beside the arrays; where only the text is left, after a file was written and read, that is looked
up in the store again, if it lies in a folder of this machine and is still of the same experiment.
"""

from __future__ import annotations

import re
from collections.abc import KeysView, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trajstore.errors import OpenFilesError, TrajstoreError
from trajstore.storage.places.identity import unchanging

if TYPE_CHECKING:
    import xarray as xr

    from trajstore.reading.handles import ExperimentHandle

__all__ = ["ORIGIN", "UNKNOWN_ORIGIN", "Origin", "attributes_of", "origin_of"]

ORIGIN = "trajstore"
"""The attribute of datasets."""
UNKNOWN_ORIGIN = (
    "it does not come from an experiment, its attributes were dropped on the way (keep them with "
    "xr.set_options(keep_attrs=True)), or it was read from a file and the experiment is not any more where it was"
)
"""Why a dataset may not know its origin, for messages."""
_WRITTEN = re.compile(r"(\S+) of (.+) \(identity ([0-9a-f]{16})\)")


class Origin(str):
    """One line that names experiment and store, with what is stored of the experiment: ``origin["config"]``."""

    attributes: Mapping[str, Any]

    def __new__(cls, text: str, attributes: Mapping[str, Any]) -> Origin:
        """Keep the attributes beside the text."""
        made = super().__new__(cls, text)
        made.attributes = attributes
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return Origin, (str(self), self.attributes)

    def __getitem__(self, key: Any) -> Any:  # noqa: ANN401  of text, and as it was when this was a table
        return self.attributes[key] if isinstance(key, str) else super().__getitem__(key)

    def keys(self) -> KeysView[str]:
        """Return the names of the attributes, so that ``{**origin}`` is a table of them."""
        return self.attributes.keys()

    def get(self, key: str, default: Any = None) -> Any:  # noqa: ANN401
        """Return one of the attributes."""
        return self.attributes.get(key, default)


def origin_of(experiment: ExperimentHandle) -> Origin:
    """Return what datasets of an experiment say of where they come from."""
    attributes = experiment.attributes
    text = f"{experiment.name} of {experiment.store.place.address} (identity {_identity(attributes)})"
    return Origin(text, attributes)


def attributes_of(ds: xr.Dataset) -> Mapping[str, Any]:
    """Return what is stored of a dataset's experiment beside its arrays; empty where that is not known any more.

    There are `config`, the configuration, `schema`, shapes and layout, and `fills`, who recorded what.
    """
    said = ds.attrs.get(ORIGIN)
    if isinstance(said, Origin):
        return said.attributes
    if isinstance(said, Mapping):  # as datasets had it that were pickled by earlier releases
        return said
    return _looked_up(said) if isinstance(said, str) else {}


def _looked_up(text: str) -> Mapping[str, Any]:
    """Find a dataset's experiment again; what a file names is opened only where it is a folder of this machine."""
    written = _WRITTEN.fullmatch(text)
    if written is None or not Path(written[2]).is_absolute():
        return {}
    from trajstore.reading.handles import StoreHandle

    try:
        attributes = StoreHandle.opened(Path(written[2]))[written[1]].attributes
    except OpenFilesError:
        raise  # nothing is known of what is there
    except (TrajstoreError, OSError):
        return {}
    return attributes if _identity(attributes) == written[3] else {}


def _identity(attributes: Mapping[str, Any]) -> str:
    """Return in short what makes an experiment this one."""
    return unchanging(attributes).removeprefix("sha256:")[:16]
