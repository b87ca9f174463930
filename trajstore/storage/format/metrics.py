"""Measures: metrics that every experiment has. A problem adds losses and scores, and a loop what it likes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

__all__ = ["MEASURES", "OF_MORE_THAN_THE_ITERATE", "MadeBy", "about", "maker_of", "start_of", "training_mark"]

MadeBy = Literal["problem", "loop", "import"]
"""What made the iterates: a problem that is computed here, somebody's training loop, or nobody knows."""

MEASURES = {
    "batch_loss": "loss of θ_n on B_n, as the operator saw it",
    "param_norm": "Euclidean norm of the parameters",
    "step_distance": "distance of the parameters to the recorded iterate before",
    "start_distance": "distance of the parameters to θ₀",
}


OF_MORE_THAN_THE_ITERATE = {
    "batch_loss": "it is also of B_n, which a forward chain applies last and a backward chain first",
    "step_distance": "it is also of the recorded iterate before, from which a backward chain comes in another way",
}
"""Measures that are no function of θ_n alone (and of θ₀, which all seeds may share), and what else they are of."""


def training_mark(metric: str) -> str:
    """Return the name of the late metric that marks where another was computed in training mode."""
    return f"{metric}_training"


def maker_of(config: Mapping[str, Any]) -> MadeBy:
    """Tell from a configuration what made the iterates."""
    family = config.get("problem", {}).get("family")
    return family if family in ("loop", "import") else "problem"


def start_of(made_by: MadeBy) -> str:
    """Say from where differences of parameters are measured."""
    return "the first imported step of the slab" if made_by == "import" else "θ₀"


def about(metric: str, examples: int | None, made_by: MadeBy = "problem") -> str:
    """Say what a metric is."""
    if metric in MEASURES:
        return MEASURES[metric].replace("θ₀", start_of(made_by))
    if made_by != "problem":
        return "as the loop gave it"
    return "exact expectation" if examples is None else f"mean over {examples} examples"
