# Every target installs what it needs: on a new machine, `make test` creates the environment and runs the tests.
# Needs python3 >= 3.11. `make VENV=FOLDER ...` uses another folder for it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
RECIPE ?= uci-spine
DATA ?= .

.PHONY: help demo test test-all check fix bench reproduce docs clean

help: ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

demo: $(READY) ## replay a generated log; takes less than three minutes
	$(BIN)/freshrec demo --jobs 2

# All tests of a file run in one process, because they share stores, replays and models that are slow to make.
test: $(READY) ## run the tests; takes a few minutes
	$(BIN)/pytest -n 2 --dist loadfile

test-all: $(READY) ## run all tests, including slow ones
	$(BIN)/pytest -n 2 --dist loadfile -m ""

check: $(READY) ## run the linter, the formatter and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(READY) ## fix what the linter can fix, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## run the benchmarks; each prints one JSON line
	@set -e; for file in benchmarks/bench_*.py; do $(BIN)/python $$file; done

reproduce: $(READY) ## run a recipe, resumable: RECIPE=uci-spine DATA=folder-of-the-logs; writes to benchmarks/results
	$(BIN)/python benchmarks/reproduce.py recipes/$(RECIPE).toml --data $(DATA)

docs: $(READY) ## regenerate the generated pages
	$(BIN)/python docs/generate.py

clean: ## delete the environment and the caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

# One thread per process: tests and demo use two processes, and small tensors are slower with two threads.
demo test test-all bench reproduce: export OMP_NUM_THREADS = 1

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV); this takes a minute or two, once"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
