# make install   the environment, in .venv; all of it (the extra dev)
# make package   a wheel and an sdist, in dist
# make versions  constraints.txt anew; make newest: try the newest of everything, report in newest.md
# make demo      the whole way on one machine; INPUT=my.fasta takes your own proteins
# make test      the suite but for what is marked thorough
# make test-all  everything, and property tests with ten times as many examples
# make test-gpu  what a GPU makes of it, in eight minutes; GPU_PYTHON needs torch, not the rest
# make doctor    is this machine fit to train on; ARGS="--address URL" asks a cluster
# make check     format, lint, types, layering
# make clean     everything the other targets made

PYTHON ?= python3
GPU_PYTHON ?= $(PYTHON)
VENV := .venv
BIN := $(VENV)/bin
INPUT ?=

.PHONY: install demo test test-all test-gpu doctor check package versions newest clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	@exec $(BIN)/python jobs/run_demo.py $(if $(INPUT),--input '$(INPUT)')

test: install
	@exec $(BIN)/python -m pytest -m 'not thorough'

test-all: install
	@exec $(BIN)/python -m pytest --hypothesis-profile thorough

test-gpu:
	@exec $(GPU_PYTHON) tests/gpu/gpu_run.py $(ARGS)

doctor: install
	@exec $(BIN)/python jobs/check_cluster.py $(ARGS)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

package: install
	$(BIN)/python -m build

versions: install
	$(BIN)/python .ci/pin_versions.py

newest:
	$(PYTHON) .ci/pin_versions.py --try-newest newest.md

clean:
	rm -rf $(VENV) runs/demo corpora/demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache platform/raptide.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
