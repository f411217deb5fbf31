# Every target sets itself up: on a fresh machine `make test` makes the environment, installs, and runs.
# Needs python3 >= 3.11. `make VENV=elsewhere ...` keeps the environment somewhere else.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
RECIPE ?= uci-spine
DATA ?= .

.PHONY: help demo test test-all check fix bench reproduce docs clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

demo: $(READY) ## the main job on a generated log, under three minutes
	$(BIN)/freshrec demo --jobs 2

# Tests of a file run in one process: they share stores, replays and models that take long to make.
test: $(READY) ## the tests, a few minutes
	$(BIN)/pytest -n 2 --dist loadfile

test-all: $(READY) ## the slow ones too
	$(BIN)/pytest -n 2 --dist loadfile -m ""

check: $(READY) ## linter, formatter, strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(READY) ## mend what the linter can mend, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## one JSON line per benchmark
	@set -e; for file in benchmarks/bench_*.py; do $(BIN)/python $$file; done

reproduce: $(READY) ## one recipe into benchmarks/results: RECIPE=uci-spine DATA=folder-of-the-logs; stops and resumes
	$(BIN)/python benchmarks/reproduce.py recipes/$(RECIPE).toml --data $(DATA)

docs: $(READY) ## write the generated pages anew
	$(BIN)/python docs/generate.py

clean: ## forget the environment and the caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

# One thread each: tests and demo run in two processes, and small tensors are slower on two threads than on one.
demo test test-all bench reproduce: export OMP_NUM_THREADS = 1

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): a minute or two, once"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
