"""Measures: metrics that every problem has. A problem adds losses and scores of its own."""

from __future__ import annotations

__all__ = ["MEASURES", "about"]

MEASURES = {
    "batch_loss": "loss of θ_n on B_n, as the operator saw it",
    "param_norm": "Euclidean norm of the parameters",
    "step_distance": "distance of the parameters to the recorded iterate before",
    "start_distance": "distance of the parameters to θ₀",
}


def about(metric: str, examples: int | None) -> str:
    """Say what a metric is."""
    if metric in MEASURES:
        return MEASURES[metric]
    return "exact expectation" if examples is None else f"mean over {examples} examples"
