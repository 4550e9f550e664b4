PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# the newest torch that everything here was tested with; `make TORCH="torch>=2.6"` takes another
TORCH ?= torch==2.13.0

.PHONY: demo test check bench static aot gpu docs models

demo: $(VENV)/.installed
	$(BIN)/attnvariants demo

# the kernels by themselves, interpreted: Triton reads the variable when it is imported
CONTRACT = tests/kernels tests/test_conformance.py tests/test_golden.py tests/test_numerics.py

# a process a core: more threads would wait for each other
test: export OMP_NUM_THREADS = 1
test: $(VENV)/.installed
	$(BIN)/pytest -n auto
	TRITON_INTERPRET=1 $(BIN)/pytest -n auto $(CONTRACT)

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m bench.cpu

static: $(VENV)/.installed
	$(BIN)/python -m bench.static

# every kernel of every size for every target, half an hour
aot: $(VENV)/.installed
	$(BIN)/pytest -n 0 -m aot

# on a machine with a GPU: tests, accuracy and times in under ten minutes
gpu: $(VENV)/.installed
	$(BIN)/python -m bench.gpu --with-tests

docs: $(VENV)/.installed
	$(BIN)/python -m bench.readme

# every architecture of the installed transformers, ten minutes
models: $(VENV)/.installed
	$(BIN)/attnvariants models --json docs/models.json --markdown docs/models.md

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" -e ".[dev]"
	touch $@
