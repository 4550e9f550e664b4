PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# the newest torch that everything here was tested with; `make TORCH="torch>=2.6"` takes another
TORCH ?= torch==2.13.0

.PHONY: demo test check bench docs

demo: $(VENV)/.installed
	$(BIN)/attnvariants demo

test: $(VENV)/.installed
	$(BIN)/pytest

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m bench.cpu

docs: $(VENV)/.installed
	$(BIN)/python -m bench.readme

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" -e ".[dev]"
	touch $@
