# Needs nothing but Python 3.11+ with venv; everything else is set up on the first call.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Processes that run tests, each on one thread.
WORKERS ?= 2

# Modules are compiled once and kept, whatever the shell says: else every process that a test starts compiles torch again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-all check lint types tests docs format fuzz train clean

setup: $(STAMP)

# Without a network the needle model, which is here, answers in place of SmolLM2.
demo: $(STAMP)
	@$(BIN)/baatt fetch smollm2 || echo "SmolLM2 could not be fetched: the demo goes on with the model that is here."
	$(BIN)/baatt demo

# The default set: what needs no GPU and is not marked slow.
test:
	@echo "Installs what is missing, then format, lint, types, tests and docs: 3 to 10 minutes on two idle cores, by their speed."
	$(MAKE) setup
	$(MAKE) -j 2 check

# Everything that needs no GPU.
test-all: MARKED := not gpu
test-all: $(STAMP) check

check: lint types tests docs

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

MARKED := not gpu and not slow
tests: $(STAMP)
	$(BIN)/pytest -m "$(MARKED)" -n $(WORKERS) --dist loadfile --no-loadscope-reorder --ignore=tests/gpu

docs: $(STAMP)
	$(BIN)/python benchmarks/render.py --check

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Random calls against the reference for a minute; the seed is printed and makes them again.
fuzz: $(STAMP)
	$(BIN)/python benchmarks/fuzz.py --impl cpu auto

train: $(STAMP)
	bash training/run.sh

# torch goes first: resolved together with the rest, an installer may pick a build of several gigabytes.
# The pip that comes with Python 3.11 takes twice as long. Most of the 14,000 modules are never imported: what `baatt`
# imports is compiled by its first call, below.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	$(INSTALL) torch==2.13.0
	$(INSTALL) -c constraints.txt -e ".[dev]"
	$(BIN)/baatt doctor >/dev/null
	touch $(STAMP)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
