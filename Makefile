# From a fresh machine: `make quickstart` trains a small model, `make test` checks everything. Nothing else is needed before.
#
#   PYTHON       the interpreter the environment is made of, 3.10 to 3.12
#   TORCH_INDEX  a package index to take torch from (another CUDA version, or a CPU build); empty: the usual index
#   WORKERS      how many processes share the test files, of one thread each; 2
#   PYTEST_ARGS  more arguments for pytest, for example PYTEST_ARGS="tests/model -k rotary"

PYTHON ?= python3
TORCH_INDEX ?=
PYTEST_ARGS ?=
WORKERS ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# The oldest and the newest supported Triton: its kernels are interpreted and compiled with each, beside the environment, where torch has
# none on a CPU and its own on a GPU.
TRITONS := 3.6.0 3.9.0
SPECIFICATION := setup.py pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart speedrun test lint format clean

help:
	@echo "make quickstart   build the environment, prepare a corpus of this machine's Python library, train on it"
	@echo "make speedrun     the same with the best model that three minutes of training on two cores buy"
	@echo "make test         build the environment, lint, run the test suite"
	@echo "make lint         ruff, mypy and shellcheck"
	@echo "make format       rewrite the sources as ruff formats them"
	@echo "make clean        remove the environment and all caches; corpora and runs stay"

quickstart: .venv/stamp
	@test -d data/stdlib || $(BIN)/megascale prepare data/stdlib
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed launch/pretrain.py --config configs/runs/quickstart.yaml
	@$(BIN)/megascale report runs/quickstart

speedrun: .venv/stamp
	@test -d data/stdlib || $(BIN)/megascale prepare data/stdlib
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed launch/pretrain.py --config configs/runs/speedrun.yaml
	@$(BIN)/megascale report runs/speedrun

test: lint $(TRITONS:%=.venv/triton-%)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist=loadfile $(PYTEST_ARGS)

lint: .venv/stamp-dev
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy --no-error-summary
	$(BIN)/shellcheck launch/slurm/*.sbatch

format: .venv/stamp-dev
	$(BIN)/ruff check --fix --quiet
	$(BIN)/ruff format --quiet

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment ------------------------------------------------------------------------------------------------------

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "$(PYTHON): not found. Install Python 3.10, 3.11 or 3.12, or name one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || { \
	  echo "$(PYTHON) is $$("$(PYTHON)" --version 2>&1); megascale needs Python 3.10, 3.11 or 3.12:" \
	       "make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make environments: its venv module is missing. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	"$(PYTHON)" -m venv .venv

# torch comes first and alone: deepspeed has no wheel, and its build imports the torch it will run with (hence no isolation).
.venv/stamp: $(SPECIFICATION) | $(BIN)/python
	@echo "installing torch and megascale into .venv; the first time takes minutes"
	$(PIP) install -c constraints.txt setuptools
	$(if $(TORCH_INDEX),$(PIP) install -c constraints.txt --no-deps --index-url "$(TORCH_INDEX)" torch)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt --no-build-isolation -e .
	@touch $@

.venv/stamp-dev: .venv/stamp
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[dashboard,dev]"
	@touch $@

.venv/triton-%: | .venv/stamp
	@$(PIP) install --no-deps --target $@.part triton==$* && mv $@.part $@ || \
	  { rm -rf $@.part; echo "triton $* could not be installed here: the tests that need it are skipped"; }
