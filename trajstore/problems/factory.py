"""Your own problem, by name: ``function = "my_file:make"`` returns anything with a `build(device)`."""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch

from trajstore.errors import ConfigurationError, TrajstoreError
from trajstore.problems import LiveProblem, Problem

__all__ = ["FAMILY", "Factory", "call"]


def load_object(reference: str) -> Any:  # noqa: ANN401
    """Import what ``module:name`` refers to."""
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", reference):
        raise ConfigurationError(f"{reference!r} is not of the form module:function")
    module_name, _, name = reference.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _failed(reference, error) from error  # the module is there; something that it imports is not
        raise ConfigurationError(f"{reference!r}: there is no module {error.name!r} on Python's path") from None
    except Exception as error:
        raise _failed(reference, error) from error
    try:
        return getattr(module, name)
    except AttributeError:
        if module_name == "__main__":
            raise ConfigurationError(
                f"{reference!r}: it was defined in a script or notebook, and what runs here has no {name!r}; define it "
                "here, or put it into a module of its own and record with that"
            ) from None
        raise ConfigurationError(f"{reference!r}: module {module_name!r} has no {name!r}") from None


@lru_cache(maxsize=8)
def _call(reference: str, arguments: str) -> Any:  # noqa: ANN401
    function = load_object(reference)
    if not callable(function):
        raise ConfigurationError(f"{reference!r} is a {type(function).__name__}, not a function")
    try:
        return function(**json.loads(arguments))
    except TrajstoreError:
        raise
    except Exception as error:
        raise _failed(reference, error) from error


def call(reference: str, arguments: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Call a user's function, once a process for equal arguments: it may load data."""
    return _call(reference, json.dumps(dict(arguments), sort_keys=True))


def _failed(reference: str, error: Exception) -> ConfigurationError:
    at = traceback.extract_tb(error.__traceback__)[-1]
    return ConfigurationError(f"{reference!r} raised {type(error).__name__}: {error} ({at.filename}:{at.lineno})")


@dataclass(frozen=True)
class Factory:
    """The problem that a function makes from arguments."""

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def made(self) -> Problem:
        """The problem itself."""
        problem: Problem = call(self.function, self.arguments)
        if not callable(getattr(problem, "build", None)):
            raise ConfigurationError(
                f"problem {self.function!r} gave a {type(problem).__name__}; "
                "it must return something with build(device), for example a trajstore.ModuleProblem"
            )
        return problem

    def build(self, device: torch.device) -> LiveProblem:
        """Return the live problem on a device."""
        return self.made.build(device)


FAMILY: type[Problem] = Factory
