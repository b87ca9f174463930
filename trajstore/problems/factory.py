"""Your own problem, by name: ``function = "my_file:make"`` returns anything with a `build(device)`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any

import torch

from trajstore.errors import ConfigurationError
from trajstore.problems import LiveProblem, Problem

__all__ = ["FAMILY", "Factory", "load_object"]


def load_object(reference: str) -> Any:  # noqa: ANN401
    """Import what ``module:name`` refers to."""
    module_name, _, name = reference.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise ConfigurationError(f"{reference!r}: there is no module {error.name!r} on Python's path") from None
    try:
        return getattr(module, name)
    except AttributeError:
        raise ConfigurationError(f"{reference!r}: module {module_name!r} has no {name!r}") from None


@dataclass(frozen=True)
class Factory:
    """The problem that a function makes from arguments."""

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def made(self) -> Problem:
        """The problem itself."""
        problem: Problem = load_object(self.function)(**self.arguments)
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
