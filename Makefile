# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SECONDS ?= 60
SEED ?= 1

.PHONY: help demo test check bench chaos rehearsal clean
help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

# A venv with plain pip; uv, where it is installed, does the same faster.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'pkbrokers-redis needs Python 3.11 or later: make PYTHON=python3.12 …'; exit 2; }
	@echo 'Setting up $(VENV) (once)…'
	@$(PYTHON) -m venv $(VENV)
	@if command -v uv >/dev/null 2>&1; then \
	  VIRTUAL_ENV=$(VENV) uv pip install -q -e . --group dev; \
	else \
	  $(BIN)/python -m pip install -q --upgrade pip && $(BIN)/python -m pip install -q -e . --group dev; \
	fi
	@touch $@

demo: $(READY)  ## candles forming on an embedded server, fed by a local Kite simulator
	@$(BIN)/pkb demo $(ARGS)

test: $(READY)  ## all tests, in parallel, on servers they start themselves
	@$(BIN)/python -m pytest $(ARGS)

check: $(READY)  ## format, lint, types, layers
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(READY)  ## the table of docs/decisions/0021, measured here
	@$(BIN)/pkb bench $(ARGS)

chaos: $(READY)  ## the pipeline under faults: make chaos SECONDS=600 SEED=7
	@$(BIN)/python -m tests.chaos.driver --seconds $(SECONDS) --seed $(SEED) $(ARGS)

rehearsal: $(READY)  ## a virtual trading day with outages, compared row by row with the simulator's history
	@$(BIN)/python -m tests.e2e.rehearsal $(ARGS)

clean:  ## remove the venv and caches
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
