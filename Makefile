# Each target makes what it needs. PYTHON chooses the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart

.PHONY: help quickstart test check format bench clean

help:           ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

quickstart: $(VENV)/.run    ## install, then pretrain and judge an encoder on built-in images (about 4 minutes on 2 cores)
	rm -rf $(RUN)
	$(BIN)/hf-ssl-or train recipes/quickstart.yaml --output $(RUN)

test: check     ## lint, types and all tests (under 10 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(VENV)/.test    ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test   ## put the code into its form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.bench   ## benchmarks of the views, the penalties and the losses
	$(BIN)/python benchmarks/views.py
	$(BIN)/python benchmarks/penalty.py
	$(BIN)/python benchmarks/losses.py --quick

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
