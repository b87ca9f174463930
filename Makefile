# `make demo` and `make test` do everything in .venv; they need python3 ≥ 3.11 with venv, and a package index.
# Tests run in two processes; JOBS=1 for one.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check

# A torch that the machine has already, and that fits, is used instead of downloading another.
FITS := from importlib.metadata import version as v; \
	fits = lambda p, *least: tuple(map(int, v(p).split(".")[:2])) >= least; \
	print("--system-site-packages" * (fits("torch", 2, 9) and fits("torchvision", 0, 24)))
SITE = $(shell $(PYTHON) -c '$(FITS)' 2>/dev/null)

.PHONY: demo test lowest slow engines clustered torture check lint types docs notebooks clean

demo: $(VENV)/.installed
	$(BIN)/trajstore demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadscope

# The tests with the oldest releases that pyproject.toml names, in an environment of their own.
OLD := .venv-lowest
lowest: $(OLD)/.installed
	$(OLD)/bin/python -m pytest -n $(JOBS) --dist loadscope

$(OLD)/.installed: pyproject.toml tests/tools/lowest.py
	@$(PYTHON) -m venv --clear $(OLD)
	@$(OLD)/bin/python tests/tools/lowest.py test > $(OLD)/oldest.txt
	@echo "Installing the oldest releases that are supported into $(OLD) ..."
	@$(OLD)/bin/python -m pip --quiet --disable-pip-version-check install -e ".[test]" -c $(OLD)/oldest.txt
	@touch $@

# What takes minutes; and executes the notebooks, and compares what they say with what is committed.
slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

# Every operator on every problem, compiled, against the reference: an hour or so.
engines: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m engines tests/engine

# The tests of the analysis with a Dask client that computes everything, and with dask's processes: slow as well.
clustered: $(VENV)/.installed-test
	CLUSTERED=client $(BIN)/python -m pytest tests/analysis
	CLUSTERED=processes $(BIN)/python -m pytest tests/analysis

# Kills, failing disks, power cuts, writers that lost their lock, and every byte flipped: some hours.
torture: $(VENV)/.installed-test
	$(BIN)/python -m tests.tools.torture

check: lint types test

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.tools.check_imports

# mypy has to see the three packages as they are installed; from here it would see one and report success.
types: $(VENV)/.installed-test
	$(BIN)/python -m tests.tools.check_types

docs: $(VENV)/.installed-docs
	$(BIN)/sphinx-build -W -q docs docs/_build/html

# Executes the notebooks again, in place; the tests compare what they say with what is committed.
notebooks: $(VENV)/.installed-test
	$(BIN)/python -m tests.tools.notebooks

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "trajstore needs Python 3.11 or newer; say which with make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(SITE) $(VENV) \
		|| { rm -rf $(VENV); echo "python3 has no venv; on Debian: apt install python3-venv"; exit 1; }

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "Installing trajstore and what it needs into $(VENV) (torch alone is some GB on Linux) ..."
	@$(PIP) install -e .
	@touch $@

$(VENV)/.installed-%: pyproject.toml $(VENV)/.installed
	@$(PIP) install -e ".[$*]"
	@touch $@

clean:
	rm -rf $(VENV) $(OLD) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis docs/_build
