# Each target sets up all it needs: a virtual environment in .venv, made by the `python3` that is found.
#   make demo     the main job on real input, beside eager and TorchInductor, in about three minutes
#   make test     the tests that need no GPU; ARGS="-k attention" selects, JOBS=8 uses more processes
#   make test-slow  those that take minutes
#   make check    lint, layout, types and architecture
#   make format   rewrite the sources in the layout that `make check` asks for
#   make bench    side by side with TorchInductor
#   make clean    remove all that was made here

PYTHON ?= python3
JOBS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin

# Nothing of the calling shell's Python may leak in.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV
export PYTHONNOUSERSITE := 1
# Models are built from configurations or from installed packages; no hub is ever asked.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

# The processes of one test run share what the host has compiled, and do not compete for the cores.
TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/.cache/inductor
test check: export TORCHINDUCTOR_CACHE_DIR := $(TORCHINDUCTOR_CACHE_DIR)
test check: export TORCHINDUCTOR_COMPILE_THREADS ?= 1
test check: export OMP_NUM_THREADS ?= 1

.PHONY: help venv demo test test-slow check format bench clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

venv:
	@$(PYTHON) scripts/make_venv.py $(VENV)

demo: venv
	$(BIN)/fxopt demo $(ARGS)

test: venv
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow and not gpu" $(ARGS)

test-slow: venv
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "slow and not gpu" $(ARGS)

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: venv
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

bench: venv
	$(BIN)/fxopt bench $(ARGS)

clean:
	rm -rf $(VENV) .cache build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
