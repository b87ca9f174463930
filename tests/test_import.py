"""What importing costs: nothing heavy, and torchvision only where images are."""

from __future__ import annotations

import subprocess
import sys


def loaded(program: str) -> set[str]:
    told = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(told.stdout.split())


def test_import_trajstore_loads_nothing_heavy():
    heavy = {"torch", "torchvision", "zarr", "xarray", "duckdb", "dask", "matplotlib", "numpy", "pydantic"}
    assert not loaded("import trajstore") & heavy


def test_reading_a_store_loads_no_torch():
    assert "torch" not in loaded(
        "import trajstore as ts; ts.open; import trajstore.reading.dataset, trajstore.reading.sql"
    )
    assert "torch" not in loaded("import trajstore.exchange.merge")


def test_statistics_of_metrics_load_neither_torch_nor_what_draws():
    assert not loaded("import trajstore.analysis") & {"torch", "matplotlib", "scipy.stats"}


def test_the_command_lines_help_loads_nothing_heavy():
    heavy = {"torch", "zarr", "xarray", "duckdb", "matplotlib", "numpy", "pydantic"}
    assert not loaded("import trajstore.cli.main") & heavy


def test_the_command_line_loads_little_but_its_parser():
    parser = loaded("import typer, typer.main, typer.testing")
    more = {name.split(".")[0] for name in loaded("import trajstore.cli.main") - parser}
    assert more - set(sys.stdlib_module_names) == {"trajstore"}


def test_a_broken_torchvision_disturbs_nobody(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise ImportError('broken')")
    program = (
        "import trajstore as ts; e = ts.Experiment.preset('fig4', {'steps': 2, 'problem': {'width': 4}})\n"
        "ts.run(e, 'a.zarr'); ts.open('a.zarr')['fig4'].dataset()"
    )
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    broken = subprocess.run(
        [sys.executable, "-c", "import torchvision"], cwd=tmp_path, env=environment, capture_output=True
    )
    assert b"ImportError: broken" in broken.stderr


def test_every_public_name_is_there():
    import trajstore as ts

    for name in ts.__all__:
        assert getattr(ts, name) is not None
    assert set(ts.__all__) <= set(dir(ts))


def test_what_moved_is_handed_on_for_a_release():
    program = "import warnings; warnings.simplefilter('error')\ntry:\n    import trajstore.streaming\n"
    program += "except DeprecationWarning as told:\n    assert 'trajstore.reading.streaming' in str(told)\n"
    program += "warnings.simplefilter('ignore'); from trajstore.streaming import Need as old\n"
    program += "from trajstore.reading.streaming import Need\nassert Need is old; print('handed on')"
    assert "on" in subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
