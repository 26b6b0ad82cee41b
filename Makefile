# Each target makes what it needs. PYTHON chooses the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart

.PHONY: help quickstart test fast exhaustive check format bench torture clean

help:           ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

quickstart: $(VENV)/.run    ## install, then pretrain and evaluate an encoder on built-in images (about 2 minutes on 2 cores, and the install)
	rm -rf $(RUN)
	$(BIN)/hf-ssl-or train recipes/quickstart.yaml --output $(RUN)

test: check     ## lint, types and all tests (about 10 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

exhaustive: check   ## all tests and all their variants (about 15 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --exhaustive

fast: $(VENV)/.test     ## the quick tests, without the files that take long (about 3 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

check: $(VENV)/.test    ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test   ## put the code into its form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.bench   ## the CPU benchmarks, then the tables of docs/speed.md (about 15 minutes on 2 cores)
	for script in penalty step growth views loader checkpoint anatomy; do $(BIN)/python benchmarks/$$script.py || exit 1; done
	$(BIN)/python benchmarks/losses.py --quick --machine scratch
	$(BIN)/python benchmarks/tables.py

torture: $(VENV)/.test  ## 50 kills at random instants, each run resumed to the same end
	$(BIN)/python tests/faults/torture.py --kills 50

clean:          ## remove the environment and the runs
	rm -rf $(VENV) runs

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no venv module here: apt-get install python3-venv"; exit 1; }

$(VENV)/.run: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

$(VENV)/.bench: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	@touch $@
