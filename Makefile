# make up      a local cluster with the built-in model, from nothing but Python 3.11 or later
# make test    what continuous integration runs
# make help    the rest

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
NPM := npm install --no-package-lock --no-audit --no-fund --ignore-scripts --loglevel=error
PLUGINS := -e plugins/policies
DEV_PLUGINS := -e 'plugins/transfer_nixl[cpu]' -e 'plugins/transfer_mooncake[cpu]' \
	-e 'plugins/transfer_ascend[memfabric,adapter]'
REQUIREMENTS := pyproject.toml constraints.txt $(wildcard plugins/*/pyproject.toml)

# Tests without processes or sockets of their own may run side by side: nothing in them is measured against a clock.
ALONE := tests/kernels tests/unit

# Tests run on small machines, several processes at a time.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help venv dev up test test-all lint format clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 12

venv: $(VENV)/.installed ## .venv with pd, its engine and the policies

dev: $(VENV)/.installed-dev ## .venv with what the tests need besides

up: venv ## a router, a prefill and a decode instance on this machine; ARGS="…" goes to pd up
	$(BIN)/pd up $(ARGS)

test: lint ## lint, then every test that needs neither a GPU nor patience
	$(BIN)/pytest -m "not gpu and not slow" -n 2 $(ALONE)
	$(BIN)/pytest -m "not gpu and not slow" $(ALONE:%=--ignore=%)

test-all: lint ## every test that this machine can run
	$(BIN)/pytest -n 2 $(ALONE)
	$(BIN)/pytest $(ALONE:%=--ignore=%)

lint: dev ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: dev ## rewrite what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and every cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build

# Stamps: a second call costs nothing until a list of requirements changes.
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pd needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(REQUIREMENTS) | $(BIN)/python
	$(PIP) -e '.[engine]' $(PLUGINS)
	@touch $@

$(VENV)/.installed-dev: $(REQUIREMENTS) tests/clients/package.json | $(BIN)/python
	@$(BIN)/python -c 'import ctypes; ctypes.CDLL("libibverbs.so.1")' 2>/dev/null || \
		echo 'no libibverbs.so.1 (apt-get install libibverbs1): the tests of mooncake are skipped' >&2
	$(PIP) -e '.[dev]' $(PLUGINS) $(DEV_PLUGINS)
	@$(NPM) --prefix tests/clients || echo 'npm has failed: its client is not tested'
	@touch $(VENV)/.installed $@
