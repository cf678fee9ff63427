# Every target builds the virtual environment .venv first, and again only when
# pyproject.toml or constraints.txt change. Needs Python 3.11 or newer, with pip.
PYTHON ?= python3
CONFIG ?= configs/quickstart.yaml
# What is given to pytest, for example: make test PYTEST_ARGS="-m slow"
PYTEST_ARGS ?= --numprocesses 2 --dist loadfile

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install fit test lint format docs wheel clean

help:
	@echo "make fit      train the quickstart (or CONFIG=FILE), then print its figures and a sample"
	@echo "make test     run the default test suite"
	@echo "make lint     check formatting, lint and types, as continuous integration does"
	@echo "make format   rewrite the files as make lint wants them"
	@echo "make docs     build docs/_build/html; a warning fails the build"
	@echo "make wheel    build dist/*.whl"
	@echo "make clean    remove the virtual environment and everything built"

install: .venv/installed

# torch goes first: with it in place nothing later can pull in another build of it.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f'dflows needs Python 3.11 or newer; $(PYTHON) is {v[0]}.{v[1]}. Try: make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(PIP) torch setuptools
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

.venv/installed-docs: .venv/installed
	$(PIP) --no-build-isolation --editable '.[docs]'
	@touch $@

fit: .venv/installed
	$(BIN)/python -m dflows.fit --config $(CONFIG)

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: .venv/installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: .venv/installed-docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --builder html docs docs/_build/html

wheel: .venv/installed
	rm -rf build
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf .venv build dist docs/_build docs/api/generated *.egg-info .mypy_cache .pytest_cache .ruff_cache
