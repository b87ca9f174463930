"""A sample of the torture: ten kills, and recordings that died where random moments seldom hit."""

from __future__ import annotations

import os
from pathlib import Path

from tests.tools.torture import NET, REFERENCE, Variant, examine, in_child, kill, record, recorded, start
from trajstore.storage.writing.slab_writer import Ledger

SEED = 0
SHORT = {**NET, "steps": 6, "seeds": [0]}
SMALL = {
    "whole segments": Variant(SHORT, REFERENCE),
    "partial segments": Variant(SHORT, REFERENCE, segment=8, commit_steps=2),
}


def test_recordings_that_are_killed_lose_nothing_and_go_on_to_the_same_store(tmp_path):
    report = kill(SMALL, 10, SEED, tmp_path)
    assert report.counts["killed"] >= 10
    assert not report.problems, "\n".join([f"{report}, seed {SEED}", *report.problems])


def test_the_server_that_processes_are_forked_from_has_one_thread(tmp_path):
    assert in_child(_threads_of_my_parent) == 1


def _threads_of_my_parent() -> int:
    return len(list(Path(f"/proc/{os.getppid()}/task").iterdir()))


def test_orders_that_share_iterates_go_on_from_different_steps(tmp_path):
    """Killed when `backward` had one step more than `backward/4`, which shares its iterates up to step 4."""
    variant = Variant({**NET, "orders": ["backward", "backward/4"], "seeds": [0]}, REFERENCE, commit_steps=2)
    truth, _ = in_child(recorded, variant, tmp_path / "whole" / "s.zarr")
    place = tmp_path / "s.zarr"
    process, _ = start(_dying_before, variant, place, ("backward/4", 4))
    process.join()
    assert process.exitcode == 1
    in_child(record, variant, place)
    assert in_child(examine, place, truth, None, True) == []


def _dying_before(variant: Variant, place: Path, commit: tuple[str, int]) -> None:
    original = Ledger.adopt

    def adopt(self, written, *more):
        if (self.schema.orders[self.corner[0]], written.record[0]) == commit:
            os._exit(1)
        original(self, written, *more)

    Ledger.adopt = adopt
    record(variant, place)
