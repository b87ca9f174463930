"""An installed package adds a problem, an operator, a statistic and a figure: by name, and imported when asked for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import trajstore as ts

FILES = {
    "pyproject.toml": """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "tiny-offers"
version = "1.0"

[tool.setuptools]
packages = ["tiny_offers"]

[project.entry-points."trajstore.problems"]
parabola = "tiny_offers.declared:Parabola"
formless = "tiny_offers.declared:Signed"
broken = "tiny_offers.nowhere:Broken"

[project.entry-points."trajstore.operators"]
signed = "tiny_offers.declared:Signed"
sgd = "tiny_offers.declared:Signed"

[project.entry-points."trajstore.statistics"]
spread = "tiny_offers.asked:spread"

[project.entry-points."trajstore.figures"]
dots = "tiny_offers.asked:dots"
""",
    "tiny_offers/__init__.py": "",
    "tiny_offers/declared.py": '''
from dataclasses import dataclass

import torch

import trajstore as ts


@dataclass(frozen=True)
class Parabola:
    """Rows of nothing but a number, whose mean is sought."""

    points: int = 5

    def build(self, device):
        x = torch.linspace(0, 1, self.points)[:, None]
        return ts.ModuleProblem(lambda: torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, (x, x**2)).build(device)


@dataclass(frozen=True)
class Signed:
    """A step of one length along the sign of the gradient."""

    lr: float = 0.01

    def memory(self, params):
        return {}

    def apply(self, gradient, state, batch, index):
        gradients, buffers = gradient(state.params, state.buffers, batch)
        params = {name: p - self.lr * gradients[name].sign() for name, p in state.params.items()}
        return state._replace(params=params, buffers=buffers, position=state.position + 1)
''',
    "tiny_offers/asked.py": '''
def spread(stored, window=4):
    """The largest less the smallest of the last losses."""
    last = stored.dataset()["train_loss"].isel(step=slice(-window, None))
    return (last.max("step") - last.min("step")).to_dataset(name="spread").assign_attrs(long_name="the spread")


def dots(ds, *, metric: str = "train_loss"):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    axes.plot(ds[metric].isel(order=0, seed=0), ".")
    return figure
''',
}
TABLE = """
name = "theirs"
steps = 10
seeds = [0]
problem = {family = "parabola", points = 4}
operator = {family = "signed", lr = 0.02}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the package, and install it where only some processes look."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name, text in FILES.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-index"]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--target", site, source], check=True)
    return site


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Callable[..., str]:
    """Run the program, beside the package or without it, and return what it says; it ends with a code."""
    (tmp_path / "theirs.toml").write_text(TABLE)

    def told(*arguments: str, code: int = 0, beside: bool = True) -> str:
        program = "import sys; sys.path.append(sys.argv.pop(1)) if sys.argv[1] else sys.argv.pop(1)\n"
        program += "from trajstore.cli.main import main; main()"
        command = [sys.executable, "-c", program, str(installed) if beside else "", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout

    return told


def test_what_a_package_offers_is_recorded_asked_and_drawn(run: Callable[..., str], tmp_path: Path) -> None:
    recording = ["record", "theirs.toml", "--store", "s.zarr", "--engine", "reference"]
    assert "complete" in run(*recording)
    config = ts.open(tmp_path / "s.zarr")["theirs"].config
    assert config["problem"] == {"family": "parabola", "points": 4}
    assert config["operator"] == {"family": "signed", "lr": 0.02}
    assert "the spread" in run("analyze", "s.zarr", "theirs", "spread", "--window", "3")
    run("plot", "s.zarr", "theirs", "dots", "--metric", "batch_loss", "-o", "dots.png")
    assert (tmp_path / "dots.png").stat().st_size > 1_000
    run("compute", "gradient_norm", "s.zarr", "theirs")  # of an installed package, which needs no --trust
    assert "sound" in run("verify", "s.zarr", "--replay")

    # Without the package, what is stored can be read, and what computes says what is not there.
    assert "theirs" in run("ls", "s.zarr", beside=False)
    assert "gradient_norm" in run("sql", "s.zarr", "SELECT * FROM metrics LIMIT 1", beside=False)
    for asked in (["compute", "sharpness", "s.zarr", "theirs"], [*recording, "--resume"]):
        assert "unknown problem 'parabola'" in run(*asked, code=2, beside=False)
    assert "no analysis 'spread'" in run("analyze", "s.zarr", "theirs", "spread", code=2, beside=False)


def test_what_trajstore_has_keeps_its_name_and_what_cannot_be_imported_is_told(run: Callable[..., str]) -> None:
    changed = ["record", "theirs.toml", "--dry-run", "--set"]
    assert "operator sgd needs lr" in run(*changed, "operator.family=sgd", code=2)  # theirs has a default
    told = run(*changed, "problem.family=broken", code=2)
    assert (
        "'broken', one of trajstore.problems from tiny-offers (tiny_offers.nowhere:Broken), cannot be imported" in told
    )
    told = run(*changed, "problem.family=formless", code=2)
    assert "problem 'formless' is tiny_offers.declared:Signed, which has no build()" in told
    assert "did you mean 'parabola'" in run(*changed, "problem.family=parabol", code=2)
