from __future__ import annotations

import locale
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Whoever runs the tests may have set up other things for their own work: no test may depend on that, and no process
# that a test starts. This comes before anything is imported that reads it.
_THEIRS = (
    "AWS_", "CLICOLOR", "COLUMNS", "DASK_", "FORCE_COLOR", "LINES", "MPL", "NO_COLOR", "PYTHONIOENCODING",
    "PYTHONWARNINGS", "TORCHDYNAMO_", "TORCHINDUCTOR_", "TORCH_COMPILE", "TORCH_LOGS", "TRAJSTORE_",
)  # fmt: skip
for _name in [name for name in os.environ if name.startswith(_THEIRS)]:
    del os.environ[_name]
os.environ.update(MPLBACKEND="agg", LC_ALL="C.UTF-8")
with suppress(locale.Error):
    locale.setlocale(locale.LC_ALL, "")

# Nor on whether they run in the background of a shell, which then has everything ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if not os.access(Path(__file__).parents[1], os.W_OK):  # it would keep its examples there
    hypothesis.settings.register_profile("kept nowhere", database=None)
    hypothesis.settings.load_profile("kept nowhere")

import trajstore as ts  # noqa: E402
from trajstore.engine import Engine, Iterate, Work  # noqa: E402
from trajstore.engine.orders import Leg  # noqa: E402
from trajstore.problems import factory  # noqa: E402

Record = Callable[..., ts.StoredExperiment]

SMALL_NET = {
    "name": "net",
    "problem": {"family": "regression", "width": 8, "depth": 2, "points": 21},
    "operator": {"family": "sgd", "lr": 0.05},
    "steps": 12,
    "seeds": [0, 1],
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans and indexes of the tests stay out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def own_modules(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test writes and imports is forgotten with it: the next one may have a file of the same name."""
    monkeypatch.setattr("sys.path", [*sys.path])
    before = {*sys.modules}
    yield
    theirs = str(tmp_path_factory.getbasetemp())
    for name in {*sys.modules} - before:  # all of them would be thousands, after each test
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(theirs):
            forget(name)


@pytest.fixture(scope="module")
def several_segments() -> Iterator[None]:
    """Have states lie in several chunks: for tests that use it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trajstore.recording.schema.segment_length", lambda layout: 4)
        yield


@pytest.fixture(autouse=True)
def slow_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a machine does much else, a worker that compiles for a minute is not silent: that would be a warning."""
    monkeypatch.setattr("trajstore.recording.workers.patience._SILENT", 1_200.0)


def sampled(cases: Iterable[Any], every: int) -> list[Any]:
    """Return the cases of a test: each so many-th is in the suite, and `make slow` has the others."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[pytest.mark.slow] * (number % every > 0))
        for number, case in enumerate(cases)
    ]


def unexpected(told: str) -> list[str]:
    """Return the lines on standard error that no torch may cause: some compile wrongly, which is noticed and told."""
    return [line for line in told.splitlines() if "the compiled tick gives something else" not in line]


def forget(module: str) -> None:
    """Have a module imported again, and what its functions made made again."""
    del sys.modules[module]
    factory._call.cache_clear()


@pytest.fixture(scope="session", autouse=True)
def computed_elsewhere() -> Iterator[None]:
    """Compute what dask computes as `CLUSTERED` says: on a `client`'s workers, or by `processes`.

    `make clustered` runs the tests of the analysis in both ways.
    """
    import dask

    how = os.environ.get("CLUSTERED", "")
    if how == "client":
        from distributed import Client, LocalCluster

        with (
            warnings.catch_warnings(),
            LocalCluster(1, threads_per_worker=2, dashboard_address="127.0.0.1:0", memory_limit=0) as cluster,
            Client(cluster),
        ):
            yield
    elif how == "processes":
        one = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))  # for all: it imports for seconds
        with one, dask.config.set(scheduler="processes", pool=one):
            yield
    else:
        assert not how, f"CLUSTERED is {how!r}; it is client, processes or nothing"
        yield


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """Record an experiment, given as a preset or a table, into a store of the test's own."""

    def recorded(
        base: str | dict[str, Any] = SMALL_NET, *, resume: bool = False, **changes: Any
    ) -> ts.StoredExperiment:
        if isinstance(base, str):
            experiment = ts.Experiment.preset(base, changes)
        else:
            experiment = ts.Experiment.of({**base, **changes})
        return ts.run(experiment, tmp_path / "runs.zarr", resume=resume)

    return recorded


@pytest.fixture
def trajstore(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[Any, str, str]]:
    """Run the program in a folder of the test's own: (exit code, standard output, standard error)."""
    from trajstore.cli.main import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["trajstore", *arguments])
        for kind in (DeprecationWarning, PendingDeprecationWarning):  # as Python does, where nobody tests
            warnings.filterwarnings("ignore", category=kind, module=r"(?!trajstore|tests)")
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return ended.value.code, told.out, told.err

    return run


def stop_after(amount: int) -> Callable[[int, str], None]:
    """Return what interrupts a recording once more than so much progress was told."""
    done = 0

    def tell(more: int, where: str) -> None:
        nonlocal done
        done += more
        if done > amount:
            raise KeyboardInterrupt

    return tell


def record_half(experiment: ts.Experiment, store: Path) -> None:
    """Record 40 iterates, and interrupt."""
    with pytest.raises(KeyboardInterrupt):
        ts.run(experiment, store, engine="reference", durability="none", progress=stop_after(40))


def last_of(engine: Engine, leg: Leg, step: int) -> Iterate:
    """The iterate of a leg at one step, for the engine's first seed."""
    ((_, iterate),) = engine.run([Work(0, leg, engine.start(0), [step])])
    return iterate
