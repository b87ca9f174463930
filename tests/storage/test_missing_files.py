"""What is committed is read, or refused: no file that is missing, or not whole, ever becomes a number."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

import trajstore as ts
from tests.conftest import SMALL_NET
from tests.tools.torture import Report, in_child, side_by_side
from trajstore import analysis
from trajstore.errors import DamageError, FormatError, ResumedWarning, TrajstoreError
from trajstore.exchange.export import export_metrics
from trajstore.exchange.export_arrays import export_arrays
from trajstore.exchange.merge import merge
from trajstore.reading.verify import verify

TINY = {
    **SMALL_NET, "problem": {"family": "regression", "width": 3, "depth": 1, "points": 5}, "steps": 9, "seeds": [0],
    "record": {"sketch": 4},
}  # fmt: skip
HOW = {"engine": "reference", "durability": "none"}
Answer = dict[str, bytes]


pytestmark = pytest.mark.usefixtures("several_segments")


@pytest.fixture(scope="module")
def whole(several_segments: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a late metric."""
    store = tmp_path_factory.mktemp("whole") / "s.zarr"
    ts.run(ts.Experiment.of(TINY), store, **HOW)
    analysis.compute(ts.open(store)["net"], "gradient_norm")
    shutil.rmtree(f"{store}.traj")
    return store


def dataset(store: Path) -> Answer:
    ds = ts.open(store)["net"].dataset().load()
    return {str(name): np.asarray(values).tobytes() for name, values in ds.variables.items() if name != "order"}


def states(store: Path) -> Answer:
    """Each state that is stored, one by one."""
    experiment = ts.open(store)["net"]
    found = {}
    for order in experiment.schema.orders:
        for step in experiment.schema.snapshots:
            arrays = experiment.arrays(order=order, seed=0, step=step)
            found[f"{order} {step}"] = b"".join(array.tobytes() for array in arrays.values())
    return found


def status(store: Path) -> Answer:
    return {"slabs": repr(ts.open(store)["net"].slabs()).encode()}


def asked(store: Path) -> Answer:
    opened = ts.open(store)
    tables = ("runs", "metrics", "segments")
    return {table: repr(opened.sql(f"SELECT * FROM {table}").fetchall()).encode() for table in tables}


def parquet(store: Path) -> Answer:
    import duckdb

    with tempfile.TemporaryDirectory() as folder:
        export_metrics(ts.open(store)["net"], Path(folder) / "m.parquet")
        rows = duckdb.sql(f"SELECT * FROM '{folder}/m.parquet' ORDER BY ALL").fetchall()
    return {"rows": repr(rows).encode()}


def plain(store: Path) -> Answer:
    with tempfile.TemporaryDirectory() as folder:
        export_arrays(ts.open(store)["net"], Path(folder) / "arrays")
        return {file.name: file.read_bytes() for file in sorted(Path(folder, "arrays").glob("*.npy"))}


def merged(store: Path) -> Answer:
    """What another store holds after taking it over."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "other.zarr"
        merge(ts.open(store), ts.Store(target))
        assert not [found for found in verify(ts.Store(target)) if not found.harmless]
        return dataset(target)


def extended(store: Path) -> Answer:
    """Going on writes nothing over what is committed."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "s.zarr"
        shutil.copytree(store, copy)
        ts.run(ts.Experiment.of({**TINY, "steps": 11}), copy, extend=True, **HOW)
        return dataset(copy)


def listed(store: Path) -> Answer:
    """What `ls` counts; bytes on the disk change with it."""
    ((_, found),) = ts.open(store).experiments()
    if isinstance(found, FormatError):
        raise found
    return {"progress": repr(found.progress()).encode()}


def mended(store: Path) -> Answer:
    """After a repair a recording writes again what was lost, and what is late can be computed again."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "s.zarr"
        shutil.copytree(store, copy, symlinks=True)
        list(verify(ts.Store(copy), repair=True))
        ts.run(ts.Experiment.of(TINY), copy, resume=True, **HOW)
        analysis.compute(ts.open(copy)["net"], "gradient_norm")
        for found in verify(ts.Store(copy)):
            if not found.harmless:  # of what cannot be mended it is told
                raise DamageError(str(found))
        return dataset(copy)


SAMPLE = [one.__name__ for one in (dataset, states, status, asked, parquet, plain, merged, extended)]
READERS: dict[str, Callable[[Path], Answer]] = {
    one.__name__: one for one in (dataset, states, status, asked, parquet, plain, merged, extended, listed, mended)
}


def gone(file: Path) -> None:
    file.unlink()


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def shortened(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def a_link(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


DAMAGES = (gone, emptied, shortened, a_folder, a_link)


def files(store: Path) -> list[Path]:
    """Every file of an experiment."""
    return sorted(file.relative_to(store) for file in (store / "net").rglob("*") if file.is_file())


def kinds(store: Path) -> list[Path]:
    """One of each kind of file of an experiment."""
    return [*{tuple("#" if part.isdigit() else part for part in file.parts): file for file in files(store)}.values()]


def damaged(
    damage: Callable[[Path], None], file: Path, whole: Path, place: Path, sound: dict[str, Answer]
) -> tuple[list[str], list[TrajstoreError]]:
    """Damage a file of a copy, and ask in every way; return what is wrong with the answers, and who refused."""
    problems, refused = [], []
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(whole, place)
    damage(place / file)
    for name, right in sound.items():
        shutil.rmtree(f"{place}.traj", ignore_errors=True)  # the index would know
        try:
            answer = READERS[name](place)
        except TrajstoreError as error:
            refused.append(error)
            if "\n" in str(error):
                problems.append(f"{name} says several lines: {error}")
        except Exception as error:
            problems.append(f"{name} raised {error!r}")
        else:
            if answer != right:
                problems.append(f"{name} gave another answer")
    return [f"{damage.__name__} {file}: {problem}" for problem in problems], refused


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_file_that_is_missing_or_damaged_becomes_a_number(
    damage: Callable[[Path], None], whole: Path, tmp_path: Path
) -> None:
    """A sample; `make torture` has every file damaged in every way."""
    apart = 2 * len(DAMAGES)  # half of the kinds, each in one of the ways
    sound = {name: READERS[name](whole) for name in SAMPLE}
    refused: list[TrajstoreError] = []
    for file in kinds(whole)[DAMAGES.index(damage) :: apart]:
        problems, told = damaged(damage, file, whole, tmp_path / "s.zarr", sound)
        assert not problems, "\n".join(problems)
        refused += told
    assert len(refused) > 5


def recorded(store: Path) -> dict[str, Answer]:
    """Record what is to be damaged, with a late metric; return what is right."""
    _alone(store)
    ts.run(ts.Experiment.of(TINY), store, **HOW)
    analysis.compute(ts.open(store)["net"], "gradient_norm")
    sound = {name: read(store) for name, read in READERS.items()}
    shutil.rmtree(f"{store}.traj")
    return sound


def batch_of_damages(
    whole: Path, place: Path, sound: dict[str, Answer], batch: list[tuple[int, Path]]
) -> tuple[list[str], Counter[str]]:
    """Damage some files, each in one way: `DAMAGES` has it."""
    _alone(place)
    problems, counts = list[str](), Counter[str]()
    for which, file in batch:
        wrong, refused = damaged(DAMAGES[which], file, whole, place, sound)
        problems += wrong
        counts += Counter(damaged=1, asked=len(sound), refused=len(refused))
    return problems, counts


def _alone(place: Path) -> None:
    """Have this process keep its cache beside a store, wait for no disk, and cut states into several chunks."""
    import trajstore.recording.schema

    trajstore.recording.schema.segment_length = lambda layout: 4
    os.environ["XDG_CACHE_HOME"] = str(place.parent / "cache")
    os.fsync = lambda descriptor: None


def damages(most: int, seed: int, folder: Path) -> Report:
    """Damage every file in every way, or a sample of so many, and ask in every way."""
    report, whole = Report("missing and damaged files", Counter(damaged=0)), folder / "whole" / "s.zarr"
    sound = in_child(recorded, whole)
    cases = [(which, file) for file in files(whole) for which in range(len(DAMAGES))]
    chosen = sorted(random.Random(seed).sample(cases, min(most, len(cases))))
    batches = [chosen[begin : begin + 6] for begin in range(0, len(chosen), 6)]

    def batch(number: int, which: int) -> None:
        place = folder / f"copy-{which}" / "s.zarr"
        place.parent.mkdir(exist_ok=True)
        problems, counts = in_child(batch_of_damages, whole, place, sound, batches[number])
        report.add("", [], **counts)
        for problem in problems:
            report.add(f"seed {seed}", [problem])

    side_by_side(batch, range(len(batches)))
    report.counts["of"] = len(cases)
    return report


def test_the_error_names_slab_steps_and_file(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "s.zarr")
    (tmp_path / "s.zarr" / "net" / "params" / "c" / "1" / "0" / "0" / "1").unlink()
    said = (
        r"experiment 'net', order 'backward', seed 0: steps 4 to 7 were committed, and net/params/c/1/0/0/1 is "
        r"missing; restore it from a copy, or have `trajstore verify --repair` take it out, and "
        r"--resume writes it again"
    )
    experiment = ts.open(tmp_path / "s.zarr")["net"]
    with pytest.raises(DamageError, match=said):
        experiment.state_dict(order="backward", seed=0, step=5)
    with pytest.raises(DamageError, match=said):
        experiment.dataset().load()
    experiment.state_dict(order="backward", seed=0, step=3)  # what is there is read
    experiment.state_dict(order="forward", seed=0, step=5)
    assert list(verify(ts.Store(tmp_path / "s.zarr"), repair=True))
    ts.run(ts.Experiment.of(TINY), tmp_path / "s.zarr", resume=True, **HOW)
    assert dataset(tmp_path / "s.zarr") == dataset(whole)


@pytest.mark.parametrize("name", ["gradient_norm", "gradient_norm_samples"])
def test_what_a_repair_took_out_of_a_late_metric_is_computed_again(name: str, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "s.zarr")
    shortened(tmp_path / "s.zarr" / "net" / name / "c" / "1" / "0" / "0")
    assert [found for found in verify(ts.Store(tmp_path / "s.zarr"), repair=True) if found.repaired]
    assert dataset(tmp_path / "s.zarr")[name] != dataset(whole)[name]
    assert analysis.compute(ts.open(tmp_path / "s.zarr")["net"], "gradient_norm") == 10, "the states of one slab"
    assert dataset(tmp_path / "s.zarr") == dataset(whole)


def test_a_metric_that_came_later_is_not_missed_before(tmp_path: Path) -> None:
    """Its array has no chunks for the steps before: nothing of it is committed there."""
    import torch

    store, module = tmp_path / "s.zarr", torch.nn.Linear(1, 1)
    with ts.record(store, "mine", module, seed=0) as rec:
        for _ in range(3):
            rec.step(loss=1.0)
    with ts.record(store, "mine", module, seed=1) as rec:
        rec.step(loss=1.0, accuracy=0.5)
    ds = ts.open(store)["mine"].dataset().load()
    assert np.isnan(ds["accuracy"].sel(seed=0)).all()
    assert ds["accuracy"].sel(seed=1).values[0, 1] == 0.5
    (store / "mine" / "accuracy" / "c" / "0" / "1" / "0").unlink()
    with pytest.raises(DamageError, match="mine/accuracy/c/0/1/0 is missing"):
        ts.open(store)["mine"].dataset().load()


def test_another_process_misses_it_too(whole: Path, tmp_path: Path) -> None:
    import dask

    shutil.copytree(whole, tmp_path / "s.zarr")
    ds = ts.open(tmp_path / "s.zarr")["net"].dataset()
    for chunk in ("params/c/0/0/0/0", "test_loss/c/0/0/0"):
        (tmp_path / "s.zarr" / "net" / chunk).unlink()
        name = chunk.partition("/")[0]
        with pytest.raises(FormatError, match=f"net/{chunk} is missing"), dask.config.set(scheduler="processes"):
            ds[name].compute()


def _copied_first(store: Path, copy: Path, records: list[Path]) -> None:
    """Copy the document of the experiment, and then its records."""
    (copy / "net").mkdir(parents=True)
    shutil.copy2(store / "net" / "zarr.json", copy / "net" / "zarr.json")
    for record in records:
        if (store / record).is_dir():
            shutil.copytree(store / record, copy / record)
        else:
            (copy / record).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(store / record, copy / record)


def test_a_loop_that_ended_while_it_was_copied_is_not_complete_in_the_copy(tmp_path: Path) -> None:
    """Else the last of the steps that are in the copy would pass for the last that there were."""
    store, copy = tmp_path / "s.zarr", tmp_path / "copy.zarr"
    how = {"snapshots": 1, "sketch": 4}
    with suppress(InterruptedError), ts.record(store, "net", torch.nn.Linear(2, 2), **how) as rec:
        rec.step(loss=1.0)
        raise InterruptedError
    first = [Path("net", "committed", "c")]
    _copied_first(store, copy, first)
    with (
        pytest.warns(ResumedWarning),
        ts.record(store, "net", torch.nn.Linear(2, 2), resume=True, **how) as rec,
    ):
        rec.step(loss=0.5)
    later = [Path("net", "zarr.json"), *first]
    for file in store.rglob("*"):
        at = file.relative_to(store)
        if file.is_file() and not any(at == part or part in at.parents for part in later):
            (copy / at).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy / at)
    (whole,), (copied,) = ts.open(store)["net"].slabs(), ts.open(copy)["net"].slabs()
    assert (whole.last_step, whole.complete) == (2, True)
    assert (copied.last_step, copied.complete) == (1, False)
    assert not [found for found in verify(ts.Store(copy)) if not found.harmless]


def test_a_copy_whose_commit_records_were_taken_first_is_sound(tmp_path: Path) -> None:
    """As docs/places.md says: the records of an earlier moment speak of chunks that are there, and of no others."""
    from tests.conftest import stop_after

    store, copy = tmp_path / "s.zarr", tmp_path / "copy.zarr"
    with pytest.raises(KeyboardInterrupt):
        ts.run(ts.Experiment.of(TINY), store, progress=stop_after(20), **HOW)
    analysis.compute(ts.open(store)["net"], "gradient_norm")
    parts = ("*_committed/zarr.json", "*committed/c")
    first = [found.relative_to(store) for each in parts for found in (store / "net").glob(each)]
    _copied_first(store, copy, first)
    ts.run(ts.Experiment.of(TINY), store, resume=True, **HOW)
    ts.run(ts.Experiment.of({**TINY, "steps": 11}), store, extend=True, **HOW)
    analysis.compute(ts.open(store)["net"], "gradient_norm")

    def left_out(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(folder, name).relative_to(store) in [Path("net", "zarr.json"), *first]]

    shutil.copytree(store, copy, dirs_exist_ok=True, ignore=left_out)
    assert not [found for found in verify(ts.Store(copy)) if not found.harmless]
    ds, whole = ts.open(copy)["net"].dataset().load(), ts.open(store)["net"].dataset().load()
    whole = whole.sel(step=ds["step"])
    there = ds["recorded"].values
    assert 0 < there.sum() < there.size
    assert np.array_equal(ds["test_loss"].values[there], whole["test_loss"].values[there])
