# Two commands: `make demo` and `make test`. Both install what they need into .venv the first time.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --no-input
.DEFAULT_GOAL := help

.PHONY: help demo test test-slow test-floor test-s3 check clean install install-vllm

help: ## List these commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: install ## Train a small real Qwen3-VL with DAPO on this machine (one to three minutes on 2 cores)
	@$(VENV)/bin/dapo run configs/geo3k_tiny.yaml

test: install-vllm ## Run the default test suite (under ten minutes on 2 cores)
	@$(VENV)/bin/python -m pytest $(ARGS)

test-slow: install-vllm ## Run the longer tests
	@$(VENV)/bin/python -m pytest -m "slow and not nightly and not gpu and not npu" $(ARGS)

test-floor: install $(VENV)/.floor ## Run the tests of model, trainer and data on the oldest supported transformers
	@PYTHONPATH=$(VENV)/floor $(VENV)/bin/python -m pytest tests/model tests/train tests/data $(ARGS)

test-s3: install $(VENV)/.s3 ## Run the tests of object storage against a real S3 server on this machine
	@PYTHONPATH=$(VENV)/s3 $(VENV)/bin/python -m pytest tests/data/test_remote.py tests/runtime/test_mirror.py $(ARGS)

check: install ## Lint, types, import rules
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports

install: $(VENV)/.light ## Install the CPU stack into .venv
install-vllm: $(VENV)/.vllm ## Install the CPU stack and vLLM into .venv

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "no python3.11 or python3.12 on PATH: install one, or say make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || { echo "$(PYTHON) is $$($(PYTHON) -V); Python 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) && touch $@

$(VENV)/.light: $(VENV)/.python requirements/cpu.lock pyproject.toml
	@echo "Installing the CPU stack into $(VENV) (once, about two minutes) ..."
	@$(PIP) install --quiet --no-deps -r requirements/cpu.lock
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.vllm: $(VENV)/.light requirements/vllm.lock
	@echo "Adding vLLM to $(VENV) (once, about two minutes) ..."
	@$(PIP) install --quiet --no-deps -r requirements/vllm.lock
	@touch $@

# Over the environment rather than beside it: only what differs is installed twice.
$(VENV)/.floor: $(VENV)/.light requirements/floor.lock
	@rm -rf $(VENV)/floor
	@$(PIP) install --quiet --no-deps --target $(VENV)/floor -r requirements/floor.lock
	@touch $@

$(VENV)/.s3: $(VENV)/.light requirements/s3.lock
	@rm -rf $(VENV)/s3
	@$(PIP) install --quiet --no-deps --target $(VENV)/s3 -r requirements/s3.lock
	@touch $@

clean: ## Remove the environment, caches and runs
	@rm -rf $(VENV) cache runs .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache .benchmarks build *.egg-info
