PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# the torch that everything here was tested with; `make TORCH="torch>=2.6"` takes another
TORCH ?= torch==2.13.0
# where `make matrix` keeps its environments, of which those with CUDA builds take 5 GB each
MATRIX ?= .matrix

.PHONY: demo test nightly check bench static gpu docs models matrix lock fuzz

demo: $(VENV)/.installed
	$(BIN)/attnvariants demo

# the kernels by themselves, interpreted: Triton reads the variable when it is imported
CONTRACT = tests/kernels tests/test_conformance.py tests/test_golden.py tests/test_numerics.py
# a process a core: more threads would wait for each other
RUN = OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

test: $(VENV)/.installed
	$(RUN)
	TRITON_INTERPRET=1 $(RUN) $(CONTRACT)

# all that `make test` leaves out for time, and what needs no GPU but hours
nightly: $(VENV)/.installed
	$(RUN) -m "nightly or sweep"
	TRITON_INTERPRET=1 $(RUN) -m nightly $(CONTRACT)
	$(BIN)/pytest -n 0 -m aot

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# random calls against the float64 reference, half an hour; the interpreted ones are the kernels'
fuzz: export OMP_NUM_THREADS = 1
fuzz: $(VENV)/.installed
	$(BIN)/python -m attnvariants.testing fuzz --cases 50000 --workers 2 --out build/fuzz
	$(BIN)/python -m attnvariants.testing fuzz --cases 2000 --impl sdpa --workers 2
	TRITON_INTERPRET=1 $(BIN)/python -m attnvariants.testing fuzz --cases 2000 --impl triton \
		--workers 2 --out build/fuzz-triton

bench: $(VENV)/.installed
	$(BIN)/python -m bench.cpu

static: $(VENV)/.installed
	$(BIN)/python -m bench.static

# on a machine with a GPU: tests, accuracy and times in under ten minutes
gpu: $(VENV)/.installed
	$(BIN)/python -m bench.gpu --with-tests

docs: $(VENV)/.installed
	$(BIN)/python -m bench.readme

# every architecture of the installed transformers, ten minutes
models: $(VENV)/.installed
	$(BIN)/attnvariants models --json docs/models.json --markdown docs/models.md

# the oldest versions that are promised, the pinned and the newest; `ONLY=newest` takes one column
# and `CHECK=1` writes nothing
matrix: $(VENV)/.installed
	$(BIN)/python -m bench.matrix --folder $(MATRIX) --pinned $(VENV) \
		$(addprefix --only ,$(ONLY)) $(if $(CHECK),--check)

# Everything but torch, whose build (CPU, CUDA, ROCm) is the machine's: the lock is complete, so
# nothing is resolved, and torch comes last, so that a CUDA build brings the Triton that it needs.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --no-deps --require-hashes -r requirements.lock
	$(INSTALL) "$(TORCH)"
	$(INSTALL) --no-deps --no-build-isolation -e .
	touch $@

# the newest versions that pyproject.toml allows, for every Python and platform
lock:
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) uv
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.10 --upgrade \
		--generate-hashes --no-emit-package torch --no-annotate \
		--custom-compile-command "make lock" --quiet --output-file requirements.lock
