# make help lists the targets. PYTHON=python3.12 chooses the interpreter, ARGS="…" goes to the command that is run.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
WORKERS ?= 2
# A thread for each of the processes that share the tests, which must find the same tests in the same order.
PYTEST := PYTHONHASHSEED=0 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python

.PHONY: help run install test test-slow lint format slurm bench bench-gpu clean

help: ## show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

run: $(VENV)/.installed ## the demo, or ARGS="method=… data=…" for anything else
	@$(BIN)/subspace-lab $(ARGS)

install: $(VENV)/.installed ## the environment in .venv, without running anything

test: $(VENV)/.installed-dev ## all tests but the slow ones, in WORKERS=2 processes
	$(PYTEST) -n $(WORKERS) --dist loadfile -m "not slow" $(ARGS)

test-slow: $(VENV)/.installed-dev ## the slow tests alone
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.installed-dev ## formatting, lint and types, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## mend formatting and what lint can mend
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

slurm: $(VENV)/.installed ## write the batch scripts in slurm/ anew, from the configuration
	@$(BIN)/python scripts/slurm_templates.py

bench: $(VENV)/.installed-bench ## CPU times: optimizers beside torch and galore-torch, projections, class subspaces, continual and federated learning
	$(BIN)/python scripts/bench_continual.py $(ARGS)
	$(BIN)/python scripts/bench_continual_epochs.py $(ARGS)
	$(BIN)/python scripts/bench_federated.py $(ARGS)
	$(BIN)/python scripts/bench_manifolds.py $(ARGS)
	$(BIN)/python scripts/bench_merging.py $(ARGS)
	$(BIN)/python scripts/bench_merging_files.py $(ARGS)
	$(BIN)/python scripts/bench_projections.py $(ARGS)
	$(BIN)/python scripts/bench.py $(ARGS)

bench-gpu: $(VENV)/.installed-bench ## the same on CUDA, with LLaMA-1B and 10^8 parameters
	$(BIN)/python scripts/bench_continual.py --device cuda $(ARGS)
	$(BIN)/python scripts/bench_federated.py --device cuda --skip-flower $(ARGS)
	$(BIN)/python scripts/bench_manifolds.py --device cuda $(ARGS)
	$(BIN)/python scripts/bench_merging.py --device cuda $(ARGS)
	$(BIN)/python scripts/bench_projections.py --device cuda $(ARGS)
	$(BIN)/python scripts/bench.py --device cuda $(ARGS)

clean: ## caches and builds; keeps .venv and outputs
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Installing is keyed on pyproject.toml. torch and torchvision come as the registry builds them: never a CPU-only pin.
$(VENV)/.installed: pyproject.toml | $(BIN)/uv
	@echo "installing into $(VENV) (several GB the first time)" >&2
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/uv
	@echo "installing into $(VENV), with what tests need (several GB the first time)" >&2
	@$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-bench: pyproject.toml | $(BIN)/uv
	@$(INSTALL) --editable '.[dev,bench]'
	@touch $@ $(VENV)/.installed-dev $(VENV)/.installed

# An environment made by hand may lack pip, an interrupted one may be half there: each is mended, neither is trusted.
$(BIN)/uv:
	@if ! $(BIN)/python -c pass 2>/dev/null; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON) is older than Python 3.11: make … PYTHON=python3.12" >&2; exit 2; }; \
	  $(PYTHON) -m venv --clear $(VENV) || \
	    { rm -rf $(VENV); echo "$(PYTHON) cannot make environments: install python3-venv, or give another with PYTHON=" >&2; exit 2; }; \
	fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade >/dev/null
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
