"""`trajstore demo`: record a small experiment, draw it, and say what the variance is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from trajstore.cli.console import print_table, say
from trajstore.cli.plotting import check_output, save
from trajstore.cli.record import record_with_progress

from trajstore.errors import ConflictError

__all__ = ["demo"]

WINDOW = 100

VERDICT = f"""
WITH variances AS (
    SELECT "order", seed, l.variance AS raw, t.variance AS detrended
    FROM level_variance('demo', 'test_loss', steps := {WINDOW}) l
    JOIN tail_variance('demo', 'test_loss', steps := {WINDOW}) t USING ("order", seed)
)
SELECT f.seed, f.raw AS "forward", b.raw AS "backward", f.raw / b.raw AS "ratio",
       f.detrended AS "forward, detrended", b.detrended AS "backward, detrended",
       f.detrended / b.detrended AS "ratio, detrended"
FROM variances f JOIN variances b USING (seed)
WHERE f."order" = 'forward' AND b."order" = 'backward' ORDER BY seed
"""


def demo(
    store: Annotated[str, typer.Option(help="Where to record.")] = "demo.zarr",
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to draw.")] = Path("demo.png"),
) -> None:
    """Record forward and backward SGD on a small network, draw both, compare their variance."""
    check_output(output, force=True)
    from trajstore.analysis.figures.learning_curves import draw

    from trajstore.experiment.experiment import Experiment

    experiment = Experiment.preset(
        "fig4", {"name": "demo", "seeds": [0, 1], "steps": 300, "orders": ["forward", "backward"]}
    )
    say("A 3×300 ReLU network learns y = x² with batch size 1: forward and backward SGD, 300 steps, 2 seeds.")
    try:
        stored = record_with_progress(experiment, store, resume=True)
    except ConflictError:
        raise ConflictError(f"{store} holds another experiment named 'demo'; choose another --store") from None
    save(draw(stored.dataset()), output, force=True)
    verdict = stored.store.sql(VERDICT)
    say(f"Variance of the test loss over the last {WINDOW} steps, forward over backward:\n")
    print_table(list(verdict.columns), verdict.fetchall())
    say(f"\nRecorded in {store}, drawn in {output}. Ask it yourself:")
    say(f"  trajstore sql {store} 'SELECT \"order\", seed, min(test_loss) FROM metrics GROUP BY ALL ORDER BY ALL'")
